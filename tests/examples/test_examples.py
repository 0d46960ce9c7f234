"""Each example runs as a user runs it, in a process of its own, on a tiny model."""

import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    ViTImageProcessor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from mono_quant_hf.hub import verify_checkpoint
from tests import tiny_models
from tests.evaluation.conftest import make_llama, make_tokenizer
from tests.integration.families import FAMILIES

ROOT = Path(__file__).parents[2]


def run(name, *arguments):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def language_model(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_quickstart_notebook(language_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (language_model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(language_model))
            exec(compile(code, cell["id"], "exec"), names)
    said = capsys.readouterr().out
    assert "int8, embeddings too" in said and "MB in memory" in said and "embed_tokens int8" in said


def test_quantize_and_push(language_model, tmp_path):
    assert "nothing is wrong" in run("quantize_and_push.py", language_model, tmp_path / "int8")
    assert verify_checkpoint(tmp_path / "int8", language_model).ok
    assert (tmp_path / "int8" / "README.md").is_file()


def test_vision(tmp_path):
    tiny_models.vit().save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    said = run("vision.py", tmp_path / "model", tmp_path / "picture.png")
    assert "picture.png: LABEL_" in said and "same class: 100%" in said


def test_speech(tmp_path):
    config = next(family for family in FAMILIES if family.name == "Whisper").config()
    config.max_source_positions = 50  # a second of sound: 100 frames, of which the encoder halves the number
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=1).save_pretrained(
        tmp_path / "model"
    )
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(np.zeros(16000, dtype=np.int16).tobytes())
    said = run("speech.py", tmp_path / "model", tmp_path / "sound.wav")
    assert re.search(r"^float32 \(.*^int8 \(", said, flags=re.M | re.S)


def test_embeddings(tmp_path):
    bert = tiny_models.bert().bert
    assert isinstance(bert, BertModel)
    bert.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    said = run("embeddings.py", tmp_path / "model", "the cat sat", "the dog ran")
    assert float(re.search(r"mean ([\d.]+)", said)[1]) > 0.99


def test_export_vllm(language_model, tmp_path):
    pytest.importorskip("compressed_tensors")
    run("export_vllm.py", language_model, tmp_path / "int8", tmp_path / "vllm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "vllm")
    assert model.config.quantization_config.quant_method == "compressed-tensors"


def test_benchmark(language_model, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 40, encoding="utf-8")
    options = ["--repeats", 1, "--tokens", 3, "--prompt", 8, "--prefill", 20, "--json", tmp_path / "out.json"]
    options += ["--text-file", tmp_path / "text.txt", "--dtypes", "float32", "--only", "ours"]
    said = run("benchmark.py", language_model, *options)
    rows = {row["case"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert set(rows) == {
        "float32",
        "ours int8",
        "ours int8 with embeddings",
        "ours int8 activations",
        "ours float16",
        "ours int8, codes in float",
    }
    assert rows["float32"]["ratio"] == {"decode": 1.0, "prefill": 1.0}
    assert rows["ours int8 with embeddings"]["bytes"] < rows["ours int8"]["bytes"] < rows["float32"]["bytes"]
    assert f"{rows['ours int8']['ratio']['decode']:.2f}" in said
    scores = [rows[name]["perplexity"] for name in ("ours int8", "ours int8, codes in float")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_compiled_benchmark(language_model):
    options = ["--repeats", 1, "--tokens", 3, "--prompt", 8, "--prefill", 20, "--only", "embeddings"]
    said = run("benchmark.py", language_model, "--compile", "--dtypes", "float32", *options)
    assert ", compiled;" in said and "ours int8 with embeddings" in said


def test_vision_benchmark(tmp_path):
    tiny_models.vit().save_pretrained(tmp_path / "model")
    options = ["--batches", 2, "--size", 32, "--repeats", 1, "--json", tmp_path / "out.json"]
    run("vision_benchmark.py", tmp_path / "model", *options)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["float32", "int8", "int8 symmetric", "float16"]
    assert rows[1]["bytes"] < rows[3]["bytes"] < rows[0]["bytes"]
