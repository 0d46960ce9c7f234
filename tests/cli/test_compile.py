"""The command `compile`."""

import os
import shutil
import subprocess
import sys

import pytest

from mono_quant_hf.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.load() is None, reason=f"no compiled kernels: {cpu.why_missing()}")


def run(**environment):
    return subprocess.run(
        [sys.executable, "-m", "mono_quant_hf", "compile"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_kernels_are_compiled_once_and_may_be_shipped(tmp_path):
    first = run(NUMBA_CACHE_DIR=str(tmp_path / "made"))
    assert first.returncode == 0 and "Compiling the CPU kernel" in first.stderr
    assert str(tmp_path / "made") in first.stdout and list(tmp_path.rglob("*.nbi"))
    shutil.copytree(tmp_path / "made", tmp_path / "shipped", copy_function=shutil.copyfile)
    second = run(NUMBA_CACHE_DIR=str(tmp_path / "shipped"))
    assert second.stdout == first.stdout.replace("made", "shipped") and "Compiling" not in second.stderr


def test_a_compiler_that_is_switched_off_is_one_line():
    result = run(NUMBA_DISABLE_JIT="1")
    assert result.returncode == 2 and "NUMBA_DISABLE_JIT" in result.stderr.splitlines()[-1]
