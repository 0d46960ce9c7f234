import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear

from mono_quant_hf.modules import QuantizedLinear, QuantizedLinearVariant, quantized_class_for

from .settings import COMPUTE, SETTINGS, SURVIVALS, TOLERANCES, check_storage_survives, float_twin


class Rescaled(nn.Linear):
    def forward(self, input):
        weight = self.weight.to(input.dtype)
        return F.linear(input, weight, self.bias) * 0.5


class Clipped(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight.clamp(-1, 1), self.bias)


class Doubled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


EACH = pytest.mark.parametrize("cls", [FalconLinear, Rescaled])


def make(cls, dtype=torch.float32):
    torch.manual_seed(0)
    return cls(20, 7).to(dtype)


def quantize(module, weights="int8", symmetric=False):
    return quantized_class_for(module).from_float(module, weights, symmetric, "dense")


@EACH
@SETTINGS
@COMPUTE
def test_result_is_the_own_forward_on_the_dequantized_weight(cls, weights, symmetric, compute):
    quantized = quantize(make(cls, compute), weights, symmetric)
    assert isinstance(quantized, QuantizedLinearVariant) and isinstance(quantized, cls)
    x = torch.randn(2, 3, 20).to(compute)
    expected = float_twin(make(cls, compute), {"weight": 0}, weights, symmetric)(x.double())
    y = quantized(x)
    assert y.dtype == compute
    tolerance = max(TOLERANCES[compute], 1e-4)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@EACH
@SETTINGS
@SURVIVALS
def test_nothing_is_lost(cls, weights, symmetric, survive):
    quantized = quantize(make(cls), weights, symmetric)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    check_storage_survives(quantized, survive(quantized), before)


@EACH
def test_copy_gradient_and_way_back(cls):
    quantized = quantize(make(cls))
    x = torch.randn(3, 20, requires_grad=True)
    y = copy.deepcopy(quantized)(x)
    assert torch.equal(y, quantized(x))
    y.sum().backward()
    reference, x_reference = quantized.to_float(), x.detach().clone().requires_grad_()
    assert type(reference) is cls
    reference(x_reference).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-3, atol=1e-3)
    assert tuple(quantized.weight_scale.shape) == (7, 1)


@pytest.mark.parametrize("cls", [Clipped, Doubled])
def test_a_forward_that_does_more_with_the_weight_is_refused(cls):
    module = make(cls)
    assert quantized_class_for(module) is QuantizedLinear
    assert QuantizedLinear.refuses(module) == "its forward is not that of Linear"
