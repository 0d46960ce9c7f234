"""The search for overrides: budgets hold, as measured on the model made with what it found."""

import copy
import json

import pytest
import torch
from torch import nn

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.cli.main import main
from mono_quant_hf.evaluation import search_overrides
from mono_quant_hf.hub.estimate import bytes_when_quantized
from tests import tiny_models
from tests.evaluation.conftest import TEXT, make_llama, make_tokenizer

INPUTS = {"input_ids": tiny_models.TOKENS}


def bytes_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def kl_of(model, quantized):
    p, q = (tiny_models.logits(m).double().log_softmax(-1) for m in (model, quantized))
    return float((p.exp() * (p - q)).sum(-1).mean())


def made_with(model, result):
    return quantize_model(
        copy.deepcopy(model), MonoQuantConfig(module_overrides=result.module_overrides or None)
    )


def test_a_budget_in_kl_is_met_by_the_model_made_with_the_overrides():
    model = tiny_models.llama()
    worst = kl_of(model, quantize_model(copy.deepcopy(model)))
    result = search_overrides(model, INPUTS, max_kl=worst / 3)
    quantized = made_with(model, result)
    assert result.met and result.kl <= worst / 3
    assert kl_of(model, quantized) == pytest.approx(result.kl, rel=1e-4)
    assert bytes_of(quantized) == result.bytes < result.float_bytes == bytes_of(model)
    # one step less along the frontier would not do
    assert result.frontier[result.chosen - 1].measured_kl > worst / 3
    assert bytes_of(quantize_model(copy.deepcopy(model))) == result.frontier[0].bytes


def test_a_budget_in_bytes_is_used_and_kept():
    model = tiny_models.llama()
    smallest, whole = bytes_of(quantize_model(copy.deepcopy(model))), bytes_of(model)
    budget = (smallest + whole) // 2
    result = search_overrides(model, INPUTS, max_bytes=budget)
    assert result.met and result.bytes <= budget < result.frontier[result.chosen + 1].bytes
    assert bytes_of(made_with(model, result)) == result.bytes
    assert result.kl < kl_of(model, quantize_model(copy.deepcopy(model)))


def test_the_frontier_goes_from_int8_to_float():
    model = tiny_models.llama()
    result = search_overrides(model, INPUTS, max_kl=1.0)
    sizes = [point.bytes for point in result.frontier]
    assert result.chosen == 0 and result.module_overrides == {} and sizes == sorted(sizes)
    assert sizes[-1] == bytes_of(model) and result.frontier[-1].predicted_kl == 0
    assert "> " in result.table() and type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("tied", [False, True])
def test_what_the_config_settles_is_not_chosen_for(tied):
    model = tiny_models.llama(tied=tied)
    config = MonoQuantConfig(
        symmetric=True,
        quantize_embeddings=True,
        modules_to_not_convert=["o_proj"],
        module_overrides={"*.down_proj": {"weights": "float16"}, "*.up_proj": {"weights": "float"}},
    )
    worst = copy.deepcopy(model)
    result = search_overrides(
        model, INPUTS, max_kl=kl_of(model, quantize_model(worst, config)) * 0.9, config=config
    )
    chosen = {name for name in result.module_overrides if "*" not in name}
    assert [*result.module_overrides][:2] == [*config.module_overrides] and chosen
    assert all(name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj")) for name in chosen)
    config.module_overrides = result.module_overrides
    made = quantize_model(copy.deepcopy(model), config)
    assert bytes_of(made) - result.bytes == 4  # the number that says the dtype where the embedding is codes
    assert kl_of(model, made) == pytest.approx(result.kl, rel=1e-3)


def test_a_size_that_cannot_be_reached_is_said():
    result = search_overrides(tiny_models.llama(), INPUTS, max_bytes=10)
    assert not result.met and result.chosen == 0


def test_a_bfloat16_model_is_not_offered_float16():
    result = search_overrides(tiny_models.llama(dtype=torch.bfloat16), INPUTS, max_kl=1e-9)
    assert {override["weights"] for override in result.module_overrides.values()} == {"float"}


def test_what_cannot_be_searched():
    with pytest.raises(ValueError, match="one budget above 0, got max_bytes=None"):
        search_overrides(tiny_models.llama(), INPUTS)
    with pytest.raises(ValueError, match="and max_kl=0"):
        search_overrides(tiny_models.llama(), INPUTS, max_kl=0)
    with pytest.raises(TypeError, match="logits"):
        search_overrides(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(1, 4), max_kl=1)


def test_the_command(tmp_path, capsys):
    make_llama().save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["search", str(tmp_path / "float"), "--text-file", str(tmp_path / "text.txt")]
    saved = [
        *command,
        "--max-kl",
        "2e-5",
        "--save",
        str(tmp_path / "mixed"),
        "--json",
        str(tmp_path / "s.json"),
        "--symmetric",
    ]
    assert main(saved) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert "module_overrides" in capsys.readouterr().out and found["kl"] <= 2e-5
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert config["quantization_config"]["module_overrides"] == found["module_overrides"]
    assert config["quantization_config"]["symmetric"]
    least = bytes_when_quantized(
        tmp_path / "float", MonoQuantConfig(quantize_embeddings=True), torch.float32
    )  # of the codes; the scales do not fit beside them
    assert main([*command, "--max-size", f"{least}B"]) == 1
    with pytest.raises(SystemExit):
        main([*command, "--max-size", "much"])
