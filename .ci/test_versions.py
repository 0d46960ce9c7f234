"""Run the tests with the oldest torch, transformers and accelerate that are declared, those that vLLM
takes, and the newest.

Each has a virtual environment of its own, made by `make test`: .venv-oldest, .venv-serving and .venv-newest. Where no
CPU build of PyTorch can be had, each takes some 7 GB.

Usage: python .ci/test_versions.py [oldest|serving|newest] [arguments of pytest]
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "accelerate")
VLLM = {"transformers": "==5.19.*"}  # 0.32 takes none newer


def constraints(end: str) -> dict[str, str]:
    """`{package: versions}` of one environment, such as `{"torch": "==2.9"}`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    split = [text.partition(">=") for text in project["dependencies"]]
    oldest = {name: bound for name, _, bound in split if name in PACKAGES}
    if end == "oldest":
        return {name: f"=={bound}.*" for name, bound in oldest.items()}
    open_above = {name: f">={bound}" for name, bound in oldest.items()}
    return open_above | VLLM if end == "serving" else open_above


def run(end: str, arguments: list[str]) -> int:
    chosen = constraints(end)
    if end != "newest":  # what those versions themselves are warned of is not ours
        arguments = ["-W", "default::DeprecationWarning", "-W", "default::FutureWarning", *arguments]
    print(f"{end}: {', '.join(name + versions for name, versions in chosen.items())}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}{versions}\n" for name, versions in chosen.items()))
        file.flush()
        command = ["make", "test", f"VENV=.venv-{end}", f"TORCH=torch{chosen['torch']}"]
        command.append(f"ARGS={' '.join(arguments)}")
        environment = os.environ | {"PIP_CONSTRAINT": file.name}
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    ends = ["oldest", "serving", "newest"]
    rest = sys.argv[1:]
    if rest and rest[0] in ends:
        ends = [rest.pop(0)]
    sys.exit(max([run(end, rest) for end in ends]))
