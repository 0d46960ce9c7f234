import json
import re

import pytest
import torch
from torch import nn

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.integration import Decision, patterns, quantized_share
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


EVIL = r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)\10\9\8\7\6\5\4\3\2"


@pytest.mark.parametrize("pattern", [EVIL, r"(?R)?"], ids=["endless in time", "endless in memory"])
@pytest.mark.parametrize("field", ["modules_to_not_convert", "module_overrides"])
def test_a_catastrophic_pattern_is_an_error_and_no_endless_load(field, pattern, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    value = [pattern] if field == "modules_to_not_convert" else {f"re:{pattern}": {"weights": "float"}}
    with pytest.raises(ValueError, match=f"{field}.*takes too long to match.*simplify it"):
        decide(tiny_models.llama(), MonoQuantConfig(**{field: value}))


class Clock:
    """Processor time that passes only in `regex`, by a fixed amount for each match."""

    def __init__(self, monkeypatch, each):
        self.now, self.each, self.matches = 0.0, each, 0
        monkeypatch.setattr(patterns, "thread_time", lambda: self.now)
        monkeypatch.setattr(patterns.regex, "compile", lambda pattern: self)

    def match(self, name, timeout):
        self.matches += 1
        self.now += min(self.each, timeout)
        if timeout < self.each:
            raise TimeoutError


@pytest.mark.parametrize("each", [0.5, 0.005, 0.0005])
def test_patterns_that_are_slow_only_together_are_an_error_too(each, monkeypatch):
    """Half a millisecond each is an hour for a thousand patterns in a model of ten thousand modules."""
    clock = Clock(monkeypatch, each)
    half = [f"a{n}.*" for n in range(250)]
    config = MonoQuantConfig(
        modules_to_not_convert=half, module_overrides={f"re:{pattern}": {} for pattern in half}
    )
    clock.matches = 0
    with pytest.raises(ValueError, match="takes too long to match, alone or with the other patterns"):
        decide(tiny_models.llama(layers=12), config)
    assert clock.matches == pytest.approx(patterns.SECONDS / each, abs=2)


def test_time_that_other_threads_take_is_not_a_pattern_s(monkeypatch):
    """regex counts the time of the whole process: it gives up early where other threads compute too."""
    clock = Clock(monkeypatch, 0.0)
    gives_up = iter([True, True, False] * 1000)

    def match(name, timeout):
        if next(gives_up):
            raise TimeoutError
        return True

    clock.match = match
    decisions = decide(tiny_models.llama(layers=1), MonoQuantConfig(modules_to_not_convert=["a.*"]))
    assert not any(decision.quantized for decision in decisions)


PLAIN = """
model.layers.0 model.layers.1. layers up_proj mlp.up_proj modelxlayers model-layers.0 model.layers. mode . ..
layers.1 model.layers.0.mlp.up_proj lm_head m.... l.......0
"""


@pytest.mark.parametrize("pattern", PLAIN.split())
def test_a_plain_name_matches_as_the_expression_it_is(pattern):
    names = [*dict(tiny_models.llama().named_modules()), "modelxlayers.0", "model"]
    expression = re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
    matches = patterns.as_in_transformers(pattern, patterns.Stopwatch())
    for name in names:
        assert matches(name) == (name.endswith(pattern) or expression.match(name) is not None), name


def test_many_patterns_without_a_match_are_one_line(caplog):
    overrides = {f"never{n}": {} for n in range(5_000)}
    decide(tiny_models.llama(), MonoQuantConfig(module_overrides=overrides))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == patterns.MOST_HINTS + 1
    assert "module_overrides: 4,995 more patterns match no module." in said[-1]
