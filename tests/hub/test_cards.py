"""The cards of model_cards/, and what a card says of models that are not language models."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.hub import HubError, model_card
from mono_quant_hf.hub.card import END, START, TEMPLATE, check_card
from mono_quant_hf.hub.facts import auto_class_of
from tests import tiny_models

FOLDER = Path(__file__).parent.parent.parent / "model_cards"
FINISHED = sorted(FOLDER.glob("*-int8.md"))


def test_the_template_is_the_one_in_use():
    assert (FOLDER / "template.md").read_text() == TEMPLATE.read_text()


def test_three_cards_are_finished():
    assert [card.stem for card in FINISHED] == [
        "EfficientNet-Lite0-int8",
        "SmolLM2-135M-Instruct-int8",
        "all-MiniLM-L6-v2-int8",
    ]


@pytest.mark.parametrize("file", FINISHED, ids=lambda file: file.stem)
def test_a_finished_card(file):
    card = ModelCard.load(file)
    check_card(card)
    assert card.data.tags == ["mono-quant", "int8", "8-bit"]
    assert card.data.eval_results and all(
        result.metric_value is not None for result in card.data.eval_results
    )
    assert card.text[card.text.index("```python") :].splitlines()[1].startswith("import mono_quant_hf")
    assert card.text.index(START) < card.text.index("Measured with") < card.text.index(END)
    for line in card.text.splitlines():
        if line.startswith("!["):
            assert (FOLDER / line.partition("(")[2].rstrip(")")).is_file()


@pytest.mark.parametrize(
    ("make", "auto_class", "task", "kinds"),
    [
        (tiny_models.bert, "AutoModelForSequenceClassification", "text-classification", ["Linear"]),
        (tiny_models.resnet, "AutoModelForImageClassification", "image-classification", ["Conv2d", "Linear"]),
    ],
)
def test_other_tasks(tmp_path, make, auto_class, task, kinds):
    quantize_model(make(), MonoQuantConfig(symmetric=True)).save_pretrained(tmp_path)
    card = model_card(tmp_path, "me/model", notes="A note.", evaluation={"top1_agreement": 1.0, "samples": 6})
    check_card(card)
    assert card.data.pipeline_tag == task
    assert f"from transformers import {auto_class}" in card.text
    assert all(f"| `{kind}` | int8, symmetric |" in card.text for kind in kinds)
    assert "A note." in card.text and "| samples | 6 |" in card.text
    assert "base_model" not in card.data.to_dict()


def test_a_tied_weight_counts_once(tmp_path):
    quantize_model(tiny_models.llama(tied=True)).save_pretrained(tmp_path)
    text = model_card(tmp_path, "me/model").text
    assert "| output head or tied weight | 1 | shared | `lm_head` |" in text
    linears, table = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 88 * 32), 64 * 32
    assert f"{linears / (linears + table):.1%} of the parameters" in text


def test_every_auto_class_is_known_to_transformers():
    assert auto_class_of("LlamaForCausalLM") == "AutoModelForCausalLM"
    assert auto_class_of("WhisperForConditionalGeneration") == "AutoModelForSpeechSeq2Seq"
    assert auto_class_of("BertModel") == auto_class_of("NoSuchModel") == "AutoModel"


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(HubError, match=r"has no config\.json"):
        model_card(tmp_path, "me/model")
