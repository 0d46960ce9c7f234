"""`mono-quant-hf quantize`: what it saves is what the functions make."""

import errno
import json
import logging
import shutil

import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
)

from mono_quant_hf import quantize_model
from mono_quant_hf.calibration import Sampling
from mono_quant_hf.cli.main import main
from tests.evaluation.conftest import TEXT, make_llama, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    make_llama().save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    return tmp_path


def weights(model):
    return {name: parameter for name, parameter in model.named_parameters() if "weight" in name}


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_plain(folder, capsys):
    assert (
        main(
            [
                "quantize",
                str(folder / "float"),
                str(folder / "int8"),
                "--skip",
                "o_proj",
                "--activations",
                "int8",
            ]
        )
        == 0
    )
    assert "saved to" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder / "int8")
    up = model.model.layers[0].mlp.up_proj
    assert up.weight_int8.dtype == torch.int8 and up.quantization.activations == "int8"
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder / "int8")("the cat")["input_ids"]


@pytest.mark.parametrize("how", ["text", "self", "data-free"])
def test_calibrated(folder, how):
    (folder / "book.txt").write_text(TEXT * 3)
    arguments = ["--samples", "12", "--length", "16"]
    if how == "text":
        arguments += ["--text-file", str(folder / "book.txt")]
    command = ["quantize", str(folder / "float"), str(folder / "int8"), "--calibration", how, *arguments]
    assert main(command) == 0
    expected = quantize_model(
        make_llama(),
        calibration=[TEXT * 3] if how == "text" else how,
        tokenizer=make_tokenizer(),
        sampling=Sampling(samples=12, length=16),
    )
    saved = AutoModelForCausalLM.from_pretrained(folder / "int8")
    assert same(saved, expected) and not same(saved, quantize_model(make_llama()))


def test_mistakes_are_told_in_one_line(folder, capsys):
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    source, new = str(folder / "float"), str(folder / "new")
    for arguments, word in [
        ([source, str(folder / "full")], "there already"),
        (["./nothing", new], "no folder"),
        ([source, new, "--weights", "float16", "--calibration", "self"], "for int8"),
        ([source, new, "--weights", "float16", "--activations", "int8"], "for int8"),
        ([source, new, "--text-file", "book.txt"], "--calibration text"),
        ([source, new, "--calibration", "self", "--samples", "0"], "samples"),
        ([source, new, "--calibration", "self", "--damping", "2"], "damping"),
        ([source, new, "--resume", str(folder / "kept")], "--resume is for --calibration"),
        ([source, new, "--calibration", "data-free", "--resume", str(folder / "kept")], "--resume is for"),
        ([source, new, "--calibration", "self", "--resume", new], "keep them apart"),
        ([source, new, "--calibration", "self", "--resume", f"{new}/kept"], "keep them apart"),
        ([source, f"{new}/int8", "--calibration", "self", "--resume", new], "keep them apart"),
        ([source, new, "--calibration", "self", "--resume", source], "of no calibration that can go on"),
    ]:
        assert main(["quantize", *arguments]) == 2
        assert word in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["quantize", source, new]) == 0 and main(["quantize", new, str(folder / "again")]) == 2


def with_companions(folder):
    """What a folder on the Hub holds beside its model, of which nothing can be instantiated."""
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (folder / "1_Pooling").mkdir()
    for name in ("1_Pooling/config.json", "preprocessor_config.json", "LICENSE", "vocabulary of ours.dat"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The float model\n")


COMPANIONS = {
    "tokenizer.json",
    "modules.json",
    "1_Pooling",
    "preprocessor_config.json",
    "LICENSE",
    "README.md",
}


@pytest.mark.parametrize(
    "options",
    [[], ["--calibration", "data-free"], ["--calibration", "self", "--samples", "4", "--length", "8"]],
)
def test_companions_are_copied_as_files_with_and_without_calibration(options, folder, monkeypatch):
    with_companions(folder / "float")
    for auto_class in (AutoTokenizer, AutoImageProcessor, AutoFeatureExtractor, AutoProcessor):
        monkeypatch.setattr(auto_class, "from_pretrained", lambda *_, **__: pytest.fail("it was asked for"))
    assert main(["quantize", str(folder / "float"), str(folder / "int8"), *options]) == 0
    assert {path.name for path in (folder / "int8").iterdir()} >= COMPANIONS
    assert "license: mit" in (folder / "int8" / "README.md").read_text()
    assert "# The float model" not in (folder / "int8" / "README.md").read_text()


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder, patch: patch.setattr(shutil, "copyfile", full), "tokenizer.json was not copied"),
        (lambda folder, _: (folder / "modules.json").write_text("{"), "modules.json cannot be read"),
        (lambda folder, _: (folder / "modules.json").write_text("7"), "modules.json cannot be read"),
        (
            lambda folder, _: (folder / "README.md").write_text("---\na: [\n---\n"),
            "No model card was written",
        ),
        (
            lambda folder, patch: patch.setattr("mono_quant_hf.hub.importing.model_card", full),
            "No model card",
        ),
    ],
)
def test_a_companion_that_cannot_be_copied_is_a_warning(spoil, said, folder, monkeypatch, caplog):
    with_companions(folder / "float")
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        spoil(folder / "float", patch)
        assert (
            main(["quantize", str(folder / "float"), str(folder / "int8"), "--calibration", "data-free"]) == 0
        )
    assert said in caplog.text
    assert AutoModelForCausalLM.from_pretrained(folder / "int8").get_input_embeddings() is not None
    assert {path.name for path in folder.iterdir()} == {"float", "int8"}


