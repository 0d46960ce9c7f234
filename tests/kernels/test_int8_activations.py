"""Products whose input is rounded to int8 too: as accurate as int8 is, outliers and odd inputs included."""

import logging

import pytest
import torch
from torch.nn import functional

from mono_quant_hf.core import sqnr
from mono_quant_hf.kernels import choice, choose, cpu, expand, linear, use_kernel

from .test_linear import codes

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="int8 products are those of the compiled kernels")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def int8_way():
    """Also on a processor without the instructions, where it is only slow; pretences end with their test."""
    with use_kernel("int8"):
        yield
    choice.decide.cache_clear()
    choice.decide_int8.cache_clear()


def exact(x, weight, scale, zero_point=None, bias=None):
    full = expand(weight, scale, zero_point, torch.float64)
    return functional.linear(x.double(), full, None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
def test_as_accurate_as_int8_is(dtype, symmetric, with_bias):
    weight, scale, zero_point = codes(96, 640, symmetric)
    bias = torch.randn(96) if with_bias else None
    for shape in ((33, 640), (2, 20, 640)):
        x = torch.randn(shape).to(dtype)
        result = linear(x, weight, scale, zero_point, bias, "int8")
        reference = exact(x, weight, scale, zero_point, bias)
        assert result.dtype == dtype
        assert result.shape == reference.shape
        assert 35 < sqnr(reference, result.double()) < 70  # the input was rounded


def test_a_token_whose_values_are_far_apart_keeps_16_bits():
    weight, scale, zero_point = codes(64, 640)
    x = torch.randn(40, 640)
    x[10:20, [3, 77, 600]] *= 100
    x[20, 5] = 1e6
    result = linear(x, weight, scale, zero_point, activations="int8")
    error = [sqnr(*pair) for pair in zip(exact(x, weight, scale, zero_point), result.double(), strict=True)]
    assert min(error[10:21]) > 60 and min(error) > 28  # 7 bits without VNNI, 6 dB less than 8
    assert max(error[:10]) < 60  # 8 bits are enough for these


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(96, 640), (35, 577), (5, 64)])
def test_a_token_is_the_same_to_the_bit_alone_and_in_a_batch(dtype, shape):
    weight, scale, zero_point = codes(*shape)
    x = torch.randn(37, shape[1])
    x[::3, 7] *= 500
    x[5] = 0
    x[9, 1] = float("nan")
    x = x.to(dtype)
    whole = linear(x, weight, scale, zero_point, activations="int8")
    for size in (1, 2, 3, 8):
        parts = [linear(part, weight, scale, zero_point, activations="int8") for part in x.split(size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0, equal_nan=True)
    order = torch.randperm(37)
    shuffled = linear(x[order], weight, scale, zero_point, activations="int8")
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=0, equal_nan=True)


def test_a_transposed_weight():
    weight, scale, zero_point = codes(96, 640)
    x = torch.randn(40, 640)
    expected = linear(x, weight, scale, zero_point, activations="int8")
    stored = weight.t().contiguous().t()
    torch.testing.assert_close(linear(x, stored, scale, zero_point, activations="int8"), expected)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_token_without_numbers_leaves_the_others_alone(value):
    weight, scale, zero_point = codes(96, 640)
    x = torch.randn(40, 640)
    expected = linear(x, weight, scale, zero_point, activations="int8")
    x[7, 5] = value
    result = linear(x, weight, scale, zero_point, activations="int8")
    assert not result[7].isfinite().any()
    others = torch.arange(40) != 7
    assert sqnr(expected[others].double(), result[others].double()) > 35


def test_a_token_of_nothing_but_nan_takes_no_outlier_columns_from_the_others():
    weight, scale, zero_point = codes(96, 640)
    x = torch.randn(40, 640)
    x[:, [503, 577, 600]] *= 1000
    x[7] = float("nan")
    result = linear(x, weight, scale, zero_point, activations="int8")
    assert result[7].isnan().all()
    others = torch.arange(40) != 7
    assert sqnr(exact(x[others], weight, scale, zero_point), result[others].double()) > 60


def test_a_token_with_a_monstrous_outlier_keeps_the_rest_of_its_values():
    weight, scale, zero_point = codes(96, 640)
    weight[:, 77] = zero_point[:, 0]  # a product that ignores the outlier, as those of language models do
    x = torch.randn(40, 640)
    x[0, 77] = 25000.0
    result = linear(x, weight, scale, zero_point, activations="int8")
    by_token = [
        sqnr(*pair) for pair in zip(exact(x, weight, scale, zero_point), result.double(), strict=True)
    ]
    assert min(by_token) > 30


def test_zeros_stay_zeros():
    weight, scale, zero_point = codes(96, 640)
    assert not linear(torch.zeros(20, 640), weight, scale, zero_point, activations="int8").any()


def test_float16_weights_are_computed_as_without():
    x, half = torch.randn(40, 640), torch.randn(96, 640).half()
    assert torch.equal(linear(x, half, activations="int8"), linear(x, half))


def test_the_gradient_is_that_of_the_dequantized_weight():
    weight, scale, zero_point = codes(96, 640)
    x = torch.randn(40, 640, requires_grad=True)
    bias = torch.zeros(96, requires_grad=True)
    grad = torch.randn(40, 96)
    linear(x, weight, scale, zero_point, bias, "int8").backward(grad)
    torch.testing.assert_close(x.grad, grad @ expand(weight, scale, zero_point), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_compiles_without_a_break_and_exports():
    weight, scale, zero_point = codes(96, 640)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return torch.relu(linear(x, weight, scale, zero_point, activations="int8"))

    x = torch.randn(40, 640)
    expected = Layer()(x)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(Layer(), (x,)).module()
    torch.testing.assert_close(exported(x), expected)


def test_what_was_chosen_and_why(monkeypatch, caplog):
    weight, _, _ = codes(96, 640)
    x = torch.randn(40, 640)
    assert choose(x, weight, "int8").name == "int8"
    with use_kernel("float"):
        assert "float was asked for" in choose(x, weight, "int8").reason
    choice.decide_int8.cache_clear()
    choice._no_gain.cache_clear()
    monkeypatch.setattr(cpu.load(), "BYTE_PRODUCTS", False)
    with use_kernel("auto"), caplog.at_level(logging.WARNING, "mono_quant_hf"):
        assert "no int8 matrix instructions" in choose(x, weight, "int8").reason
        assert choose(torch.randn(41, 640), weight, "int8").name != "int8"
    assert len(caplog.records) == 1
    assert "activations='int8' changes nothing here" in caplog.text


def test_without_compiled_kernels_it_is_computed_as_without(monkeypatch):
    weight, scale, zero_point = codes(96, 640)
    x = torch.randn(40, 640)
    choice.decide_int8.cache_clear()
    monkeypatch.setattr("mono_quant_hf.kernels.cpu.load", lambda: None)
    assert "no int8 activations" in choose(x, weight, "int8").reason
    result = linear(x, weight, scale, zero_point, activations="int8")
    assert sqnr(exact(x, weight, scale, zero_point), result.double()) > 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    weight, scale, zero_point = (tensor.cuda() for tensor in codes(96, 640))
    x = torch.randn(40, 640, device="cuda", dtype=torch.bfloat16)
    result = linear(x, weight, scale, zero_point, activations="int8")
    assert sqnr(exact(x, weight, scale, zero_point), result.double()) > 35
