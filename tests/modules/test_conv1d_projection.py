import pytest
import torch
from transformers.pytorch_utils import Conv1D

from mono_quant_hf.modules import QuantizedConv1DProjection, quantized_class_for

from .settings import COMPUTE, SETTINGS, SURVIVALS, TOLERANCES, check_storage_survives, float_twin


def make(dtype=torch.float32):
    torch.manual_seed(0)
    module = Conv1D(7, 20)
    module.bias.data = torch.randn(7)
    return module.to(dtype)


def quantize(weights, symmetric, dtype=torch.float32):
    return QuantizedConv1DProjection.from_float(make(dtype), weights, symmetric, name="c_fc")


@SETTINGS
@COMPUTE
@pytest.mark.parametrize("autocast", [False, True])
def test_result_is_float_arithmetic_with_a_scale_per_output_feature(weights, symmetric, compute, autocast):
    quantized = quantize(weights, symmetric, compute)
    assert isinstance(quantized, Conv1D) and quantized_class_for(make()) is QuantizedConv1DProjection
    x = torch.randn(2, 3, 20).to(compute)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = quantized(x)
    expected = float_twin(make(compute), {"weight": 1}, weights, symmetric)(x.double())
    assert y.dtype == compute
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCES[compute], atol=TOLERANCES[compute])


def test_storage_is_shaped_as_the_float_weight():
    stored = {name: (t.dtype, tuple(t.shape)) for name, t in quantize("int8", False).state_dict().items()}
    assert stored == {
        "weight_int8": (torch.int8, (20, 7)),
        "weight_scale": (torch.float32, (1, 7)),
        "weight_zero_point": (torch.int8, (1, 7)),
        "bias": (torch.float32, (7,)),
    }


@SETTINGS
def test_gradients_are_those_of_the_dequantized_weight_and_it_is_not_kept(weights, symmetric):
    quantized = quantize(weights, symmetric)
    x = torch.randn(3, 20, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = quantized(x)
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() == quantized.weight.numel()]
    y.square().sum().backward()
    reference, x_reference = quantized.to_float(), x.detach().clone().requires_grad_()
    reference(x_reference).square().sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantized.bias.grad, reference.bias.grad, rtol=1e-4, atol=1e-4)


@SETTINGS
@SURVIVALS
def test_nothing_is_lost(weights, symmetric, survive):
    quantized = quantize(weights, symmetric)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    check_storage_survives(quantized, survive(quantized), before)


@SETTINGS
def test_state_dict_round_trip_is_bit_identical(weights, symmetric):
    source = quantize(weights, symmetric)
    target = QuantizedConv1DProjection.from_float(Conv1D(7, 20), weights, symmetric)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(target(x), source(x))


def test_repr_and_integer_input():
    assert repr(quantize("int8", True)) == "QuantizedConv1DProjection(nf=7, nx=20, weights=int8, symmetric)"
    with pytest.raises(TypeError, match="floating-point input of c_fc, got int8"):
        quantize("int8", True)(torch.ones(1, 20, dtype=torch.int8))
