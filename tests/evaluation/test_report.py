"""The report per module: figures by hand, pictures, page, and how the command shows them."""

import copy
import json
import math
import re
import sys

import pytest
import torch
from torch import nn

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.cli.main import main
from mono_quant_hf.evaluation import quantization_report
from tests import tiny_models


def small(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.ReLU(), nn.Linear(5, 3, bias=bias)).eval()


def by_name(report):
    return {module.module: module for module in report.modules}


def decibels(exact, got):
    return 10 * math.log10(float(exact.double().square().sum() / (exact - got).double().square().sum()))


def test_weight_figures_by_hand():
    model = small()
    quantized = quantize_model(copy.deepcopy(model))
    report = by_name(quantization_report(quantized, model))["0"]
    exact, got = model[0].weight.detach(), quantized[0].dequantized()
    assert report.sqnr == pytest.approx(decibels(exact, got), abs=1e-6)
    channels = [decibels(exact[n], got[n]) for n in range(5)]
    assert report.worst_channel == min(range(5), key=channels.__getitem__)
    assert report.worst_channel_sqnr == pytest.approx(min(channels), abs=1e-6)
    codes = quantized[0].weight_int8
    assert report.share_at_ends == pytest.approx(float(((codes == -128) | (codes == 127)).double().mean()))
    assert (report.bytes_before, report.bytes_after) == (4 * (30 + 5), 30 + 5 * (4 + 1) + 4 * 5)
    assert report.sqnr_source == "float weights" and report.parameters == 35


def test_output_figures_and_contributions_by_hand():
    model, x = small(), torch.randn(7, 6)
    quantized = quantize_model(copy.deepcopy(model))
    report = quantization_report(quantized, model, x)
    modules = by_name(report)
    with torch.no_grad():
        hidden, expected = model[:2](x), model(x)
        assert modules["2"].output_sqnr == pytest.approx(decibels(expected, quantized[2](hidden)), abs=1e-6)
        alone = model[2](model[1](quantized[0](x)))
        together = quantized(x)
    error = float((alone - expected).double().norm() / expected.double().norm())
    assert modules["0"].contribution == pytest.approx(error, rel=1e-6)
    assert report.total == pytest.approx(
        float((together - expected).double().norm() / expected.double().norm()), rel=1e-6
    )
    assert report.contribution_of == "relative error of the output"
    first, second = report.modules
    assert first.contribution >= second.contribution
    assert type(model[0]) is nn.Linear  # the float model has its own modules back


def test_kl_contribution_of_a_language_model():
    model = tiny_models.llama()
    quantized = quantize_model(copy.deepcopy(model))
    report = quantization_report(quantized, model, {"input_ids": tiny_models.TOKENS})
    assert "KL" in report.contribution_of
    p = tiny_models.logits(model).double().log_softmax(-1)
    q = tiny_models.logits(quantized).double().log_softmax(-1)
    assert report.total == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6)
    name = "model.layers.1.mlp.down_proj"
    one = quantize_model(copy.deepcopy(model), MonoQuantConfig(module_overrides=only(name)))
    q = tiny_models.logits(one).double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert by_name(report)[name].contribution == pytest.approx(expected, abs=1e-6)


def only(name):
    return {name: {"weights": "int8"}, "*": {"weights": "float"}}


def test_without_float_weights_the_sqnr_is_an_estimate_and_says_so():
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 8)).eval()
    for weights in ("int8", "float16"):
        quantized = quantize_model(copy.deepcopy(model), MonoQuantConfig(weights=weights))
        estimated, measured = quantization_report(quantized), quantization_report(quantized, model)
        assert "estimated" in estimated.sqnr_source and "~" in estimated.table()
        assert "measured" in measured.sqnr_source and "~" not in measured.table()
        for name, module in by_name(estimated).items():
            assert module.sqnr == pytest.approx(by_name(measured)[name].sqnr, abs=0.5)


