import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.integration.by_version import LOADER_CHECKS_SHAPES
from mono_quant_hf.modules import QuantizedModule
from tests import tiny_models
from tests.tiny_models import logits

UP = "model.layers.0.mlp.up_proj"
needs_shape_check = pytest.mark.skipif(
    not LOADER_CHECKS_SHAPES, reason="the loader of this transformers checks no shapes of quantized models"
)


@pytest.fixture(scope="module")
def model():
    from mono_quant_hf import quantize_model

    return quantize_model(tiny_models.llama())


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    """Apply `change` to the tensors of the checkpoint, and forget the checksums, as other tools that write it would."""
    config = json.loads((folder / "config.json").read_text())
    config.get("quantization_config", {}).pop("checksums", None)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def replace(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{UP}.weight_scale"), rf"{UP}\.weight_scale is missing"),
        (lambda t: t.pop(f"{UP}.weight_zero_point"), rf"{UP}\.weight_zero_point is missing"),
        (
            replace(f"{UP}.weight_scale", lambda s: s[:, 0].clone()),
            r"weight_scale.*to be F32 \[88, 1\], got F32 \[88\]",
        ),
        (replace(f"{UP}.weight_scale", lambda s: s[:-1].clone()), r"weight_scale.*\[88, 1\].*\[87, 1\]"),
        (replace(f"{UP}.weight_scale", torch.Tensor.bfloat16), r"weight_scale.*to be F32.*got BF16"),
        (replace(f"{UP}.weight_zero_point", torch.Tensor.float), r"weight_zero_point.*to be I8.*got F32"),
        (
            replace(f"{UP}.weight_int8", lambda w: w[:, :-1].clone()),
            rf"{UP}\.weight_int8.*\[88, 32\].*\[88, 31\]",
        ),
    ],
    ids=[
        "no scale",
        "no zero-point",
        "flat scale",
        "short scale",
        "bf16 scale",
        "float zero-point",
        "weight shape",
    ],
)
def test_damage_names_the_file_and_the_tensor(folder, change, words):
    edit(folder, change)
    with pytest.raises(ValueError, match=words) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "model.safetensors" in str(raised.value) or "missing" in str(raised.value)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((ValueError, OSError), match=shard.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_float_weight_where_the_config_says_int8_is_loaded_as_float(folder, model, caplog):
    def make_float(tensors):
        del tensors[f"{UP}.weight_int8"], tensors[f"{UP}.weight_scale"], tensors[f"{UP}.weight_zero_point"]
        tensors[f"{UP}.weight"] = model.get_submodule(UP).dequantized()

    edit(folder, make_float)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded.get_submodule(UP)) is torch.nn.Linear
    assert tiny_models.relative_error(logits(loaded), logits(model)) < 1e-3
    decision = next(d for d in loaded.hf_quantizer.decisions if d.module == UP)
    assert decision.reason == "float in the checkpoint"


def test_codes_where_the_config_says_float_are_loaded_as_codes(folder, model):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"modules_to_not_convert": ["model.layers.0"], "checksums": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


def test_a_newer_format_version_says_to_upgrade(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"format_version=99.*upgrade mono_quant_hf"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.skipif(LOADER_CHECKS_SHAPES, reason="the loader of this transformers checks shapes")
def test_another_shape_is_an_error_where_the_loader_checks_none(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path)
    edit(tmp_path, replace(f"{UP}.weight", lambda w: w[:, :-1].clone()))
    with pytest.raises(ValueError, match=rf"Expected {UP}.weight \[\d+, \d+\], got"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MonoQuantConfig())


@needs_shape_check
def test_a_float_checkpoint_of_another_shape_is_what_transformers_makes_of_it(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path)
    edit(tmp_path, replace(f"{UP}.weight", lambda w: w[:, :-1].clone()))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MonoQuantConfig())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=MonoQuantConfig(), ignore_mismatched_sizes=True
    )
    assert type(loaded.get_submodule(UP)) is torch.nn.Linear  # of new random weights, as in a float model
    assert sum(isinstance(module, QuantizedModule) for module in loaded.modules()) == 13


def test_loading_says_what_was_quantized(tmp_path, caplog):
    tiny_models.llama().save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "mono_quant_hf"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MonoQuantConfig())
    assert "LlamaForCausalLM: 14 of 16 modules quantized, 84.9% of their parameters" in caplog.text
