"""The compiled quantizer gives the numbers of core's, to the bit."""

import pytest
import torch

from mono_quant_hf import kernels
from mono_quant_hf.core import quantize_to_codes
from mono_quant_hf.kernels import codes as kernel_codes
from mono_quant_hf.kernels import cpu
from mono_quant_hf.kernels.codes import LARGE

pytestmark = pytest.mark.skipif(cpu.load() is None, reason=f"no compiled kernels: {cpu.why_missing()}")


def weight(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows of every magnitude that float32 has, and the odd ones: of zeros, constant, of one sign, with ties."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator)
    rows = made.flatten(1)
    rows *= 10 ** (torch.rand(len(rows), 1, generator=generator) * 80 - 44)
    rows.clamp_(-1.6e38, 1.6e38)
    rows[0], rows[1], rows[2], rows[3], rows[4] = 0.0, 5.0, -3.0, -0.0, 1e-45
    rows[5].abs_()
    rows[6].abs_().neg_()
    rows[7] = torch.randint(-255, 256, rows[7].shape, generator=generator) / 2
    return made


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(1024, 333), (300, 2048), (520, 64, 3, 3), (LARGE // 8, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_core(seed, shape, symmetric):
    made = weight(seed, shape)
    for found, expected in zip(
        kernels.quantize(made, symmetric), quantize_to_codes(made, symmetric), strict=True
    ):
        if expected is None:
            assert found is None
        else:
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_every_row_of_a_large_weight_is_written_once(monkeypatch):
    monkeypatch.setattr(kernel_codes, "quantize_to_codes", None)  # the kernel itself has to do it
    made = weight(0, (700, 700))
    codes, scale, zero_point = kernels.quantize(made)
    assert (((codes - zero_point.float()) * scale - made).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_has_no_range_is_core_s_error(value):
    made = torch.ones(600, 600)
    made[599, 599] = value
    with pytest.raises(ValueError, match="so it has no range"):
        kernels.quantize(made)


def test_a_range_wider_than_float32_is_core_s_error():
    made = torch.ones(600, 600)
    made[3, 4:6] = torch.tensor([3e38, -3e38])
    with pytest.raises(ValueError, match="wider than float32 can hold"):
        kernels.quantize(made)


@pytest.mark.parametrize("axis", [1, (0, 1)])
def test_other_axes_and_dtypes_are_core_s(axis):
    made = torch.randn(64, 64, 100)
    for one in (made, made.bfloat16()):
        for found, expected in zip(
            kernels.quantize(one, axis=axis), quantize_to_codes(one, axis=axis), strict=True
        ):
            assert torch.equal(found, expected)
