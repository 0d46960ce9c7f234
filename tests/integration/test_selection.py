import json
import time

import pytest
import torch
from torch import nn

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.integration import Decision, quantized_share
from mono_quant_hf.integration.selection import decide
from mono_quant_hf.modules import QuantizedModule
from tests import tiny_models


def test_every_module_with_weights_has_a_decision_as_plain_data():
    model = tiny_models.llama()
    decisions = decide(model, MonoQuantConfig(symmetric=True))
    owners = {n for n, m in model.named_modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    assert {decision.module for decision in decisions} == owners
    by_name = {decision.module: decision for decision in decisions}
    assert by_name["model.layers.0.mlp.up_proj"] == Decision(
        "model.layers.0.mlp.up_proj", "Linear", "int8", True, "", 32 * 88
    )
    assert by_name["lm_head"] == Decision(
        "lm_head", "Linear", "float", None, "output head or tied weight", 64 * 32
    )
    assert json.loads(json.dumps([d.to_dict() for d in decisions]))[0]["module"] == "model.embed_tokens"


def test_share():
    def decision(weights, parameters):
        return Decision("m", "Linear", weights, None, "", parameters)

    assert quantized_share([decision("int8", 30), decision("float", 10)]) == 0.75
    assert quantized_share([]) == 0


def test_the_first_override_that_matches_decides():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    overrides = {"a": {"weights": "float16"}, "a*": {"weights": "float"}, "re:b$": {"symmetric": True}}
    decisions = {d.module: d for d in decide(model, MonoQuantConfig(module_overrides=overrides))}
    assert [decisions[n].weights for n in ("a", "ab", "b")] == ["float16", "float", "int8"]
    assert decisions["b"].symmetric is True and decisions["b"].reason == "module_overrides['re:b$']"


@pytest.mark.parametrize("weights", ["int8", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_a_model_is_not_read_from_a_scale(dtype, weights):
    # Without a bias in front, the first floating-point parameter of a ResNet would be a float32 scale.
    model = quantize_model(tiny_models.resnet().to(dtype), MonoQuantConfig(weights=weights))
    stem = model.resnet.embedder.embedder.convolution
    assert isinstance(stem, QuantizedModule) and next(iter(stem.state_dict())) == "weight_dtype"
    assert model.dtype == model.resnet.dtype == dtype
    assert model.to(torch.float32).dtype == torch.float32
    says = [name for name, _ in model.named_parameters() if name.endswith("weight_dtype")]
    assert says == ["resnet.embedder.embedder.convolution.weight_dtype"]


@pytest.mark.parametrize("field", ["modules_to_not_convert", "module_overrides"])
def test_a_catastrophic_pattern_is_an_error_and_no_endless_load(field):
    evil = r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)\10\9\8\7\6\5\4\3\2"
    value = [evil] if field == "modules_to_not_convert" else {f"re:{evil}": {"weights": "float"}}
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"{field}.*takes too long to match.*simplify it"):
        decide(tiny_models.llama(), MonoQuantConfig(**{field: value}))
    assert time.monotonic() - started < 20


def test_patterns_that_are_slow_only_together_are_an_error_too(monkeypatch):
    """A fifth of a second each would be minutes in a model of a thousand modules."""

    def slow_match(pattern, name, timeout):
        time.sleep(min(0.2, timeout))
        if timeout < 0.2:
            raise TimeoutError

    monkeypatch.setattr("regex.match", slow_match)
    with pytest.raises(ValueError, match="modules_to_not_convert: 'slow' takes too long to match"):
        decide(tiny_models.llama(), MonoQuantConfig(modules_to_not_convert=["slow"]))
