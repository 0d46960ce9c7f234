"""`generate`: a float and a quantized model answer, and say how fast."""

import json

import pytest

from mono_quant_hf.cli.main import main


@pytest.fixture(scope="module")
def folder(models):
    assert main(["quantize", str(models / "float"), str(models / "quantized")]) == 0
    return models


def test_a_float_model_answers_as_its_quantized_form_does(folder, tmp_path, capsys):
    answers = []
    for name in ("float", "quantized"):
        call = ["generate", str(folder / name), "--prompt", "the", "--max-new-tokens", "6", "--json"]
        assert main([*call, str(tmp_path / f"{name}.json")]) == 0
        said = capsys.readouterr().out
        assert " tokens in " in said and ", the first after " in said
        answers.append(json.loads((tmp_path / f"{name}.json").read_text()))
        assert answers[-1]["answer"].strip() in said
    assert answers[0]["answer"] == answers[1]["answer"] and 1 <= answers[0]["tokens"] <= 6


def test_settings_are_for_float_models(folder, capsys):
    assert main(["generate", str(folder / "quantized"), "--prompt", "the", "--symmetric"]) == 2
    assert "quantized already" in capsys.readouterr().err
