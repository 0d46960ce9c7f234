"""examples/perplexity.py on a tiny saved model, in this process and without a network."""

import json
import re
import runpy
from pathlib import Path

import pytest
from datasets import Dataset

from mono_quant_hf import MonoQuantConfig, quantize_model

from .conftest import TEXT, make_llama, make_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "perplexity.py"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(EXAMPLE))["main"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What datasets makes of the files is not left in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved float model with its tokenizer, and texts beside it."""
    folder = tmp_path_factory.mktemp("example")
    make_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "text.jsonl").write_text(json.dumps({"body": TEXT}) + "\n", encoding="utf-8")
    (folder / "parquet").mkdir()
    Dataset.from_dict({"text": [TEXT]}).to_parquet(folder / "parquet" / "test.parquet")
    return folder


def test_the_table_and_the_json(main, folder, tmp_path, capsys):
    json_file = tmp_path / "result.json"
    arguments = ["--text-file", str(folder / "text.txt"), "--weights", "both", "--dtype", "float32"]
    arguments += ["--window", "16", "--batch-size", "2", "--quiet", "--json", str(json_file)]
    assert main([str(folder / "model"), *arguments]) == 0
    figures = json.loads(json_file.read_text(encoding="utf-8"))
    base, int8, half = figures["results"]
    assert [row["weights"] for row in (base, int8, half)] == ["float32", "int8", "float16"]
    assert figures["settings"]["window"] == 16 and figures["settings"]["stride"] == 8
    assert base["tokens"] == int8["tokens"] == half["tokens"] == 76
    for size in ("memory_bytes", "disk_bytes"):
        assert int8[size] < half[size] < base[size]
    assert base["disk_bytes"] == (folder / "model" / "model.safetensors").stat().st_size
    assert 0 < half["kl_mean"] < int8["kl_mean"] < int8["kl_p99"]
    assert int8["change_percent"] == pytest.approx(100 * (int8["perplexity"] / base["perplexity"] - 1))
    assert int8["top1_agreement"] > 0.8

    lines = capsys.readouterr().out.splitlines()
    assert "window 16, stride 8" in lines[0]
    header, rule, *rows = lines[2:]
    columns = "weights,memory,on disk,perplexity,change,mean KL,99 % KL,top-1,tokens"
    assert re.split(r"\s{2,}", header) == columns.split(",")
    assert set(rule) == {"-"} and [row.split()[0] for row in rows] == ["float32", "int8", "float16"]
    assert len({len(line) for line in (header, rule, *rows)}) == 1
    assert f"{int8['perplexity']:.4f}" in rows[1] and f"{int8['change_percent']:+.3f} %" in rows[1]


def test_perplexity_alone_and_symmetric(main, folder, tmp_path, capsys):
    json_file = tmp_path / "result.json"
    arguments = ["--text-file", str(folder / "text.txt"), "--symmetric", "--no-divergence", "--quiet"]
    assert main([str(folder / "model"), *arguments, "--json", str(json_file)]) == 0
    base, int8 = json.loads(json_file.read_text(encoding="utf-8"))["results"]
    assert int8["weights"] == "int8 symmetric" and "kl_mean" not in int8
    assert int8["perplexity"] == pytest.approx(base["perplexity"], rel=0.05)
    assert "KL" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "source",
    [
        ["--dataset", "json", "--data-files", "{}/text.jsonl", "--column", "body"],
        ["--dataset", "{}/parquet"],
        ["--dataset", "parquet", "--data-files", "{}/parquet/test.parquet", "--streaming"],
    ],
    ids=["json", "folder", "streaming"],
)
def test_datasets_give_what_the_text_gives(main, folder, tmp_path, source):
    perplexities = []
    for where in (["--text-file", str(folder / "text.txt")], [part.format(folder) for part in source]):
        common = ["--no-divergence", "--quiet", "--json", str(tmp_path / "result.json")]
        assert main([str(folder / "model"), *where, *common]) == 0
        perplexities.append(json.loads((tmp_path / "result.json").read_text())["results"][1]["perplexity"])
    assert perplexities[0] == perplexities[1]


def test_the_default_text_and_a_kept_reference(main, folder, tmp_path, capsys):
    kept = str(tmp_path / "kept")
    arguments = [str(folder / "model"), "--max-tokens", "200", "--reference", kept, "--quiet"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "the help topics of Python" in first and " 199" in first
    assert Path(kept, "reference.json").is_file()
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: model"),
        (["{}/model", "--weights", "int7"], "invalid choice: 'int7'"),
        (["{}/model", "--max-tokens", "few"], "'few' is neither a number"),
        (["{}/nothing"], "there is no folder .*/nothing"),
        (["no-one/nothing"], "cached files"),
        (["{}/model", "--text-file", "{}/missing.txt"], "missing.txt"),
        (["{}/model", "--text-file", "{}/text.txt", "--dataset", "x"], "either --text-file or --dataset"),
        (["{}/model", "--data-files", "x"], "--data-files needs --dataset"),
        (["{}/model", "--dataset", "{}/no-such-dataset"], "no-such-dataset"),
        (["{}/model", "--dataset", "{}/parquet", "--column", "body"], "no column 'body'.*'text'"),
        (["{}/model", "--dataset", "{}/parquet", "--split", "dev"], "dev"),
        (["{}/model", "--text-file", "{}/text.txt", "--window", "65"], "has positions for 64 tokens"),
        (
            ["{}/model", "--text-file", "{}/text.txt", "--stride", "99"],
            r"stride \(99\) is larger than window",
        ),
        (["{}/model", "--json", "{}/no/where.json"], "the folder of --json .* does not exist"),
    ],
)
def test_errors_are_one_line(main, folder, arguments, message, capsys):
    assert main([part.format(folder) for part in [*arguments, "--quiet"]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("perplexity.py: ") and re.search(message, line)


def test_models_that_cannot_be_evaluated(main, folder, tmp_path, capsys):
    quantized = quantize_model(make_llama(), MonoQuantConfig())
    quantized.save_pretrained(tmp_path / "quantized")
    assert main([str(tmp_path / "quantized"), "--quiet"]) == 2
    assert "is quantized already" in capsys.readouterr().err


def test_help_shows_how(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "python examples/perplexity.py" in capsys.readouterr().out
