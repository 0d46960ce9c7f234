"""PEFT's adapters on quantized modules: trained, saved, merged and taken out again."""

import copy
import pickle
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from mono_quant_hf import MonoQuantConfig, quantize_model, versions
from mono_quant_hf.core import quantize_to_codes
from mono_quant_hf.integration import adapters
from mono_quant_hf.modules import QuantizedEmbedding, QuantizedModule
from tests.evaluation.conftest import TEXT, make_tokenizer
from tests.tiny_models import IMAGES, TOKENS, llama, logits, relative_error, resnet

from .families import FAMILIES

peft = pytest.importorskip("peft")
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:Merging an adapter into:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
CONFIGS = {
    "asymmetric": {},
    "symmetric": {"symmetric": True},
    "float16": {"weights": "float16"},
}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids, initializer_range=0.2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


MODELS = {
    "Linear": (llama, ["q_proj", "down_proj"]),
    "Embedding": (llama, ["embed_tokens", "v_proj"]),
    "Conv1D": (gpt2, ["c_attn", "c_proj"]),
    "Conv2d": (resnet, "(resnet.encoder|resnet.embedder.embedder).*convolution"),
}
models = pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)


def codes(model):
    """A copy of all tensors of the quantized modules, by the name they have without adapters."""
    return {
        f"{name}.{key}".replace("base_model.model.", "").replace(".base_layer", ""): value.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for key, value in module.named_parameters(recurse=False)
    }


