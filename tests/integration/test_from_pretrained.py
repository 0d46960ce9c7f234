import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.core import dequantize_codes, quantize_to_codes
from mono_quant_hf.modules import QuantizedLinear, QuantizedModule
from tests import tiny_models
from tests.tiny_models import logits, relative_error

from .families import FAMILIES

AUTO_CLASSES = {
    "llama": AutoModelForCausalLM,
    "bert": AutoModelForSequenceClassification,
    "resnet": AutoModelForImageClassification,
    "vit": AutoModelForImageClassification,
}
CONFIGS = pytest.mark.parametrize(
    "config",
    [MonoQuantConfig(), MonoQuantConfig(symmetric=True), MonoQuantConfig(weights="float16")],
    ids=["int8", "int8 symmetric", "float16"],
)
# The CPU kernels round each input of an int8 layer to about 80 dB (60 at least). Half floats round coarser.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def float_folders(tmp_path_factory):
    folders = {}
    for family in AUTO_CLASSES:
        folders[family] = tmp_path_factory.mktemp(family)
        getattr(tiny_models, family)().save_pretrained(folders[family])
    return folders


def quantized(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def dequantized_by_hand(float_model, quantized_model):
    """The float model with each quantized weight replaced by what core's codes stand for."""
    for name, module in quantized(quantized_model).items():
        weight = float_model.get_submodule(name).weight
        if module.quantization.weights == "float16":
            weight.data = weight.data.half().to(weight.dtype)
        else:
            weight.data = dequantize_codes(
                *quantize_to_codes(weight.data.float(), module.quantization.symmetric)
            ).to(weight.dtype)
    return float_model


@pytest.mark.parametrize("family", AUTO_CLASSES)
@CONFIGS
@DTYPES
def test_quantize_on_load_save_and_reload(family, config, dtype, float_folders, tmp_path):
    auto_class, source = AUTO_CLASSES[family], float_folders[family]
    model = auto_class.from_pretrained(source, quantization_config=config, dtype=dtype)
    assert quantized(model) and model.dtype == dtype and model.hf_quantizer.quantization_config == config
    expected = logits(dequantized_by_hand(auto_class.from_pretrained(source, dtype=dtype), model))
    assert relative_error(logits(model), expected) < TOLERANCES[dtype]
    assert logits(model).dtype == dtype

    model.save_pretrained(tmp_path)
    saved_config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved_config.pop("checksums") and saved_config | {"checksums": None} == config.to_dict()
    for load in ({}, {"dtype": "auto"}, {"dtype": dtype}):
        reloaded = auto_class.from_pretrained(tmp_path, **load)
        assert torch.equal(logits(reloaded), logits(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor)
        assert reloaded.state_dict()[name].dtype == tensor.dtype
    for module in (*quantized(model).values(), *quantized(reloaded).values()):
        assert not any(module.get_parameter(name).requires_grad for name in module.storage_names())


def test_which_modules_become_what(float_folders):
    llama = AutoModelForCausalLM.from_pretrained(
        float_folders["llama"], quantization_config=MonoQuantConfig()
    )
    assert len(quantized(llama)) == 14 and type(llama.lm_head) is torch.nn.Linear
    resnet = AutoModelForImageClassification.from_pretrained(
        float_folders["resnet"], quantization_config=MonoQuantConfig()
    )
    assert {type(module).__name__ for module in quantized(resnet).values()} == {
        "QuantizedConv2d",
        "QuantizedLinear",
    }
    assert not [m for m in resnet.modules() if type(m) is torch.nn.Conv2d]


@CONFIGS
def test_on_disk_is_the_documented_format(config, float_folders, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(
        float_folders["resnet"], quantization_config=config
    )
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
        stored = {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()}
    for name, module in quantized(model).items():
        shape = list(module.weight.shape)
        scale_shape = [shape[0]] + [1] * (len(shape) - 1)
        if config.weights == "float16":
            assert stored[f"{name}.weight_float16"] == ("F16", shape)
            assert f"{name}.weight_scale" not in stored
        else:
            assert stored[f"{name}.weight_int8"] == ("I8", shape)
            assert stored[f"{name}.weight_scale"] == ("F32", scale_shape)
        zero_point = stored.get(f"{name}.weight_zero_point")
        assert zero_point == (("I8", scale_shape) if config == MonoQuantConfig() else None)


def test_sharded_save_and_reload(float_folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        float_folders["llama"], quantization_config=MonoQuantConfig()
    )
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_sharded_float_checkpoint_quantizes_to_the_same(float_folders, tmp_path):
    AutoModelForCausalLM.from_pretrained(float_folders["llama"]).save_pretrained(
        tmp_path, max_shard_size="20KB"
    )
    one = AutoModelForCausalLM.from_pretrained(float_folders["llama"], quantization_config=MonoQuantConfig())
    many = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MonoQuantConfig())
    assert torch.equal(logits(one), logits(many))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_float(tied, tmp_path):
    tiny_models.llama(tied=tied).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=MonoQuantConfig())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int8")), logits(model))


@CONFIGS
def test_memory_footprint_tells_the_truth_also_after_a_forward(config, float_folders):
    float_model = AutoModelForCausalLM.from_pretrained(float_folders["llama"])
    model = AutoModelForCausalLM.from_pretrained(float_folders["llama"], quantization_config=config)
    weights = sum(module.weight.numel() for module in quantized(model).values())
    per_channel = 0
    if config.weights == "int8":
        channels = sum(module.out_features for module in quantized(model).values())
        per_channel = channels * (4 if config.symmetric else 5)
    saved = weights * (4 - (1 if config.weights == "int8" else 2)) - per_channel
    for _ in range(2):
        assert model.get_memory_footprint() == float_model.get_memory_footprint() - saved
        logits(model)


@CONFIGS
@DTYPES
def test_dequantize_gives_a_float_model_that_saves_as_one(config, dtype, float_folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        float_folders["llama"], quantization_config=config, dtype=dtype
    )
    before = logits(model)
    model = model.dequantize()
    assert not quantized(model) and not getattr(model, "hf_quantizer", None)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert relative_error(logits(model), before) < TOLERANCES[dtype]
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), logits(model)) and reloaded.dtype == dtype


