"""Kinds of modules that need no class of their own: attention, bilinear, weights that other parameters make."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from mono_quant_hf import quantize_model
from mono_quant_hf.modules import QuantizedModule, quantized_class_for, register_weights
from tests.tiny_models import relative_error

from .settings import COMPUTE, SETTINGS, SURVIVALS, check_storage_survives


def quantize(module, weights="int8", symmetric=False):
    return quantized_class_for(module).from_float(module, weights, symmetric, "mixer")


def x(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# ---------------------------------------------------------------- attention

ATTENTION = {
    "one width": lambda: nn.MultiheadAttention(16, 4, batch_first=True),
    "three widths": lambda: nn.MultiheadAttention(16, 4, kdim=12, vdim=10, batch_first=True),
    "bias for key and value": lambda: nn.MultiheadAttention(16, 4, add_bias_kv=True, batch_first=True),
    "no bias": lambda: nn.MultiheadAttention(16, 4, bias=False, batch_first=True),
}


def attended(module, dtype, **kwargs):
    query, key, value = x(2, 5, 16), x(2, 7, module.kdim), x(2, 7, module.vdim)
    mask = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    return module(*(t.to(dtype) for t in (query, key, value)), key_padding_mask=mask, **kwargs)[0]


@SETTINGS
@pytest.mark.parametrize("kind", ATTENTION)
@COMPUTE
def test_attention(kind, weights, symmetric, compute):
    torch.manual_seed(0)
    module = quantize_in_place(ATTENTION[kind]().to(compute).eval(), weights, symmetric)
    names = set(module.weight_axes)
    assert names == ({"in_proj_weight"} if kind != "three widths" else {f"{n}_proj_weight" for n in "qkv"})
    assert isinstance(module.out_proj, QuantizedModule)
    exact = float_of(module)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}[compute]
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            for need_weights in (True, False):
                y = attended(module, compute, need_weights=need_weights)
                assert y.dtype == compute
                assert relative_error(y, attended(exact, torch.float64)) < tolerance


def quantize_in_place(module, weights="int8", symmetric=False):
    for part in list(module.modules()):
        quantized_class = quantized_class_for(part)
        if quantized_class is not None:
            quantized_class.quantize(part, weights, symmetric)
    return module


def float_of(module):
    twin = copy.deepcopy(module)
    for part in list(twin.modules()):
        if isinstance(part, QuantizedModule):
            part.dequantize(torch.float32)
    return twin.double()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0), 2, enable_nested_tensor=True
        ),
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        ),
    ],
    ids=["post-norm", "pre-norm"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_encoder_with_its_fast_path(make, mode):
    torch.manual_seed(0)
    module = quantize_in_place(make().eval())
    exact = float_of(module).float()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with mode():
        found = module(x(2, 5, 16), src_key_padding_mask=mask)
        expected = exact(x(2, 5, 16), src_key_padding_mask=mask)
    assert relative_error(found[~mask], expected[~mask]) < 1e-4


def test_decoder():
    torch.manual_seed(0)
    module = quantize_in_place(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True).eval())
    exact = float_of(module).float()
    assert sum(isinstance(part, QuantizedModule) for part in module.modules()) == 6
    assert relative_error(module(x(2, 5, 16), x(2, 7, 16)), exact(x(2, 5, 16), x(2, 7, 16))) < 1e-4


# ---------------------------------------------------------------- bilinear


@SETTINGS
@COMPUTE
def test_bilinear(weights, symmetric, compute):
    torch.manual_seed(0)
    module = nn.Bilinear(6, 8, 5).to(compute)
    quantized = quantize(module, weights, symmetric)
    assert quantized.stored()[0].shape == (5, 6, 8)
    assert weights == "float16" or quantized.weight_scale.shape == (5, 1, 1)
    inputs = x(3, 6, dtype=compute), x(3, 8, dtype=compute)
    y = quantized(*inputs)
    assert y.dtype == compute
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[compute]
    exact = quantized.to_float(torch.float32).double()
    assert relative_error(y, exact(*(t.double() for t in inputs))) < tolerance


# ---------------------------------------------------------------- weights that other parameters make


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def halved(module):
    return parametrize.register_parametrization(module, "weight", Halved())


def weight_norm_of_old(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(module)


MADE = {
    "weight norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "weight norm of old": (weight_norm_of_old, "weight_v"),
    "a parametrization": (halved, "parametrizations.weight.original"),
}


@SETTINGS
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize(
    "layer", [lambda: nn.Conv1d(6, 8, 3), lambda: nn.Linear(6, 8)], ids=["conv1d", "linear"]
)
@torch.no_grad()
def test_the_direction_of_a_weight_is_quantized(made, layer, weights, symmetric):
    torch.manual_seed(0)
    make, name = MADE[made]
    model = nn.Sequential(make(layer()))
    inputs = x(2, 6, 9) if isinstance(model[0], nn.Conv1d) else x(2, 6)
    before = model(inputs)
    quantize_in_place(model, weights, symmetric)
    stored = dict(model[0].named_parameters())
    assert stored[f"{name}_{weights}"].dtype == (torch.int8 if weights == "int8" else torch.float16)
    assert name not in stored
    for magnitude in ("weight_g", "parametrizations.weight.original0"):
        assert magnitude not in stored or stored[magnitude].dtype == torch.float32
    found = model(inputs)
    assert 0 < relative_error(found, before) < 0.02
    assert relative_error(found, float_of(model).float()(inputs)) < 1e-5
    again = nn.Sequential(make(layer()))
    quantize_in_place(again, weights, symmetric)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(inputs), found)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)) if made == "weight norm of old" else model,
    ):
        assert torch.equal(copied(inputs), found)


def test_a_removed_weight_norm_leaves_a_float_weight():
    torch.manual_seed(0)
    model = quantize_in_place(nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8))))
    before = model(x(2, 6))
    parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model(x(2, 6)), before) and type(model[0].weight) is nn.Parameter


# ---------------------------------------------------------------- classes of one's own


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8, 16))
        self.table = nn.Parameter(torch.randn(4, 16))

    def forward(self, y):
        return torch.relu(y @ self.up) @ self.down.T + self.table[:1, :8]


@pytest.fixture
def registered():
    from mono_quant_hf.modules.registry import WEIGHT_AXES

    register_weights(Mixer, {"up": 1, "down": 0})
    yield
    del WEIGHT_AXES[Mixer]


@SETTINGS
def test_weights_of_a_class_of_ones_own(weights, symmetric, registered):
    class Inherited(Mixer):
        pass

    torch.manual_seed(0)
    for module in (Mixer(), Inherited()):
        quantized = quantize(module, weights, symmetric)
        assert isinstance(quantized, Mixer) and quantized.weight_axes == {"up": 1, "down": 0}
        assert {name for name, p in quantized.named_parameters() if p.requires_grad} == {"table"}
        if weights == "int8":
            assert (quantized.up_scale.shape, quantized.down_scale.shape) == ((1, 16), (8, 1))
        assert relative_error(quantized(x(3, 8)), quantized.to_float()(x(3, 8))) < 1e-5
        assert relative_error(quantized(x(3, 8)), module(x(3, 8))) < 0.02


@SURVIVALS
def test_nothing_of_it_is_lost(survive, registered):
    quantized = quantize(Mixer())
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    check_storage_survives(quantized, survive(quantized), before)


def test_without_registering_it_stays_float():
    model = quantize_model(nn.Sequential(Mixer(), nn.Linear(8, 8)))
    assert type(model[0]) is Mixer
