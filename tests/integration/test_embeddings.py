"""`quantize_embeddings=True`: tables and heads, tied and not, on every way a model can go."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.modules import QuantizedEmbedding, QuantizedLinear
from tests.tiny_models import TOKENS, llama, logits

from .measure import dequantized_by_hand

ON = MonoQuantConfig(quantize_embeddings=True)
STORED = ("weight_int8", "weight_scale", "weight_zero_point")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def load(folder, config=ON, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs).eval()


def is_tied(model):
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    same = [getattr(head, name) is getattr(table, name) for name in STORED]
    assert all(same) or not any(same)
    return all(same)


def stored_names(folder):
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


@pytest.mark.parametrize("weights", ["int8", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_table_and_head_compute_with_the_same_codes(tmp_path, tied, weights, symmetric):
    model = llama(tied)
    config = MonoQuantConfig(weights=weights, symmetric=symmetric, quantize_embeddings=True)
    quantized = load(saved(model, tmp_path / "float"), config)
    assert isinstance(quantized.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(quantized.lm_head, QuantizedLinear)
    decisions = {d.module: d for d in quantized.hf_quantizer.decisions}
    assert decisions["lm_head"].quantized and decisions["model.embed_tokens"].quantized
    by_hand = dequantized_by_hand(model, quantized.hf_quantizer.decisions)
    torch.testing.assert_close(logits(quantized), logits(by_hand), rtol=1e-2, atol=5e-3)
    if weights == "int8" and not symmetric:
        assert is_tied(quantized) == tied
    again = AutoModelForCausalLM.from_pretrained(saved(quantized, tmp_path / "int8"))
    assert torch.equal(logits(again), logits(quantized))


def test_a_tied_weight_is_on_disk_once_and_comes_back_tied(tmp_path, tied):
    quantized = load(saved(llama(tied), tmp_path / "float"))
    folder = saved(quantized, tmp_path / "int8")
    heads = {name for name in stored_names(folder) if name.startswith("lm_head")}
    assert heads == (set() if tied else {f"lm_head.{name}" for name in STORED})
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert is_tied(again) == tied and torch.equal(logits(again), logits(quantized))
    assert saved(again, tmp_path / "more") and stored_names(tmp_path / "more") == stored_names(folder)


def test_memory_and_disk_hold_one_copy(tmp_path):
    off, on = (load(saved(llama(True), tmp_path / "f"), config) for config in (MonoQuantConfig(), ON))
    table = 64 * 32
    assert off.get_memory_footprint() - on.get_memory_footprint() == table * 3 - 64 * 5 - 4


def test_shards(tmp_path, tied):
    quantized = load(saved(llama(tied), tmp_path / "float"))
    quantized.save_pretrained(tmp_path / "int8", max_shard_size="5KB")
    assert len(list((tmp_path / "int8").glob("*.safetensors"))) > 5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert is_tied(again) == tied and torch.equal(logits(again), logits(quantized))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload(tmp_path, tied, place):
    """Layers, and then tables and head, on disk: while quantizing and when loading the quantized checkpoint."""
    folder = saved(llama(tied), tmp_path / "float")
    expected = load(folder)
    layers = {
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    device_map = {**layers, "model.embed_tokens": place, "lm_head": place}
    kwargs = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    offloaded = load(folder, **kwargs)
    assert torch.equal(logits(offloaded), logits(expected))
    offloaded.save_pretrained(tmp_path / "int8")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert is_tied(plain) == tied and torch.equal(logits(plain), logits(expected))
    kwargs = {"device_map": dict(device_map), "offload_folder": tmp_path / "offload again"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", **kwargs)
    assert torch.equal(logits(again), logits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_model_is_that_of_its_vectors(tmp_path, tied, dtype):
    quantized = load(saved(llama(tied), tmp_path / "float"), dtype=dtype)
    assert quantized.dtype == dtype and quantized.model.embed_tokens(TOKENS).dtype == dtype
    again = AutoModelForCausalLM.from_pretrained(saved(quantized, tmp_path / "int8"))
    assert again.dtype == dtype and again.config.dtype == dtype
    assert logits(again).dtype == dtype and torch.equal(logits(again), logits(quantized))
    wider = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    assert wider.dtype == torch.float32 and logits(wider).dtype == torch.float32


def test_in_memory_it_is_the_same(tmp_path, tied):
    model = llama(tied)
    loaded = load(saved(model, tmp_path / "float"))
    quantize_model(model, ON)
    assert is_tied(model) == tied and torch.equal(logits(model), logits(loaded))
    again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "int8"))
    assert is_tied(again) == tied and torch.equal(logits(again), logits(model))


def test_copies_stay_tied(tied):
    model = quantize_model(llama(tied), ON)
    for survivor in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_tied(survivor) == tied and torch.equal(logits(survivor), logits(model))
        survivor.resize_token_embeddings(70)
        assert model.get_input_embeddings().num_embeddings == 64


def test_dequantized_the_float_weights_are_tied_again(tmp_path, tied):
    model = quantize_model(llama(tied), ON)
    expected = logits(model)
    model.dequantize()
    assert type(model.model.embed_tokens) is nn.Embedding
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(model), expected, rtol=1e-2, atol=5e-3)
    again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "float"))
    torch.testing.assert_close(logits(again), logits(model))
    model.resize_token_embeddings(70)
    assert model.lm_head.weight.shape[0] == 70


@pytest.mark.parametrize("rows", [50, 64, 71])
def test_resized_tables_keep_the_rows_they_had_to_the_bit(tmp_path, tied, rows):
    model = quantize_model(llama(tied), ON)
    before, expected = copy.deepcopy(model), logits(model)
    returned = model.resize_token_embeddings(rows, mean_resizing=False)
    assert returned is model.get_input_embeddings() and isinstance(returned, QuantizedEmbedding)
    assert model.config.vocab_size == rows == model.lm_head.out_features and is_tied(model) == tied
    kept = min(rows, 64)
    for part in ("model.embed_tokens", "lm_head"):
        for name in STORED:
            new, old = model.get_parameter(f"{part}.{name}"), before.get_parameter(f"{part}.{name}")
            assert len(new) == rows and torch.equal(new[:kept], old[:kept])
    known = TOKENS.clamp(max=kept - 1)
    with torch.no_grad():
        expected = before(known).logits[..., :kept]
        assert torch.allclose(model(known).logits[..., :kept], expected, atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "resized"))
    assert is_tied(again) == tied and torch.equal(again(known).logits, model(known).logits)


def test_resizing_an_offloaded_table_is_refused(tmp_path):
    folder = saved(llama(True), tmp_path / "float")
    device_map = {"model": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"}
    device_map = {"model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"} | {
        "model.embed_tokens": "disk",
        "lm_head": "disk",
    }
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"is offloaded.*without a device_map"):
        model.resize_token_embeddings(70)


def test_half_of_a_tied_pair_is_not_quantized():
    config = MonoQuantConfig(quantize_embeddings=True, modules_to_not_convert=["lm_head"])
    model = quantize_model(llama(True), config)
    decisions = {d.module: d for d in model.hf_quantizer.decisions}
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    assert decisions["model.embed_tokens"].reason == (
        "it shares its weight with lm_head, which stays in float: modules_to_not_convert: 'lm_head'"
    )
    untied = quantize_model(llama(False), config)
    assert type(untied.lm_head) is nn.Linear and isinstance(untied.model.embed_tokens, QuantizedEmbedding)


def test_off_by_default_and_the_gain_is_said(caplog):
    with caplog.at_level("INFO", "mono_quant_hf"):
        model = quantize_model(llama(True))
    assert type(model.model.embed_tokens) is nn.Embedding
    decisions = {d.module: d for d in model.hf_quantizer.decisions}
    assert decisions["model.embed_tokens"].reason == "quantize_embeddings is off"
    saved_bytes = 64 * 32 * 3 - 5 * 64
    assert f"quantize_embeddings=True would save another {saved_bytes / 1000:.1f} kB" in caplog.text
    assert " instead of " in caplog.text


def test_the_config_remembers(tmp_path):
    assert MonoQuantConfig.from_dict(ON.to_dict()).quantize_embeddings is True
    with pytest.raises(TypeError, match="quantize_embeddings must be True or False"):
        MonoQuantConfig(quantize_embeddings=1)


def test_scaled_tables_of_gemma(tmp_path):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
    )
    model = Gemma3ForCausalLM(config).eval()
    for dtype in (torch.float32, torch.bfloat16):
        quantized = load(saved(model, tmp_path / "float"), dtype=dtype)
        assert isinstance(quantized.model.embed_tokens, QuantizedEmbedding) and is_tied(quantized)
        table = copy.deepcopy(model.model.embed_tokens).to(dtype)
        found, reference = quantized.model.embed_tokens(TOKENS), table(TOKENS)
        assert found.dtype == dtype
        torch.testing.assert_close(found, reference, rtol=0.02, atol=0.05)
        again = AutoModelForCausalLM.from_pretrained(saved(quantized, tmp_path / "int8"))
        assert torch.equal(logits(again), logits(quantized)) and is_tied(again)


def test_three_tables_and_a_head_on_one_weight(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "float")
    quantized = T5ForConditionalGeneration.from_pretrained(tmp_path / "float", quantization_config=ON).eval()
    tables = [
        quantized.shared,
        quantized.encoder.embed_tokens,
        quantized.decoder.embed_tokens,
        quantized.lm_head,
    ]
    for name in STORED:
        assert len({id(getattr(table, name)) for table in tables}) == 1
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert type(quantized.get_submodule(bias)) is nn.Embedding
    quantized.save_pretrained(tmp_path / "int8")
    in_towers = {n for n in stored_names(tmp_path / "int8") if "embed_tokens" in n}
    assert in_towers == {f"{tower}.embed_tokens.weight_dtype" for tower in ("encoder", "decoder")}
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "int8").eval()
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, quantized(**inputs).logits)
        by_hand = dequantized_by_hand(model, quantized.hf_quantizer.decisions)
        torch.testing.assert_close(quantized(**inputs).logits, by_hand(**inputs).logits, rtol=1e-2, atol=5e-3)


def test_a_head_with_a_tied_weight_and_its_own_bias(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = BertForMaskedLM(config).eval()
    model.cls.predictions.bias.data.normal_()
    model.save_pretrained(tmp_path / "float")
    quantized = BertForMaskedLM.from_pretrained(tmp_path / "float", quantization_config=ON).eval()
    assert is_tied(quantized) and torch.equal(
        quantized.cls.predictions.decoder.bias, model.cls.predictions.bias
    )
    quantized.save_pretrained(tmp_path / "int8")
    again = BertForMaskedLM.from_pretrained(tmp_path / "int8").eval()
    assert torch.equal(logits(again), logits(quantized)) and is_tied(again)
    assert type(quantized.bert.embeddings.position_embeddings) is nn.Embedding
    overrides = {"bert.embeddings.position_embeddings": {"weights": "int8"}}
    named = MonoQuantConfig(quantize_embeddings=True, module_overrides=overrides)
    assert isinstance(quantize_model(model, named).bert.embeddings.position_embeddings, QuantizedEmbedding)


def test_every_table_of_a_module_that_is_no_transformers_model():
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.kinds = nn.Embedding(40, 16), nn.Embedding(8, 16)
            self.out = nn.Linear(16, 40, bias=False)
            self.out.weight = self.words.weight

        def forward(self, words, kinds):
            return self.out(self.words(words) + self.kinds(kinds))

    model = Tagger()
    inputs = torch.arange(10), torch.arange(10) % 8
    expected = model(*inputs)
    assert type(quantize_model(copy.deepcopy(model)).words) is nn.Embedding
    quantize_model(model, ON)
    assert isinstance(model.words, QuantizedEmbedding) and isinstance(model.kinds, QuantizedEmbedding)
    assert type(model.out) is nn.Linear or model.out.weight_int8 is model.words.weight_int8
    torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=0.2)


def test_a_new_head_on_quantized_tables_stays_float(tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = saved(quantize_model(llama(True), ON), tmp_path / "int8")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding) and type(model.score) is nn.Linear
