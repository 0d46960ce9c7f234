"""Modules whose own attributes are called as those of quantized modules: they work, or stay float for that reason."""

import copy

import pytest
import torch
from torch import nn

from mono_quant_hf import quantize_model
from mono_quant_hf.modules import QuantizedModule, quantized_class_for
from tests.tiny_models import relative_error

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


class Named(nn.Linear):
    """Computes with attributes of its own, of any name."""

    def __init__(self, name, value):
        super().__init__(16, 8)
        setattr(self, name, value)
        self.name = name

    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias) * getattr(self, self.name)


@pytest.mark.parametrize(
    "name",
    ["weights", "symmetric", "activations", "module_name", "float_class", "scale", "dtype", "zero_point"],
)
def test_names_that_are_free(name):
    torch.manual_seed(0)
    model = nn.Sequential(Named(name, 3.0), nn.Linear(8, 8))
    expected, weight = model(X), model[0].weight.detach()
    quantize_model(model)
    assert isinstance(model[0], QuantizedModule) and getattr(model[0], name) == 3.0
    assert relative_error(model(X), expected) < 0.02
    again = model[0].to_float()
    assert getattr(again, name) == 3.0 and relative_error(again.weight, weight) < 0.01


def tensor():
    return torch.full((8,), 3.0)


@pytest.mark.parametrize("kind", ["attribute", "parameter", "buffer", "module", "method"])
@pytest.mark.parametrize(
    "name",
    [
        "quantization",
        "weight_scale",
        "weight_zero_point",
        "weight_int8",
        "weight_float16",
        "weight_dtype",
        "stored",
        "dequantized",
        "weight_axes",
    ],
)
def test_names_that_are_needed(name, kind):
    class Own(nn.Linear):
        if kind == "method":
            locals()[name] = property(lambda self: tensor())

        def forward(self, input):
            return nn.functional.linear(input, self.weight, self.bias) * self.factor()

        def factor(self):
            own = getattr(self, name)
            return own.bias if isinstance(own, nn.Linear) else own

    torch.manual_seed(0)
    model = nn.Sequential(Own(16, 8), nn.Linear(8, 8))
    if kind == "attribute":
        vars(model[0])[name] = tensor()
    elif kind == "parameter":
        model[0].register_parameter(name, nn.Parameter(tensor()))
    elif kind == "buffer":
        model[0].register_buffer(name, tensor())
    elif kind == "module":
        model[0].register_module(name, nn.Linear(2, 8))
    expected = model(X)
    float_layer, form = copy.deepcopy(model[0]), quantized_class_for(model[0])
    assert form is not None and form.refuses(model[0]) == f"it has a {name!r} of its own"
    quantize_model(model)
    assert type(model[0]) is Own and torch.equal(model[0](X), float_layer(X))
    assert relative_error(model(X), expected) < 0.02


class Mixture(nn.Module):
    """Experts of two weights, the second of which is called as the scale of the first."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 16, 16) / 4)
        self.up_scale = nn.Parameter(torch.randn(2, 8, 16) / 4)

    def forward(self, x):
        return sum(
            nn.functional.linear(nn.functional.linear(x, self.up[i]), self.up_scale[i]) for i in range(2)
        )


def test_experts_whose_weights_are_called_as_scales():
    model = nn.Sequential(Mixture(), nn.Linear(8, 8))
    before = model[0](X)
    quantize_model(model)
    assert type(model[0]) is Mixture and torch.equal(model[0](X), before)
    assert isinstance(model[1], QuantizedModule)
