import copy
import functools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.modules import QuantizedLinear, QuantizedModule
from tests import tiny_models
from tests.tiny_models import logits, relative_error

CONFIGS = [MonoQuantConfig(), MonoQuantConfig(symmetric=True), MonoQuantConfig(weights="float16")]


class Plain(nn.Module):
    """A model that never saw the Hub."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 10), nn.ReLU(), nn.Linear(10, 2))
        self.norm = nn.LayerNorm(2)

    def forward(self, x):
        return self.norm(self.head(self.conv(x)))


@pytest.mark.parametrize("config", CONFIGS, ids=["int8", "int8 symmetric", "float16"])
def test_any_module_is_quantized_in_place(config):
    torch.manual_seed(0)
    model, x = Plain().eval(), torch.randn(4, 3, 4, 4)
    expected = model(x)
    assert quantize_model(model, config) is model
    assert isinstance(model.conv, QuantizedModule) and isinstance(model.head[1], QuantizedLinear)
    assert relative_error(model(x), expected) < 0.05
    restored = Plain()
    quantize_model(restored, config)
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored.eval()(x), model(x))


def test_a_single_layer_is_quantized_itself():
    layer = nn.Linear(4, 4)
    assert quantize_model(layer) is layer and isinstance(layer, QuantizedLinear)


def test_whoever_holds_a_module_holds_the_quantized_one():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
            self.in_list, self.in_dict = [self.one], {"other": self.other}
            self.in_tuple, self.in_partial = (self.one,), functools.partial(self.other)
            self.in_closure = lambda x: self.one(x)

        def forward(self, x):
            for run in (self.in_list[0], self.in_dict["other"], self.in_tuple[0], self.in_partial):
                x = x + run(x) / 4
            return self.in_closure(x)

    torch.manual_seed(0)
    model, x = Holder(), torch.randn(3, 8)
    expected = model(x)
    quantize_model(model)
    assert isinstance(model.in_list[0], QuantizedLinear) and model.in_list[0] is model.one
    assert 0 < relative_error(model(x), expected) < 0.05


@pytest.mark.parametrize("config", CONFIGS, ids=["int8", "int8 symmetric", "float16"])
@pytest.mark.parametrize(
    ("family", "auto_class"), [("llama", AutoModelForCausalLM), ("vit", AutoModelForImageClassification)]
)
def test_it_gives_what_from_pretrained_gives_and_saves(family, auto_class, config, tmp_path):
    model = getattr(tiny_models, family)()
    model.save_pretrained(tmp_path / "float")
    loaded = auto_class.from_pretrained(tmp_path / "float", quantization_config=config)
    quantize_model(model, config)
    assert torch.equal(logits(model), logits(loaded)) and model.is_quantized
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(auto_class.from_pretrained(tmp_path / "quantized")), logits(loaded))
    assert not [m for m in model.dequantize().modules() if isinstance(m, QuantizedModule)]


def test_a_module_with_two_names_is_one_quantized_module():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    quantize_model(model)
    assert model[0] is model[2] and isinstance(model[0], QuantizedLinear)


def test_two_modules_that_share_a_weight_stay_float_and_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    quantize_model(model)
    assert model[0].weight is model[2].weight and isinstance(model[1], QuantizedLinear)


def test_multihead_attention_still_works():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
    x = torch.randn(2, 3, 8)
    expected = model(x)
    quantize_model(model)
    for module in (model.linear1, model.self_attn, model.self_attn.out_proj):
        assert isinstance(module, QuantizedModule)
    assert relative_error(model.train()(x), expected) < 0.05
    with torch.no_grad():  # where torch takes its fast path
        assert relative_error(model.eval()(x), expected) < 0.05


@pytest.mark.parametrize(
    ("value", "config", "words"),
    [
        (
            float("nan"),
            MonoQuantConfig(),
            r"model\.layers\.1\.mlp\.down_proj\.weight cannot be quantized.*1 NaN",
        ),
        (float("inf"), MonoQuantConfig(symmetric=True), r"layers\.1\.mlp\.down_proj\.weight.*1 infinite"),
        (70000.0, MonoQuantConfig(weights="float16"), r"layers\.1\.mlp\.down_proj\.weight.*65504.*int8"),
    ],
)
def test_a_bad_weight_is_named_and_nothing_is_left_half_done(value, config, words, tmp_path):
    model = tiny_models.llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 2] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        quantize_model(model, config)
    assert not [m for m in model.modules() if isinstance(m, QuantizedModule)] and not hasattr(
        model, "hf_quantizer"
    )
    assert all(torch.equal(t, before[n]) or t.isnan().any() for n, t in model.state_dict().items())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize(
    ("model", "config", "error", "words"),
    [
        (lambda: "model", None, TypeError, "not on str"),
        (lambda: nn.Linear(2, 2), {"weights": "int8"}, TypeError, "MonoQuantConfig, not dict"),
        (lambda: quantize_model(nn.Sequential(nn.Linear(2, 2))), None, ValueError, "quantized already"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2, device="meta")),
            None,
            ValueError,
            "offloaded.*from_pretrained",
        ),
    ],
)
def test_bad_input_is_one_clear_error(model, config, error, words):
    with pytest.raises(error, match=words):
        quantize_model(model(), config)


def test_an_offloaded_model_is_refused_with_the_remedy(tmp_path):
    from accelerate import disk_offload

    model = disk_offload(tiny_models.llama(), tmp_path)
    with pytest.raises(ValueError, match=r"offloaded.*device_map"):
        quantize_model(model)
