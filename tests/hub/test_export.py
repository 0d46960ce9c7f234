"""Every export, loaded by the library it is for."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
    GgufConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.cli.main import main
from mono_quant_hf.hub import HubError, export
from tests import tiny_models


def quantized(model=None, **settings):
    return quantize_model(model or tiny_models.llama(), MonoQuantConfig(**settings))


def assert_same_logits(actual, model, tolerance=1e-5):
    """Compared in float arithmetic on the same weights, which is what the other libraries do; `model` becomes float."""
    expected = tiny_models.logits(model.dequantize())
    assert tiny_models.relative_error(tiny_models.logits(actual), expected) < tolerance


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# compressed-tensors


def convnext():
    """Linears and depthwise convolutions."""
    torch.manual_seed(0)
    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5, image_size=32, initializer_range=0.2
    )
    return ConvNextForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("symmetric", "format", "names"),
    [
        (True, "pack-quantized", {"weight_packed", "weight_scale", "weight_shape"}),
        (False, "int-quantized", {"weight", "weight_scale", "weight_zero_point"}),
    ],
)
def test_compressed_tensors(tmp_path, symmetric, format, names):
    pytest.importorskip("compressed_tensors")
    model = quantized(symmetric=symmetric)
    export(model, tmp_path / "ct", "compressed-tensors")
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj."
    assert {name.removeprefix(layer) for name in stored if name.startswith(layer)} == names
    config = config_of(tmp_path / "ct")
    assert config["format"] == config["config_groups"]["group_0"]["format"] == format
    assert config["ignore"] == ["lm_head"]
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ct"), model)


def test_packed_words_hold_code_plus_128_the_first_lowest(tmp_path):
    model = quantized(symmetric=True)
    export(model, tmp_path / "ct", "compressed-tensors")
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    module = model.model.layers[1].mlp.up_proj
    packed = stored["model.layers.1.mlp.up_proj.weight_packed"]
    assert (packed.dtype, list(packed.shape)) == (torch.int32, [88, 8])
    words = packed.numpy().astype("<u4")
    codes = torch.from_numpy(words.view("uint8").reshape(88, 32).astype("int16")) - 128
    assert torch.equal(codes.to(torch.int8), module.weight_int8)
    assert stored["model.layers.1.mlp.up_proj.weight_shape"].tolist() == [88, 32]
    assert torch.equal(stored["model.layers.1.mlp.up_proj.weight_scale"], module.weight_scale)


def test_int8_activations(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = quantized(symmetric=True)
    export(model, tmp_path / "ct", "compressed-tensors", activations="int8")
    group = config_of(tmp_path / "ct")["config_groups"]["group_0"]
    assert group["format"] == "int-quantized"
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    error = tiny_models.relative_error(tiny_models.logits(loaded), tiny_models.logits(model))
    assert 1e-4 < error < 0.1  # the activations are rounded too


def test_convolutions_are_float_there_and_it_is_said(tmp_path, caplog):
    pytest.importorskip("compressed_tensors")
    model = quantized(convnext(), symmetric=True)
    with caplog.at_level(logging.WARNING, logger="mono_quant_hf"):
        export(model, tmp_path / "ct", "compressed-tensors")
    left = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert set(left) <= set(config_of(tmp_path / "ct")["ignore"])
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "ct")
    assert_same_logits(loaded, model)

    assert "quantized modules (Conv2d), such as convnext." in caplog.text
    with pytest.raises(HubError, match="No Linear of the model is int8"):
        export(quantized(weights="float16"), tmp_path / "fp16", "compressed-tensors")


def test_a_head_that_is_tied_to_a_quantized_embedding_is_float_there(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = quantized(tiny_models.llama(tied=True), symmetric=True, quantize_embeddings=True)
    assert model.lm_head.weight_int8 is model.model.embed_tokens.weight_int8
    export(model, tmp_path / "ct", "compressed-tensors")
    assert config_of(tmp_path / "ct")["ignore"] == ["lm_head"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_logits(loaded, model)


def mixture(**settings):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        initializer_range=0.2,
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | settings)).eval()


@pytest.mark.parametrize("skip", [None, ["experts"]])
def test_stacked_experts_are_refused_there(tmp_path, skip):
    model = quantized(mixture(), symmetric=True, modules_to_not_convert=skip)
    with pytest.raises(HubError, match=r"mlp\.experts holds the weights of several experts"):
        export(model, tmp_path / "ct", "compressed-tensors")


# bitsandbytes


def test_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = quantized(symmetric=True)
    export(model, tmp_path / "bnb", "bitsandbytes")
    stored = load_file(tmp_path / "bnb" / "model.safetensors")
    module = model.model.layers[0].mlp.down_proj
    prefix = "model.layers.0.mlp.down_proj."
    assert torch.equal(stored[prefix + "weight"], module.weight_int8)
    assert torch.equal(stored[prefix + "SCB"], module.weight_scale.flatten() * 127)
    assert (stored[prefix + "weight_format"].dtype, int(stored[prefix + "weight_format"])) == (torch.uint8, 0)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb")
    assert type(loaded.model.layers[0].mlp.down_proj).__name__ == "Linear8bitLt"
    assert type(loaded.lm_head) is torch.nn.Linear
    assert (
        tiny_models.relative_error(tiny_models.logits(loaded), tiny_models.logits(model)) < 0.05
    )  # LLM.int8
    assert_same_logits(loaded.dequantize(), model)


def test_bitsandbytes_with_experts_in_float(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = quantized(mixture(), symmetric=True)
    export(model, tmp_path / "bnb", "bitsandbytes")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "bnb").dequantize(), model)


def test_bitsandbytes_has_no_zero_points(tmp_path):
    with pytest.raises(HubError, match=r"q_proj and 13 other modules have zero-points.*symmetric=True"):
        export(quantized(), tmp_path / "bnb", "bitsandbytes")
    assert list(tmp_path.iterdir()) == []


# GGUF


def wide(kind="llama"):
    """A model whose rows are whole blocks of 32, with as many heads as it takes to tell their order."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=128)).eval()
    return type(tiny_models.llama())(type(tiny_models.llama().config)(**sizes)).eval()


