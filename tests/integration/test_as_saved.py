"""What is saved is what the config beside it says, whichever way the model came to be quantized."""

import copy
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    VisionEncoderDecoderModel,
    ViTModel,
)

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.integration.by_version import LOADER_CHECKS_SHAPES
from mono_quant_hf.modules import QuantizedModule, quantize_linear_module
from tests import tiny_models
from tests.tiny_models import logits

UP = "model.layers.0.mlp.up_proj"
needs_shape_check = pytest.mark.skipif(
    not LOADER_CHECKS_SHAPES, reason="the loader of this transformers checks no shapes of quantized models"
)
CONFIGS = {
    "int8": MonoQuantConfig(),
    "symmetric": MonoQuantConfig(symmetric=True),
    "float16": MonoQuantConfig(weights="float16"),
    "embeddings": MonoQuantConfig(quantize_embeddings=True),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def settings_in(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def kinds_of(model):
    return {
        name: module.quantization if isinstance(module, QuantizedModule) else type(module)
        for name, module in model.named_modules()
    }


def assert_reloads(model, folder, run=logits):
    """With checksums, without them, and when the loaded one is saved again."""
    model.save_pretrained(folder / "saved")
    expected = run(model)
    loaded = type(model).from_pretrained(folder / "saved")
    assert torch.equal(run(loaded), expected)
    assert list(kinds_of(loaded)) == list(kinds_of(model))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    loaded.save_pretrained(folder / "again")
    assert torch.equal(run(type(model).from_pretrained(folder / "again")), expected)
    content = json.loads((folder / "saved" / "config.json").read_text())
    content.get("quantization_config", {}).pop("checksums", None)
    (folder / "saved" / "config.json").write_text(json.dumps(content))
    assert torch.equal(run(type(model).from_pretrained(folder / "saved")), expected)
    return loaded


# A float model with the config of a quantized one


@pytest.mark.parametrize("how", ["of the folder", "of the model", "by its class"])
def test_a_float_model_made_with_the_config_of_a_quantized_one(how, config, tmp_path):
    quantized = quantize_model(tiny_models.llama(), config)
    quantized.save_pretrained(tmp_path / "int8")
    of_model = AutoConfig.from_pretrained(tmp_path / "int8") if how == "of the folder" else quantized.config
    make = LlamaForCausalLM if how == "by its class" else AutoModelForCausalLM.from_config
    made = make(of_model).eval()
    loaded = assert_reloads(made, tmp_path)
    assert settings_in(tmp_path / "saved") is None and not hasattr(loaded, "hf_quantizer")
    quantized.save_pretrained(tmp_path / "once more")
    assert settings_in(tmp_path / "once more") == settings_in(tmp_path / "int8")


@pytest.mark.parametrize("way", ["copied", "passed"])
def test_float_files_beside_the_config_of_a_quantized_model(way, config, tmp_path, caplog):
    quantize_model(tiny_models.llama(), config).save_pretrained(tmp_path / "int8")
    model, kwargs = tiny_models.llama(), {}
    model.save_pretrained(tmp_path / "float")
    if way == "copied":
        shutil.copy(tmp_path / "int8" / "config.json", tmp_path / "float")
    else:
        kwargs = {"config": AutoConfig.from_pretrained(tmp_path / "int8")}
    with caplog.at_level(logging.WARNING, "mono_quant_hf"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **kwargs)
    assert "holds float weights only" in caplog.text
    assert torch.equal(logits(loaded), logits(model)) and not hasattr(loaded, "hf_quantizer")
    assert_reloads(loaded, tmp_path)
    assert settings_in(tmp_path / "saved") is None


def test_the_config_of_a_quantized_model_loads_others(config, tmp_path):
    one, other = (quantize_model(tiny_models.llama(), config) for _ in range(2))
    other.model.norm.weight.data.mul_(2)
    for name, model in (("one", one), ("other", other)):
        model.save_pretrained(tmp_path / name)
    for of in (one, AutoModelForCausalLM.from_pretrained(tmp_path / "one")):
        for name, model in (("one", one), ("other", other)):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, config=of.config)
            assert torch.equal(logits(loaded), logits(model))
            assert of.config.quantization_config.checksums is None


# Modules that are not what the config says


def swap(model, name, new):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


@pytest.mark.parametrize("name", [UP, "lm_head", "model.layers.1.self_attn.k_proj"])
@pytest.mark.parametrize(
    "how", [(torch.qint8, False), (torch.qint8, True), (torch.float16, False), None], ids=str
)
def test_a_module_that_is_quantized_otherwise(name, how, config, tmp_path):
    if name == "lm_head" and config.quantize_embeddings:
        pytest.skip("a head that is not tied, beside a quantized table, is another model")
    model = quantize_model(tiny_models.llama(), config)
    layer = tiny_models.llama().get_submodule(name)
    swap(model, name, layer if how is None else quantize_linear_module(layer, *how))
    loaded = assert_reloads(model, tmp_path)
    new = loaded.get_submodule(name)
    assert isinstance(new, QuantizedModule) == (how is not None)
    if how == (torch.qint8, False) and (config.weights, config.symmetric) != ("int8", False):
        assert settings_in(tmp_path / "saved")["module_overrides"][name]["symmetric"] is False


# Quantized parts of a float model


@pytest.mark.parametrize("part", ["model.layers", "model.layers.1", "model.layers.0.mlp", "model"])
def test_a_part_of_a_float_model(part, config, tmp_path):
    model = copy.deepcopy(tiny_models.llama())
    quantize_model(model.get_submodule(part), config)
    assert_reloads(model, tmp_path)


def test_a_layer_of_a_float_model(tmp_path):
    model = tiny_models.llama()
    swap(model, UP, quantize_linear_module(model.get_submodule(UP), symmetric=True))
    assert_reloads(model, tmp_path)


@pytest.mark.parametrize("which", ["encoder", "decoder", "both"])
def test_a_composite_of_two_models(which, config, tmp_path):
    torch.manual_seed(0)
    encoder = ViTModel(tiny_models.vit().config, add_pooling_layer=True).eval()
    of_decoder = BertConfig(**tiny_models.bert().config.to_dict() | {"is_decoder": True})
    of_decoder.add_cross_attention = True
    decoder = BertLMHeadModel(of_decoder).eval()
    if which != "decoder":
        quantize_model(encoder, config)
    if which != "encoder":
        quantize_model(decoder, config)
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()

    def run(composite):
        with torch.no_grad():
            given = {"pixel_values": tiny_models.IMAGES, "decoder_input_ids": tiny_models.TOKENS}
            return composite(**given).logits

    assert_reloads(model, tmp_path, run)
    part = getattr(model, "encoder" if which != "decoder" else "decoder")
    part.save_pretrained(tmp_path / "part")
    again = type(part).from_pretrained(tmp_path / "part")
    pairs = zip(part.state_dict().items(), again.state_dict().items(), strict=True)
    assert all(one == other and torch.equal(a, b) for (one, a), (other, b) in pairs)


class Wrapper(PreTrainedModel):
    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config, inner=None):
        super().__init__(config)
        self.inner = AutoModelForCausalLM.from_config(config) if inner is None else inner
        self.scale = nn.Linear(1, 1)
        self.post_init()

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids)


