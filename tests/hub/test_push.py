"""Pushing over the wire, with the real client against the server of hub_server.py."""

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import mono_quant_hf
from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.evaluation import divergence, perplexity
from mono_quant_hf.hub import Evaluation, HubError, push_to_hub
from tests import tiny_models
from tests.evaluation.conftest import TEXT, make_llama, make_tokenizer

REPO = "me/tiny-int8"


@pytest.fixture
def model():
    return quantize_model(tiny_models.llama())


def card_of(hub, repo=REPO, revision="main"):
    return ModelCard(hub.files(repo, revision)["README.md"].decode())


def test_the_method_of_every_model(hub, model):
    model.push_to_hub(REPO)
    assert card_of(hub).data.tags == ["mono-quant", "int8", "8-bit"]
    again = AutoModelForCausalLM.from_pretrained(REPO)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))


@pytest.mark.parametrize(
    ("weights", "tags"), [("int8", ["mono-quant", "int8", "8-bit"]), ("float16", ["mono-quant", "fp16"])]
)
def test_tags_after_loading_and_none_after_dequantizing(tmp_path, weights, tags):
    tiny_models.llama().save_pretrained(tmp_path)
    config = MonoQuantConfig(weights=weights)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert model.model_tags == tags
    assert model.dequantize().model_tags == []


def test_one_commit_with_everything(hub):
    reference = make_llama()
    model = quantize_model(make_llama())
    tokenizer = make_tokenizer()
    evaluation = Evaluation(
        [
            perplexity(model, tokenizer, TEXT, progress=False),
            divergence(reference, model, tokenizer, TEXT, progress=False),
        ],
        dataset="75 words",
        command="pytest",
    )
    info = mono_quant_hf.push_to_hub(
        model, REPO, tokenizer=tokenizer, evaluation=evaluation, base_model="org/base", license="mit"
    )
    assert hub.messages(REPO) == ["initial commit", "Upload tiny-int8 quantized by mono_quant_hf"]
    assert info.oid == hub.repos[REPO].branches["main"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= hub.files(REPO).keys()

    card = card_of(hub)
    assert (card.data.base_model, card.data.license, card.data.pipeline_tag) == (
        "org/base",
        "mit",
        "text-generation",
    )
    measured = {result.metric_name: result for result in card.data.eval_results}
    assert measured["perplexity"].metric_value == evaluation.values[0]["perplexity"]
    assert measured["perplexity"].dataset_name == "75 words"
    first_code = card.text[card.text.index("```python") :]
    assert first_code.splitlines()[1].startswith("import mono_quant_hf")
    assert "| `Linear` | int8, asymmetric | 14 |" in card.text
    assert "| output head or tied weight | 1 |" in card.text
    assert "mean KL divergence" in card.text and "```\npytest\n```" in card.text


def test_the_code_in_the_card_runs(hub, model, monkeypatch):
    push_to_hub(model, REPO, tokenizer=make_tokenizer())
    text = card_of(hub).text
    code = text[text.index("```python") + len("```python") :].partition("```")[0]
    names = {}
    exec(code, names)
    assert torch.equal(tiny_models.logits(names["model"]), tiny_models.logits(model))
    assert names["tokenizer"].encode("the cat") == make_tokenizer().encode("the cat")


def test_a_second_push_uploads_only_what_changed(hub, model):
    push_to_hub(model, REPO, tokenizer=make_tokenizer(), max_shard_size="15kB")
    first = list(hub.uploads)
    assert len(first) >= 3  # sharded
    push_to_hub(model, REPO, tokenizer=make_tokenizer(), max_shard_size="15kB", license="mit")
    assert hub.uploads == first
    assert card_of(hub).data.license == "mit"

    push_to_hub(model, REPO, tokenizer=make_tokenizer(), max_shard_size="15kB")
    assert len(hub.messages(REPO)) == 3  # nothing changed, so no third push

    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight_scale.mul_(2)
    push_to_hub(model, REPO, tokenizer=make_tokenizer(), max_shard_size="15kB")
    assert len(hub.uploads) == len(first) + 1
    again = AutoModelForCausalLM.from_pretrained(REPO)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))


def test_shards_that_are_no_more_go_in_the_same_commit(hub, model):
    push_to_hub(model, REPO, max_shard_size="15kB")
    assert "model.safetensors.index.json" in hub.files(REPO)
    push_to_hub(model, REPO)
    assert [path for path in hub.files(REPO) if path.startswith("model")] == ["model.safetensors"]
    assert len(hub.messages(REPO)) == 3


def test_load_by_revision_in_an_empty_cache(hub, model):
    before = push_to_hub(model, REPO).oid
    expected = tiny_models.logits(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    push_to_hub(model, REPO)
    push_to_hub(
        quantize_model(tiny_models.llama(), MonoQuantConfig(symmetric=True)), REPO, revision="symmetric"
    )
    assert torch.equal(
        tiny_models.logits(AutoModelForCausalLM.from_pretrained(REPO, revision=before)), expected
    )
    assert not torch.equal(tiny_models.logits(AutoModelForCausalLM.from_pretrained(REPO)), expected)
    assert AutoModelForCausalLM.from_pretrained(
        REPO, revision="symmetric"
    ).config.quantization_config.symmetric
    with pytest.raises(OSError, match="not a valid git identifier"):
        AutoModelForCausalLM.from_pretrained(REPO, revision="no-such-branch")


def test_a_dropped_connection_is_retried(hub, model):
    hub.drop_uploads = 2
    push_to_hub(model, REPO)
    assert hub.drop_uploads == 0
    again = AutoModelForCausalLM.from_pretrained(REPO)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))


