"""Every way of computing the product, against float64 arithmetic on the dequantized weight."""

import pytest
import torch
from torch.nn import functional

from mono_quant_hf.core import sqnr
from mono_quant_hf.kernels import blocks, choose, expand, linear, use_kernel

WAYS = ("auto", "int16", "float", "blocks", "portable")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def codes(n, k, symmetric=False, seed=0):
    """weight, scale, zero_point: random codes, some rows all on one side of zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, 1, generator=generator) * 0.02 + 1e-4
    zero_point = torch.randint(-128, 128, (n, 1), dtype=torch.int8, generator=generator)
    return weight, scale, None if symmetric else zero_point


def exact(x, weight, scale=None, zero_point=None, bias=None):
    full = expand(weight, scale, zero_point, torch.float64)
    return functional.linear(x.double(), full, None if bias is None else bias.double())


def close(result, x, weight, scale=None, zero_point=None, bias=None):
    """As near as the dtype of the result lets it be, and never under 60 dB in float32."""
    assert result.dtype == x.dtype
    reference = exact(x, weight, scale, zero_point, bias)
    assert result.shape == reference.shape
    decibels = sqnr(reference, result.double())
    assert decibels >= (45 if x.dtype == torch.bfloat16 else 60), decibels


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
def test_int8(way, dtype, symmetric, with_bias):
    n, k = 70, 200
    weight, scale, zero_point = codes(n, k, symmetric)
    bias = torch.randn(n) if with_bias else None
    for shape in ((k,), (1, k), (2, k), (2, 3, k), (1, 1, k), (33, k)):
        x = torch.randn(shape).to(dtype)
        with use_kernel(way):
            close(linear(x, weight, scale, zero_point, bias), x, weight, scale, zero_point, bias)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", (False, True))
def test_float16(way, dtype, with_bias):
    n, k = 70, 200
    weight = torch.randn(n, k).half()
    bias = torch.randn(n) if with_bias else None
    for shape in ((1, k), (2, 3, k), (33, k)):
        x = torch.randn(shape).to(dtype)
        with use_kernel(way):
            close(linear(x, weight, bias=bias), x, weight, bias=bias)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("n", "k"),
    (
        (1, 1),
        (1, 64),
        (5, 1),
        (3, 31),
        (4, 32),
        (7, 33),
        (65, 127),
        (6, 8160),
        (9, 8200),
        (5, 20000),
        (35, 1030),
    ),
)
@pytest.mark.parametrize("half", (False, True))
def test_odd_shapes(way, n, k, half):
    weight, scale, zero_point = (torch.randn(n, k).half(), None, None) if half else codes(n, k)
    for tokens in (1, 2, 3, 4, 5, 7, 13):
        x = torch.randn(tokens, k)
        with use_kernel(way):
            close(linear(x, weight, scale, zero_point), x, weight, scale, zero_point)


@pytest.mark.parametrize("way", WAYS)
def test_many_rows_and_tokens_share_the_work_between_threads(way):
    weight, scale, zero_point = codes(515, 640)
    for tokens in (1, 130, 300):
        x = torch.randn(tokens, 640)
        with use_kernel(way):
            close(linear(x, weight, scale, zero_point), x, weight, scale, zero_point)


@pytest.mark.parametrize("way", WAYS)
def test_empty_inputs(way):
    weight, scale, zero_point = codes(6, 8)
    with use_kernel(way):
        assert linear(torch.empty(0, 8), weight, scale, zero_point).shape == (0, 6)
        assert linear(torch.empty(2, 0, 8), weight, scale, zero_point).shape == (2, 0, 6)
        bias = torch.randn(6)
        nothing = linear(torch.empty(2, 0), weight[:, :0], scale, zero_point, bias)
        assert torch.equal(nothing, bias.expand(2, 6))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", (1, 6))
def test_gaps_in_memory(way, tokens):
    weight, scale, zero_point = codes(24, 40)
    every_other = torch.randn(tokens, 80)[:, ::2]
    transposed = torch.randn(40, tokens).t()
    bias = torch.randn(48)[::2]
    with use_kernel(way):
        for x in (every_other, transposed):
            close(linear(x, weight, scale, zero_point, bias), x, weight, scale, zero_point, bias)
        strided = codes(40, 24)[0].t()
        close(linear(every_other, strided, scale, zero_point), every_other, strided, scale, zero_point)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", (1, 5, 20))
@pytest.mark.parametrize("heard", (1.0, 0.0), ids=("outlier counts", "outlier meets zeros"))
def test_outliers_do_not_drown_the_rest(way, tokens, heard):
    """25,000 times the median, also where the weight ignores the outlier and only the rest is left to see."""
    weight, scale, zero_point = codes(64, 1536)
    x = torch.randn(tokens, 1536)
    x[0, 7] = 25_000 * x[0].abs().median()
    if tokens > 2:
        x[2, [3, 900]] = torch.tensor([-9_000.0, 25_000.0])
    if heard == 0.0:
        weight[:, [3, 7, 900]] = zero_point
    with use_kernel(way):
        y = linear(x, weight, scale, zero_point)
    for token in range(tokens):  # each by itself: a loud token would hide a bad quiet one
        close(y[token], x[token], weight, scale, zero_point)


@pytest.mark.parametrize("way", WAYS)
def test_zero_point_far_from_the_codes_sum(way):
    """All codes near a zero-point of -128: the correction cancels nearly everything."""
    weight = torch.full((16, 2048), -125, dtype=torch.int8)
    weight[:, ::97] = 127
    scale, zero_point = torch.full((16, 1), 0.01), torch.full((16, 1), -128, dtype=torch.int8)
    for tokens in (1, 4, 20):
        x = torch.rand(tokens, 2048) + 1
        with use_kernel(way):
            close(linear(x, weight, scale, zero_point), x, weight, scale, zero_point)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", (1, 3, 20))
def test_values_no_code_can_hold(way, tokens):
    weight, scale, zero_point = codes(19, 50, symmetric=True)
    weight[0] = 0
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(tokens, 50)
        x[0, 3] = value
        with use_kernel(way):
            y = linear(x, weight, scale, zero_point)
        reference = exact(x, weight, scale, zero_point).float()
        assert torch.equal(torch.isnan(y), torch.isnan(reference))
        assert torch.equal(torch.isinf(y), torch.isinf(reference))
        assert torch.allclose(y, reference, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", (0.0, 1e-38, 1e-30, 1e-20, 1e20, 1e30))
def test_tiny_and_huge_inputs(way, factor):
    weight, scale, zero_point = codes(20, 64)
    for tokens in (1, 4, 20):
        x = torch.randn(tokens, 64) * factor
        with use_kernel(way):
            y = linear(x, weight, scale, zero_point)
        reference = exact(x, weight, scale, zero_point)
        assert (y - reference).abs().max() <= 2e-4 * reference.abs().max() + 1e-38


def test_float16_input_does_not_overflow_on_the_way():
    weight = torch.full((4, 4096), 127, dtype=torch.int8)
    scale = torch.full((4, 1), 1e-3)
    x = torch.full((2, 4096), 1.0, dtype=torch.float16)  # 520,192 before the scale, 520 after
    for way in WAYS:
        with use_kernel(way):
            assert torch.allclose(linear(x, weight, scale).float(), torch.full((2, 4), 520.19), rtol=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", (1, 3, 20))
def test_autocast_changes_nothing(way, tokens):
    weight, scale, zero_point = codes(20, 60)
    bias = torch.randn(20)
    for x in (torch.randn(tokens, 60), torch.randn(tokens, 60).bfloat16()):
        with use_kernel(way):
            outside = linear(x, weight, scale, zero_point, bias)
            with torch.autocast("cpu", torch.bfloat16):
                inside = linear(x, weight, scale, zero_point, bias)
        assert inside.dtype == x.dtype
        assert torch.equal(outside, inside)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_of_any_float_dtype(dtype):
    weight, scale, zero_point = codes(20, 60)
    bias = torch.randn(20).to(dtype)
    for way in WAYS:
        for x in (torch.randn(1, 60), torch.randn(3, 60)):
            with use_kernel(way):
                close(linear(x, weight, scale, zero_point, bias), x, weight, scale, zero_point, bias)


def test_meta_tensors():
    weight, scale, zero_point = (tensor.to("meta") for tensor in codes(6, 8))
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16)
    y = linear(x, weight, scale, zero_point)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 6), torch.bfloat16, "meta")
    assert choose(x, weight).name == "portable"


@pytest.mark.parametrize("dtype", (torch.int8, torch.int64, torch.bool, torch.complex64))
def test_input_must_be_floating(dtype):
    with pytest.raises(TypeError, match=r"must be floating, got torch\." + str(dtype).split(".")[1]):
        linear(torch.ones(1, 8, dtype=dtype), *codes(6, 8))


@pytest.mark.parametrize("tokens", (1, 3, 20))
def test_shapes_that_do_not_fit(tokens):
    weight, scale, zero_point = codes(6, 8)
    with pytest.raises(RuntimeError, match="does not fit the weight"):
        linear(torch.randn(tokens, 9), weight, scale, zero_point)
    with pytest.raises(RuntimeError, match="scale"):
        linear(torch.randn(tokens, 8), weight, scale[:3], zero_point)
    with pytest.raises(RuntimeError, match=r"scale .* on meta"):
        linear(torch.randn(tokens, 8), weight, scale.to("meta"), zero_point)
    with pytest.raises(RuntimeError, match="zero_point"):
        linear(torch.randn(tokens, 8), weight, scale, zero_point[:3])
    with pytest.raises(RuntimeError, match="bias"):
        linear(torch.randn(tokens, 8), weight, scale, zero_point, torch.randn(7))


def test_expand_is_the_same_everywhere():
    for shape in ((6, 8), (200, 333), (6, 3, 5, 5), (7,)):
        generator = torch.Generator().manual_seed(1)
        weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        per_row = (shape[0],) + (1,) * (len(shape) - 1)
        scale = torch.rand(per_row, generator=generator)
        zero_point = torch.randint(-128, 128, per_row, dtype=torch.int8, generator=generator)
        for zero in (zero_point, None):
            whole = weight.float() - (0 if zero is None else zero.float())
            assert torch.equal(expand(weight, scale, zero), whole * scale)
            assert torch.equal(expand(weight, scale, zero, torch.bfloat16), (whole * scale).bfloat16())
    other_axis = torch.rand(1, 8)
    weight = codes(6, 8)[0]
    assert torch.equal(expand(weight, other_axis), weight.float() * other_axis)
    half = torch.randn(3, 4).half()
    assert torch.equal(expand(half), half.float())


@pytest.mark.parametrize("half", (False, True))
def test_blocks_expand_some_rows_at_a_time(half, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64 * 200 * 4)
    weight, scale, zero_point = (torch.randn(150, 200).half(), None, None) if half else codes(150, 200)
    bias = torch.randn(150)
    x = torch.randn(2, 3, 200, requires_grad=True)
    with use_kernel("blocks"):
        y = linear(x, weight, scale, zero_point, bias)
    close(y.detach(), x.detach(), weight, scale, zero_point, bias)
    (to_x,) = torch.autograd.grad(y.sum(), x)
    sum_of_rows = expand(weight, scale, zero_point, torch.float64).sum(0)
    torch.testing.assert_close(to_x.double(), sum_of_rows.expand(2, 3, 200), rtol=1e-4, atol=1e-3)