@pytest.mark.parametrize("tied", [False, True])
def test_a_class_around_a_quantized_model(tied, config, tmp_path):
    inner = quantize_model(tiny_models.llama(tied=tied), config)
    model = Wrapper(inner.config, inner).eval()
    assert_reloads(model, tmp_path)
    assert_reloads(model.inner, tmp_path / "inner")


def test_a_module_around_a_transformers_model(config, tmp_path):
    around = nn.ModuleDict({"model": tiny_models.llama(), "head": nn.Linear(32, 4)})
    quantize_model(around, config)
    assert_reloads(around["model"], tmp_path)


def test_the_body_of_a_quantized_model_alone(config, tmp_path):
    model = quantize_model(tiny_models.llama(), config)
    model.save_pretrained(tmp_path / "whole")
    for whole in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "whole")):
        whole.model.save_pretrained(tmp_path / "body")
        body = type(whole.model).from_pretrained(tmp_path / "body")
        with torch.no_grad():
            one, other = (part(tiny_models.TOKENS).last_hidden_state for part in (whole.model, body))
        assert torch.equal(one, other)


def test_a_part_whose_model_is_gone_is_one_warning(caplog):
    layers = tiny_models.llama().model.layers
    with caplog.at_level(logging.WARNING, "mono_quant_hf"):
        quantize_model(layers)
    assert caplog.text.count("the transformers model that it is a part of was not found") == 1
    with caplog.at_level(logging.WARNING, "mono_quant_hf"):
        quantize_model(nn.Sequential(nn.Linear(8, 8)))
    assert caplog.text.count("was not found") == 1


