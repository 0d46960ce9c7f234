import pytest
import torch
import torch.ao.quantization.fx._decomposed

from mono_quant_hf.core import (
    dequantize_codes,
    dequantize_weight,
    quantize_to_codes,
    quantize_weight_fp16,
    quantize_weight_int8,
)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_codes_agree_with_torch_and_quantized_decomposed(axis, symmetric):
    weight = randn(6, 5, 7)
    codes, scale, zero_point = quantize_to_codes(weight, symmetric, axis)
    flat_zero_point = torch.zeros_like(scale.flatten(), dtype=torch.int64)
    if zero_point is not None:
        flat_zero_point = zero_point.flatten().long()
    expected = torch.ops.quantized_decomposed.quantize_per_channel(
        weight, scale.flatten(), flat_zero_point, axis % 3, -128, 127, torch.int8
    )
    assert torch.equal(codes, expected)
    quantized = quantize_weight_int8(weight, symmetric, axis)
    assert quantized.dtype == torch.qint8 and quantized.q_per_channel_axis() == axis % 3
    assert torch.equal(quantized.int_repr(), codes)
    torch.testing.assert_close(dequantize_weight(quantized), dequantize_codes(codes, scale, zero_point))


def test_default_axis_is_zero_and_asymmetric():
    quantized = quantize_weight_int8(randn(3, 8) + 1)
    assert quantized.q_per_channel_axis() == 0 and quantized.q_per_channel_scales().shape == (3,)
    assert bool((quantized.q_per_channel_zero_points() != 0).any())


def test_quantizing_neither_changes_the_weight_nor_needs_its_gradient():
    weight = randn(4, 4).requires_grad_()
    before = weight.detach().clone()
    codes, scale, zero_point = quantize_to_codes(weight)
    assert torch.equal(weight, before) and not any(t.requires_grad for t in (codes, scale, zero_point))
    assert not quantize_weight_int8(weight).requires_grad and not quantize_weight_fp16(weight).requires_grad


def test_fp16_is_a_cast_and_comes_back_as_float32():
    weight = randn(4, 4)
    half = quantize_weight_fp16(weight)
    assert half.dtype == torch.float16 and torch.equal(half, weight.half())
    restored = dequantize_weight(half)
    assert restored.dtype == torch.float32 and torch.equal(restored, half.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_codes_computes_in_float32_and_returns_the_asked_dtype(dtype):
    codes, scale, zero_point = quantize_to_codes(randn(4, 4))
    exact = (codes.double() - zero_point.double()) * scale.double()
    restored = dequantize_codes(codes, scale, zero_point, dtype)
    assert restored.dtype == dtype
    torch.testing.assert_close(restored.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("function", "argument", "error", "words"),
    [
        (quantize_weight_fp16, torch.tensor([1.0, 7e4]), ValueError, "65504"),
        (quantize_weight_fp16, torch.tensor([1.0, float("nan")]), ValueError, "NaN"),
        (quantize_weight_fp16, torch.tensor([1, 2]), TypeError, "int64"),
        (quantize_weight_int8, torch.tensor([[float("nan")]]), ValueError, "NaN"),
        (quantize_weight_int8, torch.tensor(2.0), ValueError, "scalar"),
        (quantize_weight_int8, torch.zeros(0, 3), ValueError, "no elements"),
        (dequantize_weight, torch.ones(2), TypeError, "float32"),
        (dequantize_weight, "weight", TypeError, "str"),
    ],
)
def test_bad_input_is_one_clear_error(function, argument, error, words):
    with pytest.raises(error, match=words):
        function(argument)


def test_a_torch_without_quantized_tensors_is_one_clear_error(monkeypatch):
    monkeypatch.delattr(torch, "quantize_per_channel")
    with pytest.raises(RuntimeError, match=r"no longer has quantized tensors.*quantize_to_codes"):
        quantize_weight_int8(randn(2, 2))
    assert quantize_to_codes(randn(2, 2))[0].dtype == torch.int8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axes", [(0, 1), (2, 0), (-1, -3)])
def test_several_axes_give_a_channel_to_each_combination(axes, symmetric):
    weight = randn(3, 5, 7)
    codes, scale, zero_point = quantize_to_codes(weight, symmetric, axes)
    channels = {axis % 3 for axis in axes}
    assert scale.shape == tuple(size if dim in channels else 1 for dim, size in enumerate(weight.shape))
    inner = next(iter({1, 2} & channels)) - 1
    for expert in range(3):
        alone = quantize_to_codes(weight[expert], symmetric, inner)
        together = (codes[expert], scale[expert], None if zero_point is None else zero_point[expert])
        for one, other in zip(alone, together, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_no_axis_or_one_out_of_range_is_one_clear_error():
    with pytest.raises(ValueError, match="name at least one axis"):
        quantize_to_codes(randn(2, 2), axis=())
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        quantize_to_codes(randn(2, 2), axis=(0, 2))
