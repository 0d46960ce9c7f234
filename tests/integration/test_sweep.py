"""A few classes of the sweep, as unlike as can be; all of them: `make test-sweep`."""

import json
import subprocess
import sys

import pytest

from .sweep import report

SAMPLE = {
    "BambaModel": "a hybrid of attention and state spaces",
    "BloomModel": "weights read for their dtype",
    "DbrxModel": "experts in two dimensions",
    "DiffusionGemmaModel": "experts that an encoder and a decoder share",
    "EncodecModel": "convolutions under weight norm, LSTM",
    "FalconMambaModel": "a forward that asks whether its model is quantized",
    "GteModel": "projections that a conversion takes apart",
    "Inkling2TextModel": "names on disk that end where a weight's name ends",
    "MambaModel": "a projection whose weight is passed to a function",
    "Qwen2VLModel": "convolutions in three dimensions, text and images",
    "RwkvModel": "weights that a forward scales in place",
    "SiglipVisionModel": "MultiheadAttention",
    "T5Model": "an encoder and a decoder, a table that both share",
    "Wav2Vec2Model": "weight norm as a parametrization",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By class, from a process of its own, as this one has threads and may not fork."""
    file = tmp_path_factory.mktemp("sweep") / "results.jsonl"
    command = [sys.executable, "-m", "tests.integration.sweep", "--results", str(file), "--seconds", "100"]
    command += ["--only", f"^({'|'.join(SAMPLE)})$", "--report", str(file.with_suffix(".md"))]
    subprocess.run(command, capture_output=True, text=True)
    return {result["class"]: result for result in map(json.loads, file.read_text().splitlines())}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_is_right(results, name):
    result = results[name]
    assert result["status"] == "right", result.get("problem")
    assert 1e-5 < result["error_to_float"] < 0.5, "no weight was quantized, or all of them wrongly"
    # Inkling's table of relative positions, a quarter of so small a model, is no matrix of a product.
    assert result["share_of_matrices"] > 0.85, result["left"]


def test_the_report_names_what_is_wrong():
    shared = {
        "inputs": ["input_ids"],
        "way": "uniform",
        "share": 0.5,
        "share_of_matrices": 0.5,
        "outside": 100,
    }
    left = {"left": {"Linear.weight: modules_to_not_convert": 50}}
    text = report(
        [
            {"model_type": "a", "class": "AModel", "status": "right", **shared, **left},
            {
                "model_type": "b",
                "class": "BModel",
                "status": "crash",
                "stage": "saving",
                "problem": "b | c",
                **shared,
                **left,
            },
            {"model_type": "c", "class": "CModel", "status": "float fails", "problem": "too large"},
        ]
    )
    assert "2 classes of 2 model types ran; 1 more" in text
    assert "| b | BModel | crash | saving | b \\| c |" in text
    assert "| a | AModel | 50% | Linear.weight: modules_to_not_convert (50%) |" in text
    assert "| c | CModel | too large |" in text
