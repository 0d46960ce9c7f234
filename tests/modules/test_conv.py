import copy

import pytest
import torch
from torch import nn

from mono_quant_hf.core import dequantize_codes, quantize_to_codes
from mono_quant_hf.modules import FloatView, quantize_conv2d_module, quantized_class_for

SETTINGS = pytest.mark.parametrize(
    ("dtype", "symmetric"), [(torch.qint8, False), (torch.qint8, True), (torch.float16, False)]
)
GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "bias": False},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"groups": 4, "padding": 1},  # depthwise
    {"padding": "same"},
    {"padding": "same", "dilation": 3},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (2, 1), "padding_mode": "replicate", "stride": 2},
    {"padding": 2, "padding_mode": "circular", "dilation": 2},
    {"padding": "same", "padding_mode": "circular"},
]


def float_twin(module, dtype, symmetric):
    """The module with the weight that the codes of core stand for: what the quantized one must compute."""
    twin = copy.deepcopy(module)
    weight = module.weight.detach()
    weight = (
        weight.half() if dtype is torch.float16 else dequantize_codes(*quantize_to_codes(weight, symmetric))
    )
    twin.weight.data = weight
    return twin.double()


@SETTINGS
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_every_geometry(geometry, dtype, symmetric):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 8, (3, 2), **geometry)
    quantized = quantize_conv2d_module(module, dtype, symmetric)
    assert isinstance(quantized, nn.Conv2d)
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "in_channels"):
        assert getattr(quantized, name) == getattr(module, name)
    x = torch.randn(2, 4, 11, 9)
    expected = float_twin(module, dtype, symmetric)
    torch.testing.assert_close(quantized(x).double(), expected(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantized(x[0]).double(), expected(x[0].double()), rtol=1e-5, atol=1e-5)


@SETTINGS
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_has_the_dtype_of_the_input(compute, autocast, dtype, symmetric):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 8, 3, padding=1).to(compute)
    quantized = quantize_conv2d_module(module, dtype, symmetric)
    x = torch.randn(1, 4, 6, 6).to(compute)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = quantized(x)
    assert y.dtype == compute
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[compute]
    expected = float_twin(module, dtype, symmetric)(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("symmetric", [True, False])
def test_storage_is_what_the_format_says(symmetric):
    quantized = quantize_conv2d_module(nn.Conv2d(4, 8, 3), symmetric=symmetric)
    quantized(torch.randn(1, 4, 5, 5))
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in quantized.state_dict().items()}
    expected = {
        "weight_int8": (torch.int8, (8, 4, 3, 3)),
        "weight_scale": (torch.float32, (8, 1, 1, 1)),
        "bias": (torch.float32, (8,)),
    }
    if not symmetric:
        expected["weight_zero_point"] = (torch.int8, (8, 1, 1, 1))
    assert stored == expected


@pytest.mark.parametrize(
    "geometry", [{"padding": 1, "stride": 2}, {"groups": 4}, {"padding": "same", "dilation": 2}]
)
def test_gradients_are_those_of_the_dequantized_weight_and_it_is_not_kept(geometry):
    quantized = quantize_conv2d_module(nn.Conv2d(4, 8, 3, **geometry))
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = quantized(x)
    floats = [t for t in kept if t.is_floating_point() and not isinstance(t, FloatView)]
    assert floats and not [t for t in floats if t.shape == quantized.weight.shape]
    y.square().sum().backward()
    reference, x_reference = quantized.to_float(), x.detach().clone().requires_grad_()
    reference(x_reference).square().sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantized.bias.grad, reference.bias.grad, rtol=1e-4, atol=1e-4)


def test_repr_keeps_the_arguments_and_says_the_format():
    text = repr(quantize_conv2d_module(nn.Conv2d(4, 8, 3, stride=2), symmetric=True))
    assert "4, 8, kernel_size=(3, 3), stride=(2, 2), weights=int8, symmetric" in text


def test_bad_input_is_one_clear_error():
    with pytest.raises(TypeError, match="Linear"):
        quantize_conv2d_module(nn.Linear(2, 2))
    conv = nn.Conv2d(3, 4, 1)
    quantized = quantized_class_for(conv).from_float(conv, "int8", False, name="model.stem")
    with pytest.raises(TypeError, match=r"floating-point input of model\.stem, got int8"):
        quantized(torch.ones(1, 3, 2, 2, dtype=torch.int8))


def test_another_module_of_its_class_is_a_float_one():
    made = type(quantize_conv2d_module(nn.Conv2d(3, 4, 1)))(4, 2, 3, padding=1)
    assert type(made) is nn.Conv2d and made.weight.shape == (2, 4, 3, 3)