def test_the_base_model_and_the_model_with_a_head_read_each_others_checkpoints(float_folders, tmp_path):
    config = MonoQuantConfig(modules_to_not_convert=["model.layers.0.mlp"])
    model = AutoModelForCausalLM.from_pretrained(float_folders["llama"], quantization_config=config)
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal")
    with torch.no_grad():
        expected = model.model(tiny_models.TOKENS).last_hidden_state
        assert torch.equal(base(tiny_models.TOKENS).last_hidden_state, expected)
        assert type(base.layers[0].mlp.up_proj) is torch.nn.Linear and len(quantized(base)) == 11
        base.save_pretrained(tmp_path / "base")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(again.model(tiny_models.TOKENS).last_hidden_state, expected)


def test_a_new_head_is_float_initialized_and_trainable(float_folders, tmp_path):
    tiny_models.bert().bert.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=MonoQuantConfig(), num_labels=4
    )
    head = model.classifier
    assert type(head) is torch.nn.Linear and head.weight.requires_grad and head.weight.dtype == torch.float32
    assert 0 < float(head.weight.detach().std()) < 1 and torch.equal(head.bias, torch.zeros(4))
    decision = next(d for d in model.hf_quantizer.decisions if d.module == "classifier")
    assert not decision.quantized and "newly initialized" in decision.reason


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_a_layer_that_a_model_initializes_from_outside_is_float_where_it_is_missing(kind, tmp_path):
    """CLIP draws the weights of its attention from the parent of the Linear, which knows nothing of codes."""
    family = next(family for family in FAMILIES if family.name == "CLIP")
    source = family.make()
    if kind == "quantized":
        quantize_model(source)
    source.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.get("quantization_config", {}).pop("checksums", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    file, missing = tmp_path / "model.safetensors", "vision_model.encoder.layers.1.self_attn.q_proj"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(missing)}
    save_file(kept, file, metadata={"format": "pt"})
    extra = {"quantization_config": MonoQuantConfig()} if kind == "float" else {}
    model = family.model_class.from_pretrained(tmp_path, **extra)
    module = model.get_submodule(missing)
    assert type(module) is torch.nn.Linear and 0 < float(module.weight.detach().std()) < 1
    assert sum(type(m) is QuantizedLinear for m in model.modules()) > 20


def test_the_choice_of_the_config_survives_the_reload(float_folders, tmp_path):
    config = MonoQuantConfig(
        modules_to_not_convert=["model.layers.0.mlp"],
        module_overrides={
            "model.layers.1.mlp.*": {"weights": "float16"},
            "re:.*q_proj": {"symmetric": True},
            "*.k_proj": {"weights": "float"},
        },
    )
    model = AutoModelForCausalLM.from_pretrained(float_folders["llama"], quantization_config=config)
    layers = model.model.layers
    assert type(layers[0].mlp.up_proj) is type(layers[0].self_attn.k_proj) is torch.nn.Linear
    assert layers[1].mlp.up_proj.weight_float16.dtype == torch.float16
    assert not hasattr(layers[0].self_attn.q_proj, "weight_zero_point")
    assert hasattr(layers[0].self_attn.v_proj, "weight_zero_point")
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert repr(reloaded) == repr(model) and torch.equal(logits(reloaded), logits(model))


def test_generate_gives_the_same_text_after_a_reload(float_folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        float_folders["llama"], quantization_config=MonoQuantConfig()
    )
    arguments = {
        "input_ids": tiny_models.TOKENS[:1],
        "max_new_tokens": 8,
        "do_sample": False,
        "min_new_tokens": 8,
    }
    text = model.generate(**arguments)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).generate(**arguments), text)


def test_a_state_dict_in_place_of_files(float_folders):
    state_dict = AutoModelForCausalLM.from_pretrained(float_folders["llama"]).state_dict()
    from_files = AutoModelForCausalLM.from_pretrained(
        float_folders["llama"], quantization_config=MonoQuantConfig()
    )
    model = type(from_files).from_pretrained(
        None,
        config=from_files.config.__class__.from_pretrained(float_folders["llama"]),
        state_dict=state_dict,
        quantization_config=MonoQuantConfig(),
    )
    assert torch.equal(logits(model), logits(from_files))
