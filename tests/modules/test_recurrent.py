"""`nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells."""

import copy

import pytest
import torch
from torch import nn

from mono_quant_hf.modules import QuantizedModule, quantized_class_for

from .settings import COMPUTE, SETTINGS, SURVIVALS, check_storage_survives, float_twin

LAYERS = {
    "lstm": lambda: nn.LSTM(8, 12, num_layers=2, batch_first=True),
    "lstm, both directions": lambda: nn.LSTM(8, 12, bidirectional=True),
    "lstm, projected": lambda: nn.LSTM(8, 12, proj_size=5, bias=False),
    "gru": lambda: nn.GRU(8, 12, num_layers=2, bidirectional=True),
    "rnn": lambda: nn.RNN(8, 12, nonlinearity="relu"),
}
CELLS = {
    "lstm cell": lambda: nn.LSTMCell(8, 12),
    "gru cell": lambda: nn.GRUCell(8, 12),
    "rnn cell": lambda: nn.RNNCell(8, 12, bias=False),
}
KINDS = LAYERS | CELLS
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn((5, 8) if kind in CELLS else (5, 3, 8))
    return KINDS[kind]().to(dtype), x.to(dtype)


def quantize(module, weights="int8", symmetric=False):
    return quantized_class_for(module).from_float(module, weights, symmetric, "encoder.lstm")


def first(output):
    return output[0] if isinstance(output, tuple) else output


@SETTINGS
@EACH_KIND
@COMPUTE
def test_result_is_float_arithmetic_on_the_dequantized_weights(kind, weights, symmetric, compute):
    module, x = make(kind, compute)
    quantized = quantize(module, weights, symmetric)
    assert isinstance(quantized, QuantizedModule) and isinstance(quantized, type(module))
    weight_names = [name for name, _ in module.named_parameters() if name.startswith("weight")]
    assert list(quantized.weight_axes) == weight_names
    expected = float_twin(module, quantized.weight_axes, weights, symmetric)(x.double())
    y = first(quantized(x))
    assert y.dtype == compute
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[compute]
    torch.testing.assert_close(y.double(), first(expected), rtol=tolerance, atol=tolerance)


@SETTINGS
@EACH_KIND
def test_storage_has_a_scale_for_each_row_and_no_float_weight(kind, weights, symmetric):
    module, x = make(kind)
    quantized = quantize(module, weights, symmetric)
    quantized(x)
    for name in quantized.weight_axes:
        stored, scale, zero_point = quantized.stored(name)
        assert stored.shape == module.get_parameter(name).shape
        assert stored.dtype == (torch.int8 if weights == "int8" else torch.float16)
        if weights == "int8":
            assert scale.shape == (len(stored), 1) and (zero_point is None) == symmetric
        assert getattr(quantized, name).shape == stored.shape and name not in quantized.state_dict()
    floats = [name for name, p in quantized.named_parameters() if p.is_floating_point() and p.dim() > 1]
    assert [name for name in floats if not name.endswith(("_scale", "_float16"))] == []
    lists = [value for value in vars(quantized).values() if isinstance(value, list)]
    assert not [item for items in lists for item in items if isinstance(item, torch.Tensor)]


@EACH_KIND
def test_gradients_are_those_of_the_dequantized_weights(kind):
    module, x = make(kind)
    quantized = quantize(module)
    reference = quantized.to_float()
    gradients = []
    for either in (quantized, reference):
        y = x.clone().requires_grad_()
        first(either(y)).square().sum().backward()
        gradients.append(y.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@EACH_KIND
@SETTINGS
@SURVIVALS
def test_nothing_is_lost(kind, weights, symmetric, survive):
    module, x = make(kind)
    quantized = quantize(module, weights, symmetric)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    survivor = survive(quantized)
    check_storage_survives(quantized, survivor, before)
    assert first(survivor(x.to(survivor.quantization.dtype))).dtype == survivor.quantization.dtype


@EACH_KIND
def test_back_to_float_and_reloaded_state(kind):
    module, x = make(kind)
    source = quantize(module)
    expected = first(source(x))
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.data += 1
    target = quantize(other)
    target.load_state_dict(source.state_dict())
    assert torch.equal(first(target(x)), expected)
    restored = source.to_float()
    assert type(restored) is type(module) and restored.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(first(restored(x)), expected, rtol=1e-5, atol=1e-6)
    if kind in LAYERS:
        restored.flatten_parameters()
        nn.init.zeros_(restored.weight_ih_l0)  # what the loops run on is the parameter itself
        assert not torch.equal(first(restored(x)), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences(kind):
    module, x = make(kind)
    module.batch_first = False
    quantized = quantize(module)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 1]))
    torch.testing.assert_close(quantized(packed)[0].data, quantized.to_float()(packed)[0].data)


@pytest.mark.parametrize("kind", ["lstm", "gru cell"])
def test_compiled(kind):
    module, x = make(kind)
    quantized = quantize(module)
    with torch.no_grad():
        compiled = torch.compile(quantized, backend="aot_eager")(x)
    torch.testing.assert_close(first(compiled), first(quantized(x)), rtol=1e-4, atol=1e-5)
