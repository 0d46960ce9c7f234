"""Run the tests with the oldest and with the newest torch, transformers and accelerate that pyproject.toml allows.

Each end has a virtual environment of its own, made by `make test`: .venv-oldest and .venv-newest. Where there is no CPU
build of PyTorch to be had, each takes some 7 GB.

Usage: python .ci/test_versions.py [oldest|newest] [arguments of pytest]
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANGES = ("torch", "transformers", "accelerate")


def ranges() -> dict[str, str]:
    """`{package: range}`, such as `{"torch": ">=2.13,<2.16"}`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dependencies = [text.partition(">=") for text in project["dependencies"]]
    return {name: f">={bounds}" for name, _, bounds in dependencies if name in RANGES}


def run(end: str, arguments: list[str]) -> int:
    declared = ranges()
    if end == "oldest":
        declared = {
            name: "==" + bounds.partition(",")[0].removeprefix(">=") for name, bounds in declared.items()
        }
    print(f"{end}: {', '.join(name + bounds for name, bounds in declared.items())}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("".join(f"{name}{bounds}\n" for name, bounds in declared.items()))
        constraints.flush()
        command = ["make", "test", f"VENV=.venv-{end}", f"TORCH=torch{declared['torch']}"]
        command.append(f"ARGS={' '.join(arguments)}")
        environment = os.environ | {"PIP_CONSTRAINT": constraints.name}
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    ends = ["oldest", "newest"]
    rest = sys.argv[1:]
    if rest and rest[0] in ends:
        ends = [rest.pop(0)]
    sys.exit(max([run(end, rest) for end in ends]))
