"""`mono-quant-hf quantize` and `quantize_checkpoint`: every kind of source."""

import json
import logging

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.cli.main import main
from mono_quant_hf.hub import HubError, export, push_to_hub, quantize_checkpoint
from mono_quant_hf.hub.export.compressed_tensors import pack, quantization_config
from mono_quant_hf.modules import QuantizedModule
from tests import tiny_models
from tests.hub.test_export import byte_level_tokenizer, load_gguf, wide


def codes_of(model):
    return {
        name: module.stored()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule) and module.quantization.weights == "int8"
    }


def assert_same_codes(folder, model, auto_class=AutoModelForCausalLM, scale_tolerance=0.0):
    found, expected = codes_of(auto_class.from_pretrained(folder)), codes_of(model)
    assert found.keys() == expected.keys() and found
    for name, (codes, scale, zero_point) in found.items():
        assert torch.equal(codes, expected[name][0]), name
        torch.testing.assert_close(scale, expected[name][1], rtol=scale_tolerance, atol=0)
        assert (zero_point is None) == (expected[name][2] is None)
        assert zero_point is None or torch.equal(zero_point, expected[name][2])


def test_a_float_folder_with_all_that_belongs_to_it(tmp_path):
    model = tiny_models.llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    byte_level_tokenizer().save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# The float model\n")
    (tmp_path / "float" / "LICENSE").write_text("MIT")
    (tmp_path / "float" / "pytorch_model.bin").write_bytes(b"other weights")
    (tmp_path / "float" / "original").mkdir()
    (tmp_path / "float" / "1_Pooling").mkdir()
    (tmp_path / "float" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "float" / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    how = quantize_checkpoint(tmp_path / "float", tmp_path / "int8", MonoQuantConfig(symmetric=True))
    assert how == "rounded from float"
    assert_same_codes(tmp_path / "int8", quantize_model(model, MonoQuantConfig(symmetric=True)))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "int8").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "int8").encode("#") == byte_level_tokenizer().encode("#")
    assert (tmp_path / "int8" / "LICENSE").read_text() == "MIT"
    assert (tmp_path / "int8" / "1_Pooling" / "config.json").is_file()
    assert not {"original", "pytorch_model.bin"} & {file.name for file in (tmp_path / "int8").iterdir()}
    card = ModelCard.load(tmp_path / "int8" / "README.md")
    assert (card.data.license, card.data.language) == ("mit", "en")
    assert "MonoQuantConfig(weights='int8', symmetric=True)" in card.text and "# int8" in card.text


@pytest.mark.parametrize(
    ("symmetric", "activations"),
    [(True, None), (True, "int8"), (False, None)],
    ids=["w8a16", "w8a8", "asymmetric"],
)
def test_codes_of_compressed_tensors_are_taken_over(tmp_path, symmetric, activations):
    model = quantize_model(tiny_models.llama(layers=3), MonoQuantConfig(symmetric=symmetric))
    export(model, tmp_path / "ct", "compressed-tensors", activations=activations, max_shard_size="20kB")
    how = quantize_checkpoint(tmp_path / "ct", tmp_path / "int8")
    assert how == "the int8 codes taken over as they are"
    assert len(list((tmp_path / "int8").glob("model-*.safetensors"))) > 1
    assert_same_codes(tmp_path / "int8", model)