def test_a_connection_that_stays_down_leaves_no_half_commit(hub, model):
    push_to_hub(model, REPO)
    before = hub.files(REPO)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    hub.drop_uploads = 1000
    with pytest.raises(HubError, match=r"Pushing to me/tiny-int8 failed before the commit.*push again"):
        push_to_hub(model, REPO)
    assert hub.files(REPO) == before


def test_a_server_that_is_gone(hub, model):
    hub.stop()
    with pytest.raises(HubError, match="failed before the commit"):
        push_to_hub(model, REPO)
    hub.server.socket.close()


def test_a_wrong_token(hub, model):
    with pytest.raises(HubError, match=r"refused the push .*401.*log in with a token.*Nothing was committed"):
        push_to_hub(model, REPO, token="hf_wrong")
    assert hub.repos == {}


def test_a_name_that_somebody_else_has(hub, model):
    hub.create("you/tiny-int8")
    with pytest.raises(HubError, match=r"403.*choose a name under your own account"):
        push_to_hub(model, "you/tiny-int8")
    assert hub.messages("you/tiny-int8") == ["initial commit"]


def test_a_private_repo_needs_the_token(hub, model, monkeypatch):
    push_to_hub(model, REPO, private=True)
    assert HfApi().model_info(REPO).private
    assert AutoModelForCausalLM.from_pretrained(REPO).config.model_type == "llama"
    for token in ("token-of-you", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError, match="private repository"):
            AutoModelForCausalLM.from_pretrained(REPO, cache_dir=f"/nonexistent/{token or 'none'}")


def test_a_gated_repo_is_refused_until_granted(hub, model, monkeypatch, tmp_path):
    push_to_hub(model, REPO)
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", "token-of-you")
    with pytest.raises(OSError, match="gated repo"):
        AutoModelForCausalLM.from_pretrained(REPO, cache_dir=tmp_path / "one")
    hub.repos[REPO].readers.add("you")
    assert AutoModelForCausalLM.from_pretrained(REPO, cache_dir=tmp_path / "two").config.model_type == "llama"


def test_a_card_that_is_there_is_kept_and_extended(hub, model):
    push_to_hub(model, REPO)
    card = card_of(hub)
    card.data.license = "apache-2.0"
    card.data.tags = ["mine", *card.data.tags]
    card.text = "# My model\n\nRead this.\n\n" + card.text + "\nAnd this.\n"
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=REPO)

    push_to_hub(model, REPO, license="mit", evaluation={"perplexity": 12.5, "tokens": 100})
    extended = card_of(hub)
    assert extended.data.license == "apache-2.0"
    assert extended.data.tags == ["mine", "mono-quant", "int8", "8-bit"]
    assert extended.text.lstrip().startswith("# My model\n\nRead this.")
    assert extended.text.rstrip().endswith("And this.")
    assert extended.text.count("## What was quantized") == 1
    assert "12.5000" in extended.text

    push_to_hub(model, REPO, evaluation={"perplexity": 13.5, "tokens": 100})
    assert [result.metric_value for result in card_of(hub).data.eval_results] == [13.5]


def test_license_and_language_come_from_the_original(hub):
    tiny_models.bert().push_to_hub("me/original")
    head = "---\nlicense: cc-by-4.0\nlanguage: [en, de]\ntags: [old]\n---\n# Original\n"
    HfApi().upload_file(path_or_fileobj=head.encode(), path_in_repo="README.md", repo_id="me/original")
    model = AutoModelForSequenceClassification.from_pretrained(
        "me/original", quantization_config=MonoQuantConfig()
    )
    push_to_hub(model, REPO)
    data = card_of(hub).data
    assert (data.base_model, data.license, data.language) == ("me/original", "cc-by-4.0", ["en", "de"])
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.tags == ["mono-quant", "int8", "8-bit"]

    # Loaded from the Hub and pushed elsewhere, the float model is still the base.
    push_to_hub(AutoModelForSequenceClassification.from_pretrained(REPO), "me/elsewhere")
    assert card_of(hub, "me/elsewhere").data.base_model == "me/original"


def test_a_folder_with_a_plot(hub, model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    plot = tmp_path / "error_per_layer.png"
    plot.write_bytes(b"\x89PNG not really")
    push_to_hub(folder, REPO, plots=[plot])
    assert hub.files(REPO)["plots/error_per_layer.png"] == plot.read_bytes()
    assert "![error per layer](plots/error_per_layer.png)" in card_of(hub).text
    assert {file.name for file in folder.iterdir()} <= hub.files(REPO).keys() | {"README.md"}
    assert not (folder / "README.md").exists()


def test_what_is_not_quantized_is_refused_before_anything_is_asked(hub, tmp_path):
    with pytest.raises(HubError, match="LlamaForCausalLM is not a transformers model quantized"):
        push_to_hub(tiny_models.llama(), REPO)
    tiny_models.llama().save_pretrained(tmp_path)
    with pytest.raises(HubError, match="is float, not quantized"):
        push_to_hub(tmp_path, REPO)
    with pytest.raises(HubError, match="no folder"):
        push_to_hub(tmp_path / "none", REPO)
    with pytest.raises(HubError, match="none of the numbers"):
        Evaluation([{"accuracy": 1}])
    assert hub.requests == []