def byte_level_tokenizer(plain=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:60]
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, "##"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("#", "#")]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = byte_level if plain else pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def load_gguf(file):
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


@pytest.mark.parametrize(
    ("kind", "plain", "pre"),
    [
        ("llama", False, "smollm"),
        ("llama", True, "gpt-2"),
        ("qwen2", False, "qwen2"),
        ("qwen3", False, "qwen2"),
    ],
)
def test_gguf(tmp_path, kind, plain, pre):
    gguf = pytest.importorskip("gguf")
    model = quantized(wide(kind), symmetric=True)
    export(model, tmp_path / "model.gguf", "gguf", tokenizer=byte_level_tokenizer(plain))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == pre
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    down = tensors["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == "Q8_0"
    codes = down.data.reshape(64, 3, 34)[:, :, 2:].reshape(64, 96).view("int8")
    assert torch.equal(torch.from_numpy(codes.copy()), model.model.layers[0].mlp.down_proj.weight_int8)
    # Only the scales are rounded, to float16: 2^-11 of a weight.
    assert_same_logits(load_gguf(tmp_path / "model.gguf"), model, tolerance=2e-3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert tokenizer.encode("###1234") == byte_level_tokenizer(plain).encode("###1234")


def test_gguf_of_a_quantized_embedding(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = quantized(wide(), symmetric=True, quantize_embeddings=True)
    export(model, tmp_path / "model.gguf", "gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert_same_logits(load_gguf(tmp_path / "model.gguf"), model, tolerance=2e-3)


def test_gguf_of_experts_stacks_them(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = quantized(
        mixture(moe_intermediate_size=768, head_dim=32), symmetric=True
    )  # 768 is what is assumed
    export(model, tmp_path / "model.gguf", "gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    down = tensors["blk.0.ffn_down_exps.weight"]
    assert down.tensor_type.name == "Q8_0" and list(down.shape) == [768, 32, 4]
    codes = down.data.reshape(4, 32, 24, 34)[..., 2:].reshape(4, 32, 768).view("int8")
    assert torch.equal(torch.from_numpy(codes.copy()), model.model.layers[0].mlp.experts.down_proj_int8)
    assert_same_logits(load_gguf(tmp_path / "model.gguf"), model, tolerance=5e-3)
    model = quantized(mixture(norm_topk_prob=False), symmetric=True)
    with pytest.raises(HubError, match="norm_topk_prob=False"):
        export(model, tmp_path / "other.gguf", "gguf")


def test_gguf_of_scales_that_float16_holds_is_exact(tmp_path):
    pytest.importorskip("gguf")
    model = quantized(wide(), symmetric=True)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight_scale.half().float()
    export(model, tmp_path / "model.gguf", "gguf")
    assert_same_logits(load_gguf(tmp_path / "model.gguf"), model)


def test_gguf_keeps_in_float_what_float16_scales_would_spoil(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = wide()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-5)
    model = quantized(model, symmetric=True)
    export(model, tmp_path / "model.gguf", "gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.1.ffn_down.weight"]) == ("F32", "Q8_0")


def test_gguf_of_zero_points_is_rounded_again_and_it_is_said(tmp_path, caplog):
    pytest.importorskip("gguf")
    model = quantized(wide())
    model.save_pretrained(tmp_path / "int8")
    with caplog.at_level(logging.WARNING, logger="mono_quant_hf"):
        export(tmp_path / "int8", tmp_path / "model.gguf", "gguf")
    assert "14 modules" in caplog.text and "rounded once more" in caplog.text
    assert_same_logits(load_gguf(tmp_path / "model.gguf"), model, tolerance=0.05)


def test_gguf_refuses_what_it_cannot_write(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(HubError, match=r"BertForSequenceClassification cannot be written as GGUF"):
        export(quantized(tiny_models.bert()), tmp_path / "model.gguf", "gguf")
    with pytest.raises(HubError, match=r"ends in \.gguf"):
        export(quantized(wide()), tmp_path / "folder", "gguf")
    stretched = wide()
    stretched.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(HubError, match="rotary embeddings of type 'linear'"):
        export(quantized(stretched), tmp_path / "model.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


# All of them


def test_the_command_and_what_it_refuses(tmp_path, capsys):
    source = tmp_path / "model-int8"
    model = quantized(symmetric=True)
    model.save_pretrained(source)
    byte_level_tokenizer().save_pretrained(source)
    assert main(["export", str(source), str(tmp_path / "ct"), "--format", "compressed-tensors"]) == 0
    assert (tmp_path / "ct" / "tokenizer.json").is_file()

    def refused(*arguments):
        capsys.readouterr()
        assert main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "is there already" in refused(source, tmp_path / "ct", "--format", "compressed-tensors")
    assert "is for --format compressed-tensors" in refused(
        source, tmp_path / "b", "--format", "bitsandbytes", "--activations", "int8"
    )
    assert "neither a folder nor the name" in refused(
        tmp_path / "no", tmp_path / "b", "--format", "bitsandbytes"
    )
    tiny_models.llama().save_pretrained(tmp_path / "float")
    assert "is float, not quantized" in refused(
        tmp_path / "float", tmp_path / "b", "--format", "bitsandbytes"
    )
    assert main(["export", str(source), str(tmp_path / "ct"), "--format", "bitsandbytes", "--overwrite"]) == 0
    assert config_of(tmp_path / "ct")["quant_method"] == "bitsandbytes"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ct", "float", "model-int8"]


def test_an_export_that_fails_leaves_the_destination_as_it_was(tmp_path, monkeypatch):
    model = quantized(symmetric=True)
    export(model, tmp_path / "ct", "compressed-tensors")
    before = (tmp_path / "ct" / "config.json").read_bytes()

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        export(model, tmp_path / "ct", "bitsandbytes", tokenizer=Broken(), overwrite=True)
    assert (tmp_path / "ct" / "config.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["ct"]
