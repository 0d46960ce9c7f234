"""`mono-quant-hf evaluate`: the same figures as the functions, for every kind of model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification, BertModel, ViTImageProcessor

from mono_quant_hf import quantize_model
from mono_quant_hf.cli.main import main
from mono_quant_hf.evaluation import compare_encoders, divergence
from tests import tiny_models
from tests.evaluation.conftest import TEXT, make_llama, make_tokenizer


@pytest.fixture
def book(tmp_path):
    file = tmp_path / "book.txt"
    words = TEXT.split()
    file.write_text("\n".join(" ".join(words[n : n + 15]) for n in range(0, len(words), 15)))
    return file


def evaluate(tmp_path, *arguments):
    assert main(["evaluate", *map(str, arguments), "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


def test_language_model_and_a_kept_reference(tmp_path, book, capsys):
    model, tokenizer = make_llama(), make_tokenizer()
    model.save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    common = ["--text-file", book, "--window", 16, "--reference", tmp_path / "kept"]
    figures = evaluate(tmp_path, tmp_path / "float", *common)
    assert "top-1 agreement" in capsys.readouterr().out
    quantized = quantize_model(make_llama())
    expected = divergence(model, quantized, tokenizer, book.read_text(), window=16, progress=False)
    assert figures["kl_mean"] == pytest.approx(expected.kl_mean, rel=1e-4)
    assert figures["top1_agreement"] == expected.top1_agreement and figures["nll_standard_error"] > 0
    quantized.save_pretrained(tmp_path / "int8")
    recorded = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").glob("window-*")}
    again = evaluate(tmp_path, tmp_path / "float", tmp_path / "int8", *common)
    assert again["kl_mean"] == pytest.approx(figures["kl_mean"], rel=1e-4)
    assert recorded == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "kept").glob("window-*")}


def test_a_dataset_of_rows(tmp_path, book):
    make_llama().save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    rows = tmp_path / "rows.json"
    rows.write_text("\n".join(json.dumps({"line": line}) for line in book.read_text().splitlines()))
    arguments = ["--dataset", "json", "--data-files", rows, "--column", "line", "--weights", "float16"]
    assert 0 <= evaluate(tmp_path, tmp_path / "float", *arguments)["kl_mean"] < 1e-4


def test_encoder(tmp_path, book):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    figures = evaluate(tmp_path, tmp_path / "float", "--text-file", book, "--samples", 3, "--batch-size", 2)
    lines = book.read_text().splitlines()[:3]
    quantized = quantize_model(BertModel.from_pretrained(tmp_path / "float").eval())
    expected = compare_encoders(model, quantized, make_tokenizer(), lines)
    assert figures["samples"] == 3 and figures["cosine_mean"] == pytest.approx(expected.cosine_mean, abs=1e-6)


def test_text_classifier(tmp_path, book):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    figures = evaluate(tmp_path, tmp_path / "float", "--text-file", book)
    assert figures["samples"] == 5 and 0 < figures["relative_error"] < 0.1


def test_image_classifier(tmp_path):
    tiny_models.vit().save_pretrained(tmp_path / "float")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "float")
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{n}.png")
    figures = evaluate(tmp_path, tmp_path / "float", "--images", tmp_path / "pictures", "--batch-size", 2)
    assert figures["samples"] == 3 and 0 < figures["relative_error"] < 0.1


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    make_llama().save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    quantize_model(make_llama()).save_pretrained(tmp_path / "int8")
    for arguments, word in [
        (["./nothing"], "no folder"),
        ([tmp_path / "int8"], "with --float"),
        ([tmp_path / "float", tmp_path / "float"], "not quantized"),
        ([tmp_path / "float", tmp_path / "int8", "--weights", "int8"], "not both"),
        ([tmp_path / "float", "--weights", "float16", "--symmetric"], "--symmetric"),
        ([tmp_path / "float", "--window", "4096"], "window"),
        ([tmp_path / "float", "--json", tmp_path / "no" / "such"], "does not exist"),
        ([tmp_path / "float", "--text-file", tmp_path / "none.txt"], "cannot be read"),
        ([tmp_path / "float", "--text-file", "a", "--dataset", "b"], "not both"),
    ]:
        assert main(["evaluate", *map(str, arguments)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert word in error, error
