"""Perplexity against a computation from scratch, token by token, in plain Python."""

import json
import math
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import datasets
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.evaluation import perplexity

from .conftest import make_llama


def by_hand(model, ids, window, stride):
    """Mean negative log-likelihood: for each token, the context that its window gives it, and one forward."""
    total, k = 0.0, 0
    for target in range(1, len(ids)):
        while k * stride + window <= target:
            k += 1
        # where windows do not overlap, each is told the last token of the one before
        begin = k * stride - (1 if k and stride == window else 0)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:target]])).logits[0, -1].double().tolist()
        top = max(logits)
        log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
        total += log_sum - logits[ids[target]]
    return total / (len(ids) - 1)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (16, 1), (10, 7), (64, 32), (2, 2)])
def test_agrees_with_a_computation_from_scratch(llama, tokenizer, text, window, stride):
    ids = tokenizer(text)["input_ids"]
    result = perplexity(llama, tokenizer, text, window=window, stride=stride, progress=False)
    assert result.nll == pytest.approx(by_hand(llama, ids, window, stride), rel=1e-6)
    assert float(result) == result.perplexity == pytest.approx(math.exp(result.nll), rel=1e-12)
    assert (result.tokens, result.text_tokens) == (len(ids) - 1, len(ids)) == (76, 77)


def test_context_changes_the_result(llama, tokenizer, text):
    """Otherwise the windows of the other tests would prove nothing."""
    wide, narrow = (
        perplexity(llama, tokenizer, text, window=w, stride=1, progress=False).nll for w in (32, 4)
    )
    assert abs(wide - narrow) > 1e-3


@pytest.mark.parametrize("batch_size", [2, 3, 100])
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (12, 5)])
def test_batches_change_nothing(llama, tokenizer, text, batch_size, window, stride):
    settings = {"window": window, "stride": stride, "progress": False}
    single = perplexity(llama, tokenizer, text, **settings)
    batched = perplexity(llama, tokenizer, text, batch_size=batch_size, **settings)
    assert batched.nll == pytest.approx(single.nll, rel=1e-6)
    assert (batched.tokens, batched.windows) == (single.tokens, single.windows)


def test_a_model_with_learned_positions_and_padding(tokenizer, text):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=24)).eval()
    result = perplexity(gpt2, tokenizer, text, batch_size=4, progress=False)
    assert result.settings["window"] == 24 and result.settings["stride"] == 12
    assert result.nll == pytest.approx(by_hand(gpt2, tokenizer(text)["input_ids"], 24, 12), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_summed_in_float32(llama, tokenizer, text, dtype):
    """Summed in the model's dtype, the error would be that of its rounding: 4e-3 and 5e-4."""
    llama = llama.to(dtype)
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = llama(input_ids=torch.tensor([ids[:-1]])[:, :60]).logits[0]
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(60), ids[1:61]].neg().mean()
    result = perplexity(llama, tokenizer, text, window=61, stride=61, max_tokens=61, progress=False)
    assert result.nll == pytest.approx(float(expected), rel=1e-5)
    assert result.settings["dtype"] == str(dtype).removeprefix("torch.")


def test_standard_error_is_that_of_the_tokens(llama, tokenizer, text):
    ids = tokenizer(text)["input_ids"][:20]
    losses = [by_hand(llama, ids[: n + 1], 64, 32) * n for n in range(1, 20)]
    each = [b - a for a, b in zip([0.0, *losses], losses, strict=False)]
    mean = sum(each) / 19
    expected = math.sqrt(sum((x - mean) ** 2 for x in each) / 18 / 19)
    result = perplexity(llama, tokenizer, text, max_tokens=20, progress=False)
    assert result.nll_standard_error == pytest.approx(expected, rel=1e-4)
    assert result.perplexity_standard_error == pytest.approx(result.perplexity * expected, rel=1e-4)


def rows():
    return ["the cat sat", "", None, "on a mat while it was raining", "all slept"]


def joined():
    return "\n\n".join(row for row in rows() if row is not None)