def test_float_weights_streamed_from_a_folder_give_the_same(tmp_path):
    model = tiny_models.llama()
    model.save_pretrained(tmp_path)
    quantized = quantize_model(copy.deepcopy(model))
    assert quantization_report(quantized, tmp_path).modules == quantization_report(quantized, model).modules
    with pytest.raises(ValueError, match="holds no safetensors"):
        quantization_report(quantized, tmp_path / "nothing")


def test_modules_left_in_float_come_last_with_their_reason():
    quantized = quantize_model(tiny_models.llama(), MonoQuantConfig(modules_to_not_convert=["o_proj"]))
    report = quantization_report(quantized)
    kinds = [module.weights for module in report.modules]
    assert kinds == sorted(kinds, key="float".__eq__)
    left = by_name(report)["model.layers.0.self_attn.o_proj"]
    assert left.sqnr is None and "o_proj" in left.reason and left.bytes_before == left.bytes_after


def test_a_channel_of_zeros_is_exact():
    model = small()
    with torch.no_grad():
        model[0].weight[2] = 0
    quantized = quantize_model(copy.deepcopy(model))
    for reference in (model, None):
        report = by_name(quantization_report(quantized, reference))["0"]
        assert report.worst_channel != 2 and math.isfinite(report.worst_channel_sqnr)


def test_what_cannot_be_reported():
    model = small()
    with pytest.raises(TypeError, match="no quantized modules"):
        quantization_report(model)
    quantized = quantize_model(copy.deepcopy(model))
    with pytest.raises(ValueError, match="give that model as the reference"):
        quantization_report(quantized, inputs=torch.ones(1, 6))
    with pytest.raises(TypeError, match="quantized itself"):
        quantization_report(quantized, quantized)


def test_json_page_and_picture(tmp_path):
    model = tiny_models.llama()
    quantized = quantize_model(copy.deepcopy(model))
    report = quantization_report(quantized, model, {"input_ids": tiny_models.TOKENS})
    report.to_json(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert len(saved["modules"]) == len(report.modules) and saved["total"] == report.total
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert not re.search(r"""(src|href)="(?!#)|url\((?!#)|@import|https?:""", page)  # nothing from elsewhere
    for module in report.modules:
        assert module.module in page
    pytest.importorskip("matplotlib")
    assert page.count("<svg") == 1 and "Worst channel of each module" in page
    report.to_png(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_shows_the_names_of_strangers(tmp_path):
    model = torch.nn.ModuleDict(
        {"<script>alert(1)</script>\u202e": torch.nn.Linear(8, 8), "$a_b$": torch.nn.Linear(8, 8)}
    )
    report = quantization_report(quantize_model(model))
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script>") == 1 and r"&lt;script&gt;alert(1)&lt;/script&gt;\u202e" in page
    pytest.importorskip("matplotlib")
    assert page.count("$a_b$") == 2  # in the table and in the picture, not read as a formula


def test_a_page_without_matplotlib_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = quantization_report(quantize_model(small()))
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "needs matplotlib; run: pip install" in page and "<svg" not in page and "<td" in page
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.to_png(tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()


def test_the_command(tmp_path, capsys):
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "float")
    quantize_model(model).save_pretrained(tmp_path / "int8")
    command = ["inspect", str(tmp_path / "int8"), "--float", str(tmp_path / "float"), "--top", "3"]
    assert main([*command, "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]) == 0
    shown = capsys.readouterr().out
    assert "measured against the float weights" in shown and "and 13 more" in shown
    measured = json.loads((tmp_path / "r.json").read_text())
    assert main(["inspect", str(tmp_path / "float"), "--json", str(tmp_path / "r.json")]) == 0
    same = json.loads((tmp_path / "r.json").read_text())
    assert [m["sqnr"] for m in same["modules"]] == [m["sqnr"] for m in measured["modules"]]
    assert main(["inspect", str(tmp_path / "int8"), "--contributions"]) == 2
    assert "--float" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none")]) == 2
