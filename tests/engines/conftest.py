"""vLLM in an environment of its own, `MONO_QUANT_VLLM_PYTHON` (`make test-engines` makes it)."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hub.conftest import environment, hub  # noqa: F401

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _environment() -> dict[str, str]:
    """Few threads and little room for keys and values; what MPI and others set is left out."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


@pytest.fixture(scope="session")
def vllm():
    """vLLM's interpreter; `generate(folder, prompts, tokens, **options)` gives tokens, or the text of its error."""
    python = os.environ.get("MONO_QUANT_VLLM_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("vLLM runs in an environment of its own, which is not here: make test-engines")

    def generate(folder, prompts, tokens=24, variables=None, adapter=None, **options):
        request = {"model": str(folder), "prompts": prompts, "tokens": tokens, "options": options}
        request["adapter"] = adapter and str(adapter)
        done = subprocess.run(
            [python, HERE / "vllm_generate.py"],
            input=json.dumps(request),
            env=_environment() | (variables or {}),
            capture_output=True,
            text=True,
            timeout=600,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
        return json.loads(lines[0].removeprefix("TOKENS ")) if lines else done.stdout + done.stderr

    return SimpleNamespace(python=python, generate=generate, environment=_environment())
