"""Code that uses the kernels in a Python of its own: what it does to memory, threads and signals stays there."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The kernels alone: importing the whole package would bring transformers, seconds in each process.
PRODUCTS = """
    import logging, os, sys, types
    logging.basicConfig(level=logging.INFO, format="LOG %(levelname)s %(message)s", stream=sys.stdout)
    import torch
    package = sys.modules["mono_quant_hf"] = types.ModuleType("mono_quant_hf")
    package.__path__ = [os.environ["PACKAGE"]]
    from mono_quant_hf.kernels import choose, expand, linear, quantize, use_kernel
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, (512, 512), dtype=torch.int8)
    scale, zero_point = torch.rand(512, 1), torch.randint(-128, 128, (512, 1), dtype=torch.int8)
    values = torch.randn(512, 512)
    half = values.half()
    cases = [
        (x, arguments, x.double() @ expand(*arguments, dtype=torch.float64).T)
        for x in (torch.randn(m, 512) for m in (1, 4, 40))
        for arguments in ((weight, scale, zero_point), (half,))
    ]

    def products():
        for x, arguments, exact in cases:
            error = (linear(x, *arguments) - exact).abs().max() / exact.abs().max()
            assert error < 1e-3, (x.shape, error)
        codes, few = quantize(values)[0], slice(4)  # more would wait for torch's threads after a fork
        assert torch.equal(codes[few].float(), expand(codes, torch.ones(512, 1))[few])
"""


def start(code, **environment):
    """A Python that runs `code` after `PRODUCTS`."""
    script = textwrap.dedent(PRODUCTS) + textwrap.dedent(code)
    environment = {
        **os.environ,
        "PACKAGE": str(ROOT / "mono_quant_hf"),
        "OMP_NUM_THREADS": "2",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=300):
    """What it printed, once it has ended well."""
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, f"{process.returncode}\n{output}{errors}"
    return output


def run(code, timeout=300, **environment):
    return finish(start(code, **environment), timeout)


def log_lines(output):
    return [line for line in output.splitlines() if line.startswith("LOG") and "CPU kernel" in line]
