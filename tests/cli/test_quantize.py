"""`mono-quant-hf quantize`: what it saves is what the functions make."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    ]:
        assert main(["quantize", *arguments]) == 2
        assert word in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["quantize", source, new]) == 0 and main(["quantize", new, str(folder / "again")]) == 2
