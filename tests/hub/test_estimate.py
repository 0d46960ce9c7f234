"""What a model is said to take is what it takes, where it is said to be put it is put, and no weights are read."""

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.hub import HubError, estimate
from tests import tiny_models

LOADS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "int8": {"quantization_config": MonoQuantConfig()},
    "int8, embeddings too": {"quantization_config": MonoQuantConfig(quantize_embeddings=True)},
    "as asked": {"quantization_config": MonoQuantConfig(module_overrides={"*.wo": {"weights": "float"}})},
}


def t5(folder):
    """Keeps some weights in float32 where the rest is float16, and has tied embeddings."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return AutoModelForSeq2SeqLM


def llama(folder, tied=False):
    tiny_models.llama(tied=tied).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20kB")
    return AutoModelForCausalLM


@pytest.mark.parametrize(
    "make", [llama, lambda folder: llama(folder, tied=True), t5], ids=["llama", "tied", "t5"]
)
@pytest.mark.filterwarnings("ignore:Using torch.float16")
def test_each_form_takes_what_is_said(make, tmp_path):
    auto_class = make(tmp_path)
    found = estimate(tmp_path, LOADS["as asked"]["quantization_config"])
    assert [form.name for form in found.forms] == [*LOADS]
    for form in found.forms:
        model = auto_class.from_pretrained(tmp_path, **LOADS[form.name])
        assert form.bytes == model.get_memory_footprint(), form.name
        assert (form.share > 0) == ("quantization_config" in LOADS[form.name])
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert files * 0.8 < found.bytes_on_disk < files


def test_each_device_gets_what_is_said(tmp_path):
    tiny_models.llama(layers=4).save_pretrained(tmp_path / "model")
    whole = estimate(tmp_path / "model").forms[3].bytes
    limits = {"cpu": whole * 2 // 3}
    form = estimate(tmp_path / "model", max_memory=limits).forms[3]
    assert sum(form.bytes_by_device.values()) == whole and form.bytes_by_device["cpu"] <= limits["cpu"]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        quantization_config=MonoQuantConfig(),
        device_map="auto",
        max_memory=limits,
        offload_folder=tmp_path / "offload",
    )
    assert form.device_map == model.hf_device_map


def test_devices_need_not_be_there(tmp_path, caplog):
    tiny_models.llama().save_pretrained(tmp_path)
    forms = estimate(tmp_path, max_memory={0: "1GB", 1: "1GB"}).forms
    assert all(form.bytes_by_device.keys() <= {0, 1} for form in forms) and "not available" not in caplog.text


def test_of_a_model_on_the_hub_only_headers_are_read(hub, tmp_path):
    model = tiny_models.llama(layers=8)
    model.save_pretrained(tmp_path / "model")
    HfApi().create_repo("me/model")
    HfApi().upload_folder(repo_id="me/model", folder_path=tmp_path / "model")
    assert estimate("me/model") == estimate(tmp_path / "model")
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))
    with pytest.raises(HubError, match="not on the Hub"):
        estimate("me/other")
