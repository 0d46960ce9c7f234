"""Install PyTorch into the running environment, as a CPU build where the machine has no NVIDIA GPU.

On most platforms pip chooses a fitting build by itself. On Linux it may choose one that brings several GB of
CUDA libraries along; where no GPU could use them, uv is asked instead, which knows where PyTorch keeps its
CPU builds.

Usage: python .ci/install_torch.py 'torch==2.13.0'
"""

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

from packaging.requirements import Requirement

GPU_PACKAGE = re.compile(r"(nvidia|cuda|triton)\b")


def pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", *arguments]


def is_installed(requirement: Requirement) -> bool:
    """Whether the environment has a torch that the requirement accepts; 2.13.0+cpu is a 2.13.0."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def has_gpu() -> bool:
    """Whether NVIDIA's own tool lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def gpu_packages(metadata: dict[str, Any]) -> list[str]:
    """The CUDA packages that a wheel of torch asks for on this machine.

    Args:
        metadata: the wheel's metadata as in pip's installation report.
    """
    requirements = [Requirement(text) for text in metadata.get("requires_dist", [])]
    return [
        requirement.name
        for requirement in requirements
        if GPU_PACKAGE.match(requirement.name.lower())
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


def choice_of_pip(requirement: Requirement) -> dict[str, Any] | None:
    """Metadata of the wheel that pip would install, without fetching it; None where pip finds none."""
    command = pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-")
    report = subprocess.run([*command, str(requirement)], stdout=subprocess.PIPE, text=True, check=False)
    if report.returncode != 0:
        return None
    chosen: dict[str, Any] = json.loads(report.stdout)["install"][0]["metadata"]
    return chosen


def main(text: str) -> int:
    requirement = Requirement(text)
    if is_installed(requirement):
        print(f"{requirement} is installed")
        return 0
    command = pip("install", "--quiet", str(requirement))
    if platform.system() == "Linux" and not has_gpu():
        chosen = choice_of_pip(requirement)
        if chosen is None or gpu_packages(chosen):
            subprocess.run(pip("install", "--quiet", "uv>=0.8"), check=True)
            command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
            command += ["--torch-backend=cpu", str(requirement)]
    print(f"Installing {requirement} ({'uv' if 'uv' in command else 'pip'}) ...", flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
