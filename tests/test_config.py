import contextlib
import copy
import json
import sys

import pytest
from transformers import AutoConfig, LlamaConfig

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.config import FIELDS, FORMAT_VERSION

EVERY_FIELD = {
    "weights": "int8",
    "symmetric": True,
    "activations": "int8",
    "quantize_embeddings": True,
    "checksums": "xxh3:AAAAAAAAAAA=:AAAAAAAAAAA=",
    "modules_to_not_convert": ["model.layers.0", "re.*"],
    "module_overrides": {
        "model.*.mlp.*": {"weights": "int8", "symmetric": True, "activations": None},
        "re:.*q_proj": {"weights": "float"},
    },
}


def test_json_round_trip_keeps_every_field():
    config = MonoQuantConfig(**EVERY_FIELD)
    restored = MonoQuantConfig.from_dict(json.loads(config.to_json_string()))
    assert restored == config and restored.to_dict() == {
        "quant_method": "mono_quant",
        "format_version": FORMAT_VERSION,
        **EVERY_FIELD,
    }
    assert set(EVERY_FIELD) == set(FIELDS) - {"format_version"}
    assert copy.deepcopy(config) == config != MonoQuantConfig()


def test_it_lives_in_the_config_json_of_a_model(tmp_path):
    model_config = LlamaConfig()
    model_config.quantization_config = MonoQuantConfig(**EVERY_FIELD)
    model_config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert MonoQuantConfig.from_dict(loaded) == MonoQuantConfig(**EVERY_FIELD)


def test_from_dict_takes_known_keywords_and_hands_back_the_rest():
    config, unused = MonoQuantConfig.from_dict(
        {"weights": "int8"}, return_unused_kwargs=True, symmetric=True, x=1
    )
    assert config.symmetric is True and unused == {"x": 1}


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"weights": "int7"}, ValueError, r"weights='int7'.*'int8', 'float16'"),
        ({"weights": 8}, TypeError, r"weights must be a string, not int \(8\)"),
        ({"symmetric": "yes"}, TypeError, "symmetric must be True or False, not 'yes'"),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, not 1"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "modules_to_not_convert must be a list"),
        ({"modules_to_not_convert": [3]}, TypeError, "modules_to_not_convert holds 3"),
        ({"modules_to_not_convert": ["("]}, ValueError, "'\\('.*regular expression"),
        ({"modules_to_not_convert": ["(" * 9999 + ")" * 9999]}, ValueError, "regular expression.*recursion"),
        ({"module_overrides": {"re:a{99999999999}": {}}}, ValueError, "its counts ask for more than 10,000"),
        (
            {"modules_to_not_convert": ["(?:a{,1000}){1000}"]},
            ValueError,
            "its counts ask for more than 10,000",
        ),
        ({"modules_to_not_convert": ["(?x)(?:a{10 00}){1000}"]}, ValueError, r"\(\?x\) is not allowed"),
        (
            {"modules_to_not_convert": ["a|" * 20_000]},
            ValueError,
            "expressions and globs of 40,000 characters",
        ),
        ({"weights": "int\x1b[31m" * 99}, ValueError, r"weights='int\\x1b.*\.\.\..*is not supported"),
        ({"self": 1}, TypeError, "no field 'self'"),
        (
            {"modules_to_not_convert": ["a" * 2_000_000]},
            ValueError,
            "1 patterns of 2,000,000 characters; at m",
        ),
        ({"module_overrides": {f"a{i}": {} for i in range(20_000)}}, ValueError, "holds 20,000 patterns of"),
        ({"module_overrides": ["x"]}, TypeError, "module_overrides must be a dict"),
        ({"module_overrides": {"x": "int8"}}, TypeError, r"module_overrides\['x'\] must be a dict"),
        ({"module_overrides": {"x": {"bits": 4}}}, ValueError, "sets 'bits'; it may set weights, symmetric"),
        ({"module_overrides": {"x": {"weights": "int4"}}}, ValueError, "int4.*'int8', 'float16', 'float'"),
        ({"module_overrides": {"re:[": {"weights": "float"}}}, ValueError, "re:\\[.*regular expression"),
        ({"activations": "int4"}, ValueError, "activations='int4'.*'int8'"),
        ({"weights": "float16", "activations": "int8"}, ValueError, "needs weights='int8', not 'float16'"),
        (
            {"module_overrides": {"x": {"weights": "float", "activations": "int8"}}},
            ValueError,
            r"\['x'\] sets activations, which need weights='int8', not 'float'",
        ),
        ({"wieghts": "int8"}, TypeError, "no field 'wieghts'; did you mean 'weights'"),
        (
            {"load_in_8bit_fp32": True},
            TypeError,
            "no field 'load_in_8bit_fp32'.*the fields are weights, symmetric",
        ),
        ({"quant_method": "gptq"}, ValueError, "mono_quant.*gptq"),
        ({"format_version": FORMAT_VERSION + 1}, ValueError, "upgrade mono_quant_hf"),
        (
            {"format_version": FORMAT_VERSION + 1, "new_field": 1},
            TypeError,
            "new_field.*upgrade mono_quant_hf",
        ),
        ({"checksums": "???"}, ValueError, "checksums is no list of checksums"),
        ({"checksums": "xxh3:AAAAAAAAAAA=:AAAA"}, ValueError, "checksums is no list of checksums"),
        ({"format_version": "1"}, TypeError, "format_version must be an integer"),
    ],
)
def test_what_is_wrong_is_refused_where_it_is_made(fields, error, words):
    with pytest.raises(error, match=words):
        MonoQuantConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [("weights", "int7", ValueError), ("symmetric", None, TypeError), ("wieghts", "int8", AttributeError)],
)
def test_and_where_it_is_set_later(field, value, error):
    config = MonoQuantConfig()
    with pytest.raises(error, match=field):
        setattr(config, field, value)
    with pytest.raises(error, match=field):
        config.update(**{field: value}) if hasattr(config, field) else setattr(config, field, value)
    assert config == MonoQuantConfig()


OPENED: list[str] | None = None


def _note(event, arguments):
    if OPENED is not None and event in ("open", "exec", "compile", "import", "os.system", "subprocess.Popen"):
        OPENED.append(f"{event} {arguments}")


def test_a_config_of_a_stranger_opens_nothing_and_runs_nothing(tmp_path):
    global OPENED
    path = str(tmp_path / "file")
    junk = [
        path,
        "__import__('os').system('true')",
        "!!python/object",
        "torch.nn.Linear",
        {"a": path},
        [path],
    ]
    fields = {**EVERY_FIELD, "trust_remote_code": True, "auto_map": path, "_target_": "os.system"}
    MonoQuantConfig.from_dict(EVERY_FIELD)
    sys.addaudithook(_note)
    for field in fields:
        for value in junk:
            OPENED = []
            with contextlib.suppress(TypeError, ValueError):
                MonoQuantConfig.from_dict({**EVERY_FIELD, field: value})
            noted, OPENED = OPENED, None
            assert not noted, (field, value)