def assert_same_codes(model, expected):
    found = codes(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def shake(model, scale=0.05):
    """Adapters that do something, as if trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + scale * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def adapted(make=llama, targets=("q_proj", "down_proj"), config=None, names=("default",), **kind):
    quantized = quantize_model(make(), MonoQuantConfig(quantize_embeddings=True, **(config or {})))
    target = targets if isinstance(targets, str) else list(targets)
    lora = LoraConfig(target_modules=target, r=4, **kind)
    model = get_peft_model(quantized, lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(lora))
    return shake(model).eval()


def rows():
    return [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]


def train(model, folder, steps=12, **arguments):
    defaults = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True}
    settings = {"max_steps": steps, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(folder), **defaults, **settings, **arguments),
        train_dataset=rows(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@kinds
@configs
def test_trainer_lowers_the_loss_and_leaves_the_codes(tmp_path, kind, config):
    quantized = quantize_model(llama(), MonoQuantConfig(quantize_embeddings=True, **config))
    before = codes(quantized)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj", "embed_tokens"]
    model = get_peft_model(quantized, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **kind))
    losses = train(model, tmp_path)
    assert losses[-1] < 0.8 * losses[0]
    assert_same_codes(model, before)


@pytest.mark.parametrize("arguments", [{"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer_with_checkpointing_and_mixed_precision(tmp_path, arguments):
    quantized = quantize_model(llama(), MonoQuantConfig())
    before = codes(quantized)
    model = get_peft_model(quantized, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]))
    losses = train(model, tmp_path, **arguments)
    assert losses[-1] < losses[0]
    assert_same_codes(model, before)


@kinds
@models
@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
def test_merge_rounds_the_right_weight_and_unmerge_is_exact(make, targets, kind, safe):
    model = adapted(make, targets, **kind)
    before, expected = codes(model), logits(model)
    with model.disable_adapter():
        untouched = logits(model)
    model.merge_adapter(safe_merge=safe)
    merged = logits(model)
    assert relative_error(merged, expected) < 0.2 * relative_error(untouched, expected)
    model.unmerge_adapter()
    assert_same_codes(model, before)
    assert torch.equal(logits(model), expected)
    model.merge_adapter(safe_merge=safe)
    with model.disable_adapter():  # which takes a merge back
        assert torch.equal(logits(model), untouched)
    assert_same_codes(model, before)


@configs
def test_merge_is_quantization_of_the_float_sum(config):
    model = adapted(config=config, targets=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    base = layer.base_layer
    total = base.dequantized() + layer.get_delta_weight("default").detach()
    merged = model.merge_and_unload(safe_merge=True).model.layers[0].self_attn.q_proj
    assert merged is base
    if config.get("weights") == "float16":
        assert torch.equal(merged.weight_float16, total.half())
        return
    expected = quantize_to_codes(total, config.get("symmetric", False))
    assert all(a is b or torch.equal(a, b) for a, b in zip(merged.stored(), expected, strict=True))


@kinds
@models
def test_merged_models_are_saved_and_reloaded_to_the_bit(tmp_path, make, targets, kind):
    model = adapted(make, targets, **kind).merge_and_unload()
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert_same_codes(again, codes(model))


def test_rows_that_an_adapter_does_not_touch_keep_their_codes():
    model = adapted(targets=["embed_tokens"])
    table = model.base_model.model.model.embed_tokens
    with torch.no_grad():
        table.lora_embedding_A["default"][:, 5:] = 0
    before = codes(table.base_layer)
    merged = codes(model.merge_and_unload().model.embed_tokens)
    for name in (".weight_int8", ".weight_scale", ".weight_zero_point"):
        found, kept = merged[name], before[name]
        assert torch.equal(found[5:], kept[5:]) and not torch.equal(found[:5], kept[:5])


def test_the_rounding_is_told_in_decibels(caplog):
    model = adapted()
    with (
        caplog.at_level("INFO", "mono_quant_hf"),
        pytest.warns(UserWarning, match=r"SQNR of -?\d+ to -?\d+ dB"),
    ):
        model.merge_and_unload()
    told = [record.getMessage() for record in caplog.records if "merged with an SQNR" in record.getMessage()]
    assert len(told) == 4 and told[0].startswith("model.layers.0.self_attn.q_proj.weight: ")


def test_an_adapter_that_does_nothing_costs_nothing():
    quantized = quantize_model(llama(), MonoQuantConfig())
    before = codes(quantized)
    model = get_peft_model(quantized, LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Merging")
        assert_same_codes(model.merge_and_unload(), before)


def test_a_broken_adapter_leaves_everything_as_it_was():
    model = adapted(targets=["q_proj"], names=("default", "broken"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["broken"].weight[0, 0] = float("nan")
    layer.merge()
    before = codes(model)
    for safe, message in [
        (True, "broken"),
        (False, r"q_proj\.weight cannot be quantized. The weight contains"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer.merge(safe_merge=safe, adapter_names=["broken"])
        assert layer.merged_adapters == ["default"]
        assert_same_codes(model, before)


@kinds
def test_adapters_merged_one_after_the_other_are_rounded_once(kind):
    one, two = (adapted(names=("first", "second"), **kind) for _ in range(2))
    before = codes(one)
    one.merge_adapter(adapter_names=["first", "second"])
    two.merge_adapter(adapter_names=["first"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        two.merge_adapter(adapter_names=["second"])
    assert_same_codes(two, codes(one))
    two.unmerge_adapter()
    assert_same_codes(two, before)


def test_adapters_side_by_side():
    model = adapted(names=("first", "second"))
    found = []
    for name in ("first", "second"):
        model.set_adapter(name)
        found.append(logits(model))
    assert not torch.equal(*found)
    with torch.no_grad():
        mixed = model(input_ids=TOKENS, adapter_names=["first", "second"]).logits
    torch.testing.assert_close(mixed, torch.stack([found[0][0], found[1][1]]), rtol=1e-3, atol=1e-3)
    model.delete_adapter("second")
    assert torch.equal(logits(model), found[0])


def test_a_bias_is_merged_and_comes_back():
    model = adapted(gpt2, ["c_attn"], lora_bias=True)
    before, expected = codes(model), logits(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert not torch.equal(
            codes(model)["transformer.h.0.attn.c_attn.bias"], before["transformer.h.0.attn.c_attn.bias"]
        )
        assert relative_error(logits(model), expected) < 0.1
        model.unmerge_adapter()
        assert_same_codes(model, before)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_tied_embeddings_are_untied_by_a_merge(tmp_path, targets):
    model = adapted(lambda: llama(tied=True), targets)
    expected, before = logits(model), codes(model)
    model.merge_adapter()
    assert relative_error(logits(model), expected) < 0.1
    model.unmerge_adapter()
    assert_same_codes(model, before)
    inner = model.base_model.model
    tables = [getattr(part, "base_layer", part) for part in (inner.lm_head, inner.model.embed_tokens)]
    assert tables[0].weight_int8 is tables[1].weight_int8
    merged = model.merge_and_unload()
    assert relative_error(logits(merged), expected) < 0.1
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))


def test_dora_sees_the_dequantized_weight():
    model = get_peft_model(
        quantize_model(llama(), MonoQuantConfig()), LoraConfig(target_modules=["q_proj"], use_dora=True)
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), layer.base_layer.dequantized().norm(dim=1))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("make, targets", [MODELS["Linear"], MODELS["Conv2d"]], ids=["Linear", "Conv2d"])
def test_bfloat16_adapters(make, targets, dropout):
    model = adapted(make, targets, use_dora=True, lora_dropout=dropout)
    inputs = {"input_ids": TOKENS} if make is llama else {"pixel_values": IMAGES}
    with torch.no_grad():
        expected = model(**inputs).logits
    model = model.to(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        assert relative_error(model(**inputs).logits, expected) < 0.1
    model.train()(**inputs).logits.float().sum().backward()
    with pytest.warns(UserWarning, match="SQNR"):
        model.merge_adapter()


@kinds
def test_adapters_are_saved_and_loaded_in_every_way(tmp_path, kind):
    base, adapter = tmp_path / "int8", tmp_path / "adapter"
    quantize_model(llama(), MonoQuantConfig()).save_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **kind),
    )
    expected = logits(shake(model).eval())
    model.save_pretrained(adapter)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    lean = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True
    )
    loaded_by_peft = [by_peft, lean, AutoPeftModelForCausalLM.from_pretrained(adapter)]
    by_transformers = AutoModelForCausalLM.from_pretrained(base)
    by_transformers.load_adapter(str(adapter))
    by_folder = AutoModelForCausalLM.from_pretrained(adapter)
    # transformers loses the magnitudes of DoRA, of float models too
    by_others = [] if "use_dora" in kind else [by_transformers, by_folder]
    for loaded in loaded_by_peft + by_others:
        assert torch.equal(logits(loaded.eval()), expected)
    for loaded in (by_peft, lean):
        merged = loaded.merge_and_unload(safe_merge=True)
        assert 0 < relative_error(logits(merged), expected) < 0.1


FORMS = {"float": None, **CONFIGS}


def in_form(form):
    """The tiny Llama, in float or with quantized embeddings."""
    config = FORMS[form]
    return (
        llama()
        if config is None
        else quantize_model(llama(), MonoQuantConfig(quantize_embeddings=True, **config))
    )


@pytest.mark.parametrize("loaded_on", FORMS)
@pytest.mark.parametrize("trained_on", FORMS)
def test_the_adapter_of_an_embedding_loads_on_every_form_of_its_model(tmp_path, trained_on, loaded_on):
    """PEFT saves the table with the adapter: its codes must not become the weights of a float model."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"], r=4)
    trained = shake(get_peft_model(in_form(trained_on), config)).eval()
    trained.save_pretrained(tmp_path)
    by_peft = PeftModel.from_pretrained(in_form(loaded_on), tmp_path).eval()
    by_transformers = in_form(loaded_on)
    by_transformers.load_adapter(str(tmp_path))
    for loaded in (by_peft, by_transformers.eval()):
        assert relative_error(logits(loaded), logits(trained)) < 0.05
        if loaded_on == trained_on:
            assert torch.equal(logits(loaded), logits(trained))