# Heads for other labels


@needs_shape_check
def test_a_head_for_other_labels(tmp_path):
    tiny_models.bert(3).save_pretrained(tmp_path / "float")
    load = BertForSequenceClassification.from_pretrained
    config = MonoQuantConfig()
    load(tmp_path / "float", quantization_config=config).save_pretrained(tmp_path / "int8")
    for folder, kwargs in (("float", {"quantization_config": config}), ("int8", {})):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load(tmp_path / folder, num_labels=7, **kwargs)
        model = load(tmp_path / folder, num_labels=7, ignore_mismatched_sizes=True, **kwargs)
        assert type(model.classifier) is nn.Linear and model.classifier.weight.requires_grad
        assert 0 < float(model.classifier.weight.detach().std()) < 1
        assert isinstance(model.bert.pooler.dense, QuantizedModule)
        assert_reloads(model, tmp_path / f"from {folder}")


# The same decision in memory and on load


class Tied(PreTrainedModel):
    """A head and a mixture of experts that each share their weights with another."""

    config_class = LlamaConfig
    _tied_weights_keys = {"second.up": "first.up", "head.weight": "body.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = Experts(), Experts()
        self.body, self.head, self.last = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.post_init()

    def forward(self, x):
        return self.last(self.head(self.second(self.first(self.body(x)))))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 16, 16) / 4)

    def forward(self, x):
        return nn.functional.linear(x, self.up[0]) + nn.functional.linear(x, self.up[1])


def test_what_is_tied_is_decided_alike_in_memory_and_on_load(config, tmp_path):
    torch.manual_seed(0)
    model = Tied(LlamaConfig(tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "float")
    loaded = Tied.from_pretrained(tmp_path / "float", quantization_config=config)
    quantize_model(model, config)
    assert [d.to_dict() for d in loaded.hf_quantizer.decisions] == [
        d.to_dict() for d in model.hf_quantizer.decisions
    ]
    x = torch.randn(2, 16)
    assert torch.equal(loaded(x), model(x))
    assert_reloads(model, tmp_path, lambda tied: tied(x))


# What is added to the files


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(
    ("config", "tied", "added"),
    [
        (
            MonoQuantConfig(symmetric=True),
            False,
            {f"{UP}.weight_zero_point": torch.ones(88, 1).to(torch.int8)},
        ),
        (MonoQuantConfig(weights="float16"), False, {f"{UP}.weight_scale": torch.ones(88, 1)}),
        (MonoQuantConfig(), True, {"lm_head.weight": torch.ones(64, 32)}),
        (MonoQuantConfig(), False, {f"{UP}.weight": torch.ones(88, 32).half()}),
    ],
    ids=["a zero-point", "a scale", "a head", "codes in float16"],
)
def test_what_is_added_is_refused(config, tied, added, checksums, tmp_path):
    quantize_model(tiny_models.llama(tied=tied), config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | added, file, metadata={"format": "pt"})
    if not checksums:
        content = json.loads((tmp_path / "config.json").read_text())
        del content["quantization_config"]["checksums"]
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=next(iter(added)).replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path)