@pytest.mark.parametrize(
    "source",
    [
        [row for row in rows() if row is not None],
        datasets.Dataset.from_dict({"text": rows(), "number": list(range(5))}),
        datasets.Dataset.from_dict({"text": rows()}).to_iterable_dataset(),
        datasets.IterableDataset.from_generator(lambda: ({"text": row} for row in rows())),
        datasets.Dataset.from_dict({"text": [row for row in rows() if row is not None]})["text"],
    ],
    ids=["list", "Dataset", "IterableDataset", "of-unknown-columns", "column"],
)
def test_a_dataset_is_its_rows_joined(llama, tokenizer, source):
    expected = perplexity(llama, tokenizer, joined(), progress=False)
    result = perplexity(llama, tokenizer, source, progress=False)
    assert (result.nll, result.tokens) == (expected.nll, expected.tokens)


def test_a_text_file(llama, tokenizer, text, tmp_path):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    from_file = perplexity(llama, tokenizer, tmp_path / "text.txt", progress=False)
    assert from_file.nll == perplexity(llama, tokenizer, text, progress=False).nll


def test_another_column(llama, tokenizer, text):
    dataset = datasets.Dataset.from_dict({"body": [text], "text": ["the cat"]})
    assert perplexity(llama, tokenizer, dataset, column="body", progress=False).text_tokens == 77


def test_without_a_separator_each_text_stands_alone(llama, tokenizer):
    texts = ["the cat sat on a mat", "all slept", "it was raining while the old dog ran to a red house"]
    alone = [perplexity(llama, tokenizer, one, progress=False) for one in texts]
    tokens = sum(one.tokens for one in alone)
    for batch_size in (1, 3):
        result = perplexity(llama, tokenizer, texts, separator=None, batch_size=batch_size, progress=False)
        assert result.tokens == tokens
        assert result.nll == pytest.approx(sum(one.nll * one.tokens for one in alone) / tokens, rel=1e-6)


def test_max_tokens_reads_only_the_rows_it_needs(llama, tokenizer, text):
    read = 0

    def generate():
        nonlocal read
        while True:  # a stream without an end
            read += 1
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(generate)
    result = perplexity(llama, tokenizer, stream, max_tokens=100, progress=False)
    whole = perplexity(llama, tokenizer, [text, text, text], max_tokens=100, progress=False)
    assert (result.text_tokens, result.tokens) == (100, 99)
    assert result.nll == whole.nll
    assert read < 10


def test_offloaded_and_spread_models(llama, tokenizer, text, tmp_path):
    expected = perplexity(llama, tokenizer, text, progress=False).nll
    llama.save_pretrained(tmp_path / "model")
    device_map = {
        "model.embed_tokens": "disk",
        "model.rotary_emb": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "lm_head": "disk",
    }
    offloaded = type(llama).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.embed_tokens.weight.device.type == "meta"
    assert perplexity(offloaded, tokenizer, text, progress=False).nll == pytest.approx(expected, rel=1e-6)


def test_modes_gradients_and_cache_are_as_they_were(tokenizer, text):
    model = make_llama().train()
    model.model.layers[0].eval()
    perplexity(model, tokenizer, text, progress=False)
    assert model.training and model.lm_head.training and not model.model.layers[0].mlp.training
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_a_quantized_model(llama, tokenizer, text):
    before = perplexity(llama, tokenizer, text, progress=False)
    quantized = quantize_model(llama, MonoQuantConfig())
    after = perplexity(quantized, tokenizer, text, progress=False)
    assert after.nll != before.nll
    assert after.nll == pytest.approx(before.nll, rel=0.02)
    assert after.nll == pytest.approx(by_hand(quantized, tokenizer(text)["input_ids"], 64, 32), rel=1e-6)


def test_the_result_is_frozen_and_goes_into_json(llama, tokenizer):
    result = perplexity(llama, tokenizer, "the", max_tokens=2, progress=False)
    assert result.tokens == 1 and math.isnan(result.nll_standard_error)
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read["nll_standard_error"] is None and read["perplexity"] == result.perplexity
    assert read["settings"]["max_tokens"] == 2
    with pytest.raises(FrozenInstanceError):
        result.tokens = 3
    assert "perplexity" in str(result)


def test_progress_is_shown_only_if_wanted(llama, tokenizer, text, capsys):
    perplexity(llama, tokenizer, text, progress=True)
    assert "76/76" in capsys.readouterr().err
    perplexity(llama, tokenizer, text, progress=False)
    assert capsys.readouterr() == ("", "")