@pytest.mark.parametrize("loaded_on", CONFIGS)
@pytest.mark.parametrize("trained_on", FORMS)
def test_rows_added_before_the_adapter_come_with_it(tmp_path, trained_on, loaded_on):
    trained, base = in_form(trained_on), in_form(loaded_on)
    for model in (trained, base):
        model.resize_token_embeddings(70)  # the new rows are drawn at random
    trained = get_peft_model(trained, LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], r=4))
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    new = torch.arange(64, 70)
    with torch.no_grad():
        rows = [model.get_input_embeddings()(new) for model in (loaded, trained)]
    assert relative_error(*rows) < 0.02


def halved():
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


@configs
def test_a_whole_state_dict_goes_in_again(config):
    model = adapted(targets=["embed_tokens", "q_proj"], config=config)
    again = adapted(halved, ["embed_tokens", "q_proj"], config)
    assert not torch.equal(logits(again), logits(model))
    again.load_state_dict(model.state_dict())
    assert_same_codes(again, codes(model))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "survive", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies(survive):
    model = adapted()
    expected, before = logits(model), codes(model)
    model.merge_adapter()
    again = survive(model)
    assert torch.equal(logits(again), logits(model))
    again.unmerge_adapter()
    assert_same_codes(again, before)
    assert torch.equal(logits(again), expected) and not torch.equal(logits(model), expected)