def test_what_others_write_in_that_format(tmp_path):
    """bfloat16 scales, a scale for the whole tensor, and zero-points packed down the rows."""
    model = quantize_model(tiny_models.llama())
    source = tmp_path / "ct"
    export(model, source, "compressed-tensors")
    tensors = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensors[name] = file.get_tensor(name)
    per_tensor, half, packed = (f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down"))
    tensors[f"{per_tensor}.weight_scale"] = torch.tensor([0.01])
    tensors[f"{per_tensor}.weight_zero_point"] = torch.tensor([3], dtype=torch.int8)
    tensors[f"{half}.weight_scale"] = tensors[f"{half}.weight_scale"].bfloat16()
    codes = tensors.pop(f"{packed}.weight")
    tensors[f"{packed}.weight_packed"] = pack(codes)
    tensors[f"{packed}.weight_shape"] = torch.tensor(codes.shape)
    zero_point = tensors[f"{packed}.weight_zero_point"]
    tensors[f"{packed}.weight_zero_point"] = pack(zero_point.T).T.contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(source, tmp_path / "int8")
    found = codes_of(AutoModelForCausalLM.from_pretrained(tmp_path / "int8"))
    expected = codes_of(model)
    assert torch.equal(found[packed][0], codes) and torch.equal(found[packed][2], expected[packed][2])
    assert torch.equal(found[half][1], expected[half][1].bfloat16().float())
    assert torch.equal(found[per_tensor][1], torch.full((88, 1), 0.01))
    assert set(found[per_tensor][2].flatten().tolist()) == {3}


def test_another_format_of_compressed_tensors_is_rounded_again(tmp_path):
    compressed_tensors = pytest.importorskip("compressed_tensors")
    assert compressed_tensors
    model = quantize_model(tiny_models.llama(), MonoQuantConfig(symmetric=True))
    export(model, tmp_path / "ct", "compressed-tensors", activations="int8")
    # The same codes with a scale for each group of 16 columns; all groups of a row have the same.
    with safe_open(tmp_path / "ct" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        columns = tensors[name.removesuffix("_scale")].shape[1]
        tensors[name] = tensors[name].expand(-1, columns // 8).contiguous()
    save_file(tensors, tmp_path / "ct" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    settings = quantization_config("int-quantized", True, None, ["lm_head"])
    settings["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": 8}
    config["quantization_config"] = settings
    (tmp_path / "ct" / "config.json").write_text(json.dumps(config))
    how = quantize_checkpoint(tmp_path / "ct", tmp_path / "int8", MonoQuantConfig(symmetric=True))
    assert "rounded a second time" in how
    assert_same_codes(tmp_path / "int8", model, scale_tolerance=1e-6)


def test_bitsandbytes_as_transformers_writes_it(tmp_path):
    pytest.importorskip("bitsandbytes")
    float_model = tiny_models.bert()
    float_model.save_pretrained(tmp_path / "float")
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "float", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    theirs.save_pretrained(tmp_path / "bnb")
    assert "taken over" in quantize_checkpoint(tmp_path / "bnb", tmp_path / "int8")
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    module, other = (
        ours.bert.encoder.layer[0].intermediate.dense,
        theirs.bert.encoder.layer[0].intermediate.dense,
    )
    assert torch.equal(module.weight_int8, other.weight.data)
    expected = theirs.dequantize(torch.float32).eval()
    assert (
        tiny_models.relative_error(tiny_models.logits(ours.dequantize()), tiny_models.logits(expected)) < 1e-5
    )


def test_bitsandbytes_of_a_model_with_conv1d(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, initializer_range=0.2)
    model = quantize_model(GPT2LMHeadModel(config).eval(), MonoQuantConfig(symmetric=True))
    export(model, tmp_path / "bnb", "bitsandbytes")
    quantize_checkpoint(tmp_path / "bnb", tmp_path / "int8")
    assert_same_codes(tmp_path / "int8", model, scale_tolerance=1e-6)


def test_gguf_that_came_from_here_has_the_same_codes(tmp_path):
    pytest.importorskip("gguf")
    model = quantize_model(wide(), MonoQuantConfig(symmetric=True))
    export(model, tmp_path / "model.gguf", "gguf", tokenizer=byte_level_tokenizer())
    arguments = ["quantize", str(tmp_path / "model.gguf"), str(tmp_path / "int8"), "--symmetric"]
    assert main(arguments) == 0
    assert_same_codes(tmp_path / "int8", model, scale_tolerance=2.0**-10)
    loaded, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8"),
        load_gguf(tmp_path / "model.gguf"),
    )
    assert (
        tiny_models.relative_error(tiny_models.logits(loaded.dequantize()), tiny_models.logits(expected))
        < 1e-5
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "int8").encode("###1") == byte_level_tokenizer().encode(
        "###1"
    )


def test_from_the_hub_and_back_to_it(hub, tmp_path):
    tiny_models.llama().push_to_hub("me/float")
    quantize_checkpoint("me/float", tmp_path / "int8")
    push_to_hub(tmp_path / "int8", "me/float-int8")
    card = ModelCard(hub.files("me/float-int8")["README.md"].decode())
    assert card.data.base_model == "me/float"
    assert 'from_pretrained("me/float-int8")' in card.text
    export("me/float-int8", tmp_path / "ct", "compressed-tensors")
    with pytest.raises(HubError, match="not on the Hub, or private"):
        quantize_checkpoint("me/none", tmp_path / "none")


def test_what_is_refused(tmp_path, capsys):
    model = quantize_model(tiny_models.llama(), MonoQuantConfig(symmetric=True))
    model.save_pretrained(tmp_path / "int8")
    export(model, tmp_path / "ct", "compressed-tensors")
    new = tmp_path / "new"
    for source, config, said in [
        (tmp_path / "int8", None, "quantized by mono_quant_hf already"),
        (tmp_path / "ct", MonoQuantConfig(weights="float16"), "leave the settings out"),
        (tmp_path / "none.gguf", None, "no file"),
        (tmp_path / "none", None, "neither a folder"),
    ]:
        with pytest.raises(HubError, match=said):
            quantize_checkpoint(source, new, config)
    with pytest.raises(HubError, match="there already"):
        quantize_checkpoint(tmp_path / "ct", tmp_path / "int8")
    with pytest.raises(TypeError, match="resume_folder is for calibration"):
        quantize_checkpoint(tmp_path / "ct", new, resume_folder=tmp_path / "kept")
    settings = json.loads((tmp_path / "ct" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "ct" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(HubError, match="quantized by gptq"):
        quantize_checkpoint(tmp_path / "ct", new)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ct", "int8"]


def test_overwriting_keeps_the_old_until_the_new_is_whole(tmp_path, caplog):
    tiny_models.llama().save_pretrained(tmp_path / "float")
    broken = tiny_models.llama()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    quantize_checkpoint(tmp_path / "float", tmp_path / "int8")
    before = (tmp_path / "int8" / "model.safetensors").read_bytes()
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ValueError, match=r"up_proj\.weight cannot be quantized"),
    ):
        quantize_checkpoint(tmp_path / "broken", tmp_path / "int8", overwrite=True)
    assert (tmp_path / "int8" / "model.safetensors").read_bytes() == before
    assert (
        main(["quantize", str(tmp_path / "float"), str(tmp_path / "int8"), "--overwrite", "--symmetric"]) == 0
    )
    assert (tmp_path / "int8" / "model.safetensors").read_bytes() != before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken", "float", "int8"]
