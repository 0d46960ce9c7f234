"""The kernels for GPUs, without one: in Triton's interpreter, and compiled ahead for cards that need not be here."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mono_quant_hf.kernels import choose, expand, gpu, linear, linear_backward, portable, use_kernel

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (pip install triton)"
)
ROOT = Path(__file__).parents[2]


def run(program, *arguments, **environment):
    """A program beside this file, in a process of its own: Triton reads its settings as it is imported."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.kernels.{program}", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_triton
def test_every_kernel_is_right_in_the_interpreter():
    assert "right" in run("triton_interpreter", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_kernel_is_right_on_a_gpu():
    assert "right" in run("triton_interpreter")


@needs_triton
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_spills(card, tmp_path):
    lines = run("triton_ahead", card, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) > 15


def operands(n=96, k=200, symmetric=False, steps=1e-3):
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n, 1) * steps + steps / 10
    zero_point = None if symmetric else torch.randint(-128, 128, (n, 1), dtype=torch.int8)
    return codes, scale, zero_point


def relative_error(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block_bytes", [64 << 20, 1])
def test_the_plain_way_off_the_cpu_rounds_no_weight(monkeypatch, dtype, symmetric, block_bytes):
    monkeypatch.setattr(portable, "BLOCK_BYTES", block_bytes)
    stored = operands(symmetric=symmetric)
    x, bias, grad = torch.randn(5, 200).to(dtype), torch.randn(96), torch.randn(5, 96).to(dtype)
    exact = expand(*stored, dtype=torch.float64)
    # A product is rounded, and its scaled result; float32 also rounds its sums.
    bound = (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps / 3**0.5
    assert (
        relative_error(portable.linear_by_rows(x, *stored, bias), x.double() @ exact.T + bias.double())
        < bound
    )
    assert relative_error(portable.backward_by_rows(grad, *stored), grad.double() @ exact) < bound


def test_float16_keeps_its_range():
    codes, scale = torch.full((16, 512), 127, dtype=torch.int8), torch.full((16, 1), 1e-3)
    x = torch.full((8, 512), 100.0).half()  # the sum of products with the codes is 6.5 million
    exact = x.double() @ expand(codes, scale, dtype=torch.float64).T
    assert relative_error(portable.linear_by_rows(x, codes, scale, None, None), exact) < 1e-3
    tiny = torch.full((16, 1), 1e-8)  # (code * scale) is far under the smallest normal float16
    exact = x.double() @ expand(codes, tiny, dtype=torch.float64).T
    assert relative_error(portable.linear_by_rows(x, codes, tiny, None, None), exact) < 2e-3


class Traffic(TorchDispatchMode):
    """Counts bytes that operations read and write, and the largest tensor they make."""

    def __init__(self):
        super().__init__()
        self.bytes = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors)
            self.largest = max(
                [self.largest, *(t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor))]
            )
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_costs_five_bytes_of_traffic_and_a_block_of_memory(dtype):
    stored = [t.to("meta") for t in operands(8192, 8192, symmetric=True)[:2]]
    x = torch.empty(1, 8192, dtype=dtype, device="meta")
    with Traffic() as traffic:
        linear(x, *stored)
    assert traffic.bytes / stored[0].numel() < 5.05
    assert traffic.largest <= portable.BLOCK_BYTES
    with Traffic() as traffic:
        linear_backward(torch.empty(1, 8192, dtype=dtype, device="meta"), *stored)
    assert traffic.bytes / stored[0].numel() < 5.05


def test_a_device_without_kernels_says_why():
    assert gpu.why_missing(torch.device("mps")) == "the device is mps"
    codes = torch.ones(4, 8, dtype=torch.int8, device="meta")
    with use_kernel("triton"):
        assert choose(torch.ones(1, 8, device="meta"), codes).reason == "the device is meta"


def test_only_a_scale_for_each_row_goes_to_the_kernel_that_expands(monkeypatch):
    """A square weight with a scale for each column has as many scales as rows."""
    monkeypatch.setattr(gpu, "why_missing", lambda device: "")
    monkeypatch.setattr(
        gpu, "expand", lambda weight, scale, *rest: seen.append(scale.shape) or weight.float()
    )
    codes = torch.ones(8, 8, dtype=torch.int8, device="meta")
    seen = []
    for shape in ((1, 8), (1, 1), (8, 8), (8, 1)):
        expand(codes, torch.ones(shape, device="meta"))
    expand(codes, torch.ones(8, 1, device="meta"), torch.ones(1, 1, dtype=torch.int8, device="meta"))
    expand(codes, torch.ones(8, 2, device="meta")[:, :1])
    assert seen == [(8, 1)]


def test_a_compiler_takes_the_choice_of_device_for_a_constant():
    def doubled(x):
        return x * 2 if gpu.why_missing(x.device) else x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(
            torch.compile(doubled, fullgraph=True, backend="eager")(torch.ones(2)), torch.full((2,), 2.0)
        )
