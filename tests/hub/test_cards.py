"""The cards of model_cards/, and what a card says of models that are not language models."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import BertConfig, BertModel, ViTImageProcessor

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.hub import HubError, model_card
from mono_quant_hf.hub.card import END, START, TEMPLATE, check_card
from mono_quant_hf.hub.checkpoint import auto_class_of
from tests import tiny_models
from tests.evaluation.conftest import make_tokenizer

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


def text_encoder():
    return tiny_models.bert().bert


def chat(folder):
    make_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


@pytest.mark.parametrize(
    ("make", "prepare", "word"),
    [
        (
            tiny_models.llama,
            lambda folder: make_tokenizer().save_pretrained(folder),
            "tokenizer.decode(model.generate",
        ),
        (tiny_models.llama, chat, "apply_chat_template"),
        (text_encoder, lambda folder: make_tokenizer().save_pretrained(folder), "embeddings = "),
        (tiny_models.bert, lambda folder: make_tokenizer().save_pretrained(folder), "id2label"),
        (tiny_models.vit, ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained, "picture.png"),
    ],
    ids=["text", "chat", "embeddings", "class of text", "class of picture"],
)
def test_the_code_of_a_card_runs(make, prepare, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "me" / "model"
    quantize_model(make()).save_pretrained(folder)
    prepare(folder)
    Image.new("RGB", (40, 40)).save("picture.png")
    text = model_card(folder, "me/model").text
    code = text.partition("```python\n")[2].partition("```")[0]
    assert word in code
    exec(compile(code, "card", "exec"), {})


def test_a_card_says_what_would_help_where_little_is_quantized(tmp_path):
    said = "`quantize_embeddings=True` quantizes them too"
    for vocabulary, little in [(64, False), (4096, True)]:
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
        quantize_model(BertModel(config)).save_pretrained(tmp_path / str(little))
        assert (said in model_card(tmp_path / str(little), "me/model").text) == little


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


EVIL = "a|b`c<script>alert(1)</script>\n---\n![x](http://evil.example/x.png)[y](javascript:z)\x1b[31m\u202e"
ESCAPES = ["<script", "<img", "](http", "](javascript", "\x1b", "\u202e"]


def active(card):
    """What of a page a reader of Markdown does not show as it is: neither code nor escaped."""
    text = re.sub(r"(?ms)^(`{3,})[^`\n]*\n.*?^\1$", "", card.text)
    text = re.sub(r"(?s)(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", text)
    return re.sub(r"\\[!-/:-@\[-`{-~]", "", text)


def test_names_of_strangers_are_only_shown(tmp_path, caplog):
    config = MonoQuantConfig(
        modules_to_not_convert=["q_proj|<img src=x>", "``k_proj`` \\\\|", "v_proj"],
        module_overrides={f"*up_proj*{EVIL}*": {}, "re:.*down_proj$(?#<img src=x>|)": {"weights": "float16"}},
    )
    quantize_model(tiny_models.llama(), config).save_pretrained(tmp_path)
    original = ModelCard(
        '---\nlicense: mit\nlicense_name: "<b>\\e[31m"\nlanguage: [en, "x\\n---\\ny"]\ndatasets: {a: b}\n---\n# A\n'
    )
    existing = ModelCard('---\nbase_model:\n- me/float\n- "[a](http://b)"\n---\n# Mine\n')
    evaluation = {"perplexity": 2.0, "tokens": "9`", "dataset": EVIL, "command": f"run\n```\n{EVIL}"}
    plot = tmp_path / "<img src=x> ](http).png"
    card = model_card(
        tmp_path, "me/a_model", evaluation=evaluation, original=original, existing=existing, plots=[plot]
    )
    seen = active(card)
    for escape in ESCAPES:
        assert escape not in seen.replace("[me/float](/me/float)", ""), escape
    assert all(character.isprintable() or character == "\n" for character in str(card))
    assert "[me/float](/me/float), `[a](http://b)` with int8" in card.text
    assert "<" not in str(card).removesuffix(card.text)
    assert card.data.license == "mit" and card.data.get("license_name") is None
    assert card.data.get("language") is None and card.data.get("datasets") is None
    assert "license_name is no name" in caplog.text
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    kept = [row for row in rows if "modules_to_not_convert" in row]
    assert kept and all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in kept), kept


def test_metadata_of_strangers_stay_metadata(tmp_path):
    quantize_model(tiny_models.llama()).save_pretrained(tmp_path)
    card = model_card(
        tmp_path, "me/model", license="mit\n---\n<script>", evaluation={"perplexity": 2, "dataset": "'\n---"}
    )
    again = ModelCard(str(card))
    assert again.data.license == "mit\n---\n<script>" and "<script>" not in again.text


@pytest.mark.parametrize(
    "evaluation",
    [
        '{"results": [1]}',
        '{"results": 1}',
        "[[1]]",
        '"word"',
        '{"perplexity": 1, "perplexity": 2}',
        '{"results": null}',
        '{"perplexity"',
    ],
)
def test_an_evaluation_that_is_none(evaluation, tmp_path):
    quantize_model(tiny_models.llama()).save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text(evaluation)
    with pytest.raises(HubError, match="valuation"):
        model_card(tmp_path, "me/model", evaluation=tmp_path / "results.json")


def test_odd_numbers_of_an_evaluation(tmp_path):
    quantize_model(tiny_models.llama()).save_pretrained(tmp_path)
    numbers = {
        "perplexity": "high",
        "reference_perplexity": 0,
        "kl_mean": 10**400,
        "tokens": [],
        "cosine_min": float("nan"),
    }
    assert "Measured on" in model_card(tmp_path, "me/model", evaluation=numbers).text


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(HubError, match=r"has no config\.json"):
        model_card(tmp_path, "me/model")