def test_offloaded_layers_do_not_merge(tmp_path):
    llama().save_pretrained(tmp_path / "float")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float",
        quantization_config=MonoQuantConfig(),
        device_map={"model.layers.0": "cpu", "model.layers.1": "disk", "model.embed_tokens": "cpu",
                    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )  # fmt: skip
    model = get_peft_model(quantized, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="is offloaded, where PEFT would lose what is merged"):
        model.base_model.model.model.layers[1].self_attn.q_proj.merge()


REFUSED = {
    "pissa": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights=True"),
    "olora": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "init_lora_weights=True"),
    "modules_to_save": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "lm_head is quantized and cannot be trained itself.*modules_to_not_convert",
    ),
    "trainable tokens": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        "embed_tokens is quantized and cannot be trained itself",
    ),
    "experts": (
        next(family for family in FAMILIES if family.name == "Qwen3-MoE").make,
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        "no `target_parameters` found",
    ),
}


@pytest.mark.parametrize(("make", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_one_clear_error(make, settings, message):
    quantized = quantize_model(make(), MonoQuantConfig(quantize_embeddings=True))
    with pytest.raises(ValueError, match=message):
        get_peft_model(quantized, LoraConfig(**settings))


def test_other_methods_of_peft_are_refused():
    quantized = quantize_model(llama(), MonoQuantConfig())
    with pytest.raises(ValueError, match="adapters of the kind 'vblora' are not known to merge"):
        get_peft_model(
            quantized, peft.VBLoRAConfig(target_modules=["q_proj"], vector_length=4, num_vectors=8)
        )


def test_grouped_convolutions_train_and_peft_refuses_to_merge_them():
    quantized = quantize_model(nn.Sequential(nn.Conv2d(8, 8, 3, groups=4)))
    with pytest.warns(UserWarning, match="groups > 1"):
        model = get_peft_model(quantized, LoraConfig(target_modules=["0"], r=4))
    model(torch.randn(1, 8, 5, 5)).sum().backward()
    before = codes(model)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_adapter()
    assert_same_codes(model, before)


def test_float_modules_are_left_to_peft():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert type(model.base_model.model.model.embed_tokens) is peft.tuners.lora.Embedding
    assert not isinstance(model.base_model.model.model.embed_tokens.base_layer, QuantizedEmbedding)


def test_the_package_does_not_import_peft():
    code = "import sys, mono_quant_hf; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def example():
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "lora.py"))["main"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_example(example, tmp_path, capsys, kind):
    llama().save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    where = [str(tmp_path / "float"), "--text-file", str(tmp_path / "text.txt"), "--output", str(out)]
    assert example([*where, "--kind", kind, "--steps", "10", "--window", "8", "--learning-rate", "1e-2"]) == 0
    said = capsys.readouterr().out
    first, last = re.search(r"loss: ([\d.]+) at first, ([\d.]+) at last", said).groups()
    assert float(last) < float(first)
    adapted = AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    assert [module for module in merged.modules() if isinstance(module, QuantizedModule)]
    assert relative_error(logits(merged), logits(adapted)) < 0.1
    assert example([*where, "--window", "100000"]) == 2
    assert "fewer than --window" in capsys.readouterr().err


def test_a_newer_peft_than_tested_is_one_warning(monkeypatch, caplog):
    monkeypatch.setitem(versions.TESTED, "peft", "0.1")
    adapters._look_at_version.cache_clear()
    adapters.on_quantized.cache_clear()
    for _ in range(2):
        get_peft_model(quantize_model(llama()), LoraConfig(target_modules=["q_proj"]))
    assert [record.getMessage().split(",")[0] for record in caplog.records].count(
        "mono_quant_hf was tested with peft up to 0.1"
    ) == 1
    adapters._look_at_version.cache_clear()