def test_a_config_that_cannot_be_saved_shows_before_the_work(folder, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ValueError("this config cannot be saved")

    monkeypatch.setattr(PreTrainedConfig, "save_pretrained", refuse)
    monkeypatch.setattr("mono_quant_hf.hub.importing.quantize_model", lambda *_, **__: pytest.fail("begun"))
    assert main(["quantize", str(folder / "float"), str(folder / "int8"), "--calibration", "self"]) == 2
    assert "this config cannot be saved" in capsys.readouterr().err


def test_a_destination_that_others_fill_meanwhile_does_not_lose_the_model(folder, monkeypatch, capsys):
    def meanwhile(*_, **__):
        (folder / "int8").mkdir()
        (folder / "int8" / "thesis.txt").write_text("years of work")

    monkeypatch.setattr("mono_quant_hf.hub.importing.add_companions", meanwhile)
    assert main(["quantize", str(folder / "float"), str(folder / "int8"), "--calibration", "data-free"]) == 2
    assert "what was to be there is in" in capsys.readouterr().err
    assert (folder / "int8" / "thesis.txt").read_text() == "years of work"
    assert main(["verify", str(folder / "int8-1")]) == 0


def test_every_source_can_be_calibrated_but_codes_that_are_taken_over(folder, capsys):
    pytest.importorskip("gguf")
    source, options = str(folder / "float"), ["--calibration", "self", "--samples", "2", "--length", "8"]
    assert main(["quantize", source, str(folder / "int8"), "--symmetric"]) == 0
    assert main(["export", str(folder / "int8"), str(folder / "model.gguf"), "--format", "gguf"]) == 0
    assert main(["quantize", str(folder / "model.gguf"), str(folder / "again"), *options]) == 0
    assert "calibrated" in capsys.readouterr().out
    assert main(["export", str(folder / "int8"), str(folder / "ct"), "--format", "compressed-tensors"]) == 0
    assert main(["quantize", str(folder / "ct"), str(folder / "taken"), *options]) == 2
    assert "leave the settings out" in capsys.readouterr().err


def test_the_options_say_all_that_the_config_can(folder, tmp_path, capsys):
    options = [
        "--embeddings",
        "--symmetric",
        "--override",
        "*.down_proj=float16",
        "--override",
        "*.up_proj=int8",
    ]
    assert main(["quantize", str(folder / "float"), str(folder / "one"), *options, "--skip", "q_proj"]) == 0
    saved = json.loads((folder / "one" / "config.json").read_text())["quantization_config"]
    assert (
        saved["quantize_embeddings"] and saved["symmetric"] and saved["modules_to_not_convert"] == ["q_proj"]
    )
    assert saved["module_overrides"] == {
        "*.down_proj": {"weights": "float16"},
        "*.up_proj": {"weights": "int8"},
    }
    again = ["--config", str(folder / "one" / "config.json"), "--skip", "k_proj"]
    assert main(["quantize", str(folder / "float"), str(folder / "two"), *again]) == 0
    other = json.loads((folder / "two" / "config.json").read_text())["quantization_config"]
    assert other["modules_to_not_convert"] == ["k_proj"]
    assert other["module_overrides"] == saved["module_overrides"] and other["quantize_embeddings"]
    (tmp_path / "wrong.json").write_text('{"symetric": true}')
    wrong = ["--config", str(tmp_path / "wrong.json")]
    assert main(["quantize", str(folder / "float"), str(folder / "three"), *wrong]) == 2
    assert "symetric" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["quantize", "a", "b", "--override", "down_proj"])
    assert "expected PATTERN=HOW" in capsys.readouterr().err
