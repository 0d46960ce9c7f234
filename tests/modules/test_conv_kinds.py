"""Convolutions of one and three dimensions, and transposed ones; test_conv.py has the geometries of Conv2d."""

import pytest
import torch
from torch import nn

from mono_quant_hf.modules import quantized_class_for

from .settings import COMPUTE, SETTINGS, SURVIVALS, TOLERANCES, check_storage_survives, float_twin

# module class, its arguments, shape of an input, axis of the scales
KINDS = {
    "conv1d": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}, (4, 11), 0),
    "conv1d depthwise": (nn.Conv1d, {"kernel_size": 4, "groups": 4, "padding": 3}, (4, 9), 0),
    "conv1d reflect": (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}, (4, 9), 0),
    "conv1d same": (
        nn.Conv1d,
        {"kernel_size": 3, "padding": "same", "dilation": 2, "bias": False},
        (4, 9),
        0,
    ),
    "conv3d": (nn.Conv3d, {"kernel_size": (2, 3, 3), "stride": (2, 1, 1)}, (4, 4, 6, 5), 0),
    "conv3d groups": (nn.Conv3d, {"kernel_size": 2, "groups": 2, "padding": 1}, (4, 3, 4, 4), 0),
    "conv3d replicate": (
        nn.Conv3d,
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
        (4, 3, 4, 4),
        0,
    ),
    "transposed 1d": (nn.ConvTranspose1d, {"kernel_size": 4, "stride": 2, "padding": 1}, (4, 7), 1),
    "transposed 1d no bias": (
        nn.ConvTranspose1d,
        {"kernel_size": 3, "bias": False, "dilation": 2},
        (4, 7),
        1,
    ),
    "transposed 2d": (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "output_padding": 1}, (4, 5, 6), 1),
    "transposed 2d groups": (nn.ConvTranspose2d, {"kernel_size": (2, 3), "groups": 2}, (4, 5, 6), 1),
    "transposed 2d depthwise": (
        nn.ConvTranspose2d,
        {"kernel_size": 4, "groups": 4, "stride": 2},
        (4, 5, 6),
        1,
    ),
    "transposed 3d": (nn.ConvTranspose3d, {"kernel_size": 2, "stride": 2}, (4, 3, 3, 3), 1),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    cls, arguments, shape, axis = KINDS[kind]
    return cls(4, 8, **arguments).to(dtype), torch.randn(2, *shape).to(dtype), axis


def quantize(module, weights, symmetric, name=None):
    return quantized_class_for(module).from_float(module, weights, symmetric, name)


@SETTINGS
@EACH_KIND
@COMPUTE
def test_result_is_float_arithmetic_on_the_dequantized_weight(kind, weights, symmetric, compute):
    module, x, axis = make(kind, compute)
    quantized = quantize(module, weights, symmetric)
    assert isinstance(quantized, type(module))
    expected = float_twin(module, {"weight": axis}, weights, symmetric)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = quantized(x)
        assert y.dtype == compute
        tolerance = TOLERANCES[compute]
        torch.testing.assert_close(y.double(), expected(x.double()), rtol=tolerance, atol=tolerance)
    unbatched = quantized(x[0])
    torch.testing.assert_close(unbatched.double(), y[0].double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "transposed 1d", "transposed 2d groups"])
@SETTINGS
def test_storage(kind, weights, symmetric):
    module, _, axis = make(kind)
    quantized = quantize(module, weights, symmetric)
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in quantized.state_dict().items()}
    shape = tuple(module.weight.shape)
    channels = tuple(size if dim == axis else 1 for dim, size in enumerate(shape))
    expected = {"bias": (torch.float32, (8,))}
    expected[f"weight_{weights}"] = (torch.float16 if weights == "float16" else torch.int8, shape)
    if weights == "int8":
        expected["weight_scale"] = (torch.float32, channels)
        if not symmetric:
            expected["weight_zero_point"] = (torch.int8, channels)
    assert stored == expected


@pytest.mark.parametrize("kind", ["conv1d", "conv3d groups", "transposed 1d", "transposed 2d"])
def test_gradients_are_those_of_the_dequantized_weight(kind):
    module, x, _ = make(kind)
    quantized = quantize(module, "int8", False)
    x.requires_grad_()
    quantized(x).square().sum().backward()
    reference, x_reference = quantized.to_float(), x.detach().clone().requires_grad_()
    reference(x_reference).square().sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantized.bias.grad, reference.bias.grad, rtol=1e-4, atol=1e-4)
    assert type(reference) is type(module)


@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "transposed 2d"])
@SETTINGS
@SURVIVALS
def test_nothing_is_lost(kind, weights, symmetric, survive):
    module, x, _ = make(kind)
    shape = module(x).shape
    quantized = quantize(module, weights, symmetric)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    survivor = survive(quantized)
    check_storage_survives(quantized, survivor, before)
    assert survivor(x).shape == shape


@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "transposed 1d"])
@SETTINGS
def test_state_dict_round_trip_is_bit_identical(kind, weights, symmetric):
    module, x, _ = make(kind)
    source = quantize(module, weights, symmetric)
    target = quantize(type(module)(4, 8, **KINDS[kind][1]), weights, symmetric)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


def test_output_size_of_a_transposed_convolution_is_honoured():
    module = nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1)
    x = torch.randn(1, 4, 5, 5)
    assert (
        quantize(module, "int8", False)(x, output_size=[10, 10]).shape
        == module(x, output_size=[10, 10]).shape
    )


@EACH_KIND
def test_an_integer_input_is_one_clear_error(kind):
    module, x, _ = make(kind)
    with pytest.raises(TypeError, match="floating-point input of stem, got int8"):
        quantize(module, "int8", False, name="stem")(x.to(torch.int8))


def test_repr_keeps_the_arguments():
    text = repr(quantize(nn.ConvTranspose1d(4, 8, 3, stride=2), "int8", True))
    assert text == "QuantizedConvTranspose1d(4, 8, kernel_size=(3,), stride=(2,), weights=int8, symmetric)"