def test_nan_is_told(llama, tokenizer, text):
    with torch.no_grad():
        llama.lm_head.weight[3] = math.nan
    with pytest.warns(RuntimeWarning, match="nan for 76 of 76 tokens"):
        result = perplexity(llama, tokenizer, text, progress=False)
    assert math.isnan(float(result)) and result.to_dict()["perplexity"] is None


def test_logits_too_large_for_exp_give_infinity(llama, tokenizer, text):
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e5)
    assert float(perplexity(llama, tokenizer, text, progress=False)) == math.inf


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("", {}, "no text to evaluate"),
        ([], {}, "no text to evaluate"),
        (["", ""], {}, "no text to evaluate"),
        (["", ""], {"separator": None}, "no text to evaluate"),
        (datasets.Dataset.from_dict({"text": []}), {}, "no text to evaluate"),
        ("the cat", {"max_tokens": 1}, "1 token.*at least 2 in a row"),
        ("the cat", {"max_tokens": 0}, "max_tokens is 0"),
        ("the cat", {"stride": 0}, "stride is 0"),
        ("the cat", {"stride": -1}, "stride is -1"),
        ("the cat", {"window": 8, "stride": 9}, r"stride \(9\) is larger than window \(8\)"),
        ("the cat", {"window": 1}, "window is 1"),
        ("the cat", {"window": 65}, "window is 65, but the model has positions for 64 tokens"),
        ("the cat", {"batch_size": 0}, "batch_size is 0"),
        (datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), {}, "no column 'text'.*'a', 'b'"),
        (
            datasets.IterableDataset.from_generator(lambda: iter([{"a": "x", "b": "y"}])),
            {},
            "no column 'text'.*'a', 'b'",
        ),
        (
            datasets.DatasetDict({n: datasets.Dataset.from_dict({"text": ["x"]}) for n in ("train", "test")}),
            {},
            r"the splits 'train', 'test': pass one of them, such as dataset\['train'\]",
        ),
    ],
)
def test_value_errors_name_what_is_wrong(llama, tokenizer, source, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llama, tokenizer, source, progress=False, **arguments)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "text_or_dataset is a int"),
        ({"text": "the cat"}, "text_or_dataset is a dict"),
        (["the cat", 4], "row 1 holds a int"),
        (datasets.Dataset.from_dict({"text": [["the", "cat"]]}), "row 0 of column 'text' holds a list"),
    ],
)
def test_what_is_not_text_is_refused(llama, tokenizer, source, message):
    with pytest.raises(TypeError, match=message):
        perplexity(llama, tokenizer, source, progress=False)


def test_models_that_perplexity_is_not_defined_for(bert, tokenizer, text):
    with pytest.raises(ValueError, match="not defined for BertForMaskedLM"):
        perplexity(bert, tokenizer, text, progress=False)
    with pytest.raises(TypeError, match="without logits"):
        perplexity(bert.bert, tokenizer, text, progress=False)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        perplexity(t5, tokenizer, text, progress=False)


def test_the_tokenizer_of_another_model_is_told(tokenizer, text):
    with pytest.raises(ValueError, match="the model embeds 10 tokens"):
        perplexity(make_llama(vocabulary=10), tokenizer, text, progress=False)


SHARED = """
from accelerate import PartialState
from mono_quant_hf.evaluation import perplexity
from tests.evaluation.conftest import TEXT, make_llama, make_tokenizer

PartialState(cpu=True)
for max_tokens in (5, 60):  # one window, which is fewer than processes, and three
    alone, shared = (
        perplexity(make_llama(), make_tokenizer(), TEXT, window=32, stride=16, max_tokens=max_tokens,
                   progress=False, split_between_processes=split)
        for split in (False, True)
    )
    assert (shared.nll, shared.tokens, shared.windows) == (alone.nll, alone.tokens, alone.windows)
    print(f"SAME{shared.windows}.", flush=True)  # in one piece, as two processes write
"""


def test_processes_share_windows_and_give_what_one_gives(tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [*command, str(tmp_path / "shared.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("SAME1.") == 2 and run.stdout.count("SAME3.") == 2


def test_sharing_windows_needs_processes(llama, tokenizer, text):
    with pytest.raises(ValueError, match=r"needs torch\.distributed: start the program with torchrun"):
        perplexity(llama, tokenizer, text, progress=False, split_between_processes=True)
