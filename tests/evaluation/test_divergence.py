"""KL divergence and top-1 agreement against plain Python; a recorded reference against the model itself."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import BertForMaskedLM

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.evaluation import (
    divergence,
    kl_divergence,
    load_reference,
    perplexity,
    record_reference,
)
from mono_quant_hf.evaluation.windows import MaskedWindows, plan

from .conftest import make_llama


def log_softmax(logits):
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def kl_by_hand(p_logits, q_logits):
    return sum(
        math.exp(p) * (p - q) for p, q in zip(log_softmax(p_logits), log_softmax(q_logits), strict=True)
    )


def nudged(model, size=0.03):
    """A model a little off, as quantizing leaves it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    return model


def figures(result):
    """What was measured, without what it took."""
    return {name: value for name, value in result.to_dict().items() if name not in ("seconds", "settings")}


def assert_same(one, other, rel=1e-9):
    assert figures(one) == pytest.approx(figures(other), rel=rel, nan_ok=True)


def test_kl_by_hand():
    torch.manual_seed(0)
    p, q = torch.randn(5, 17), torch.randn(5, 17)
    expected = [kl_by_hand(a, b) for a, b in zip(p.double().tolist(), q.double().tolist(), strict=True)]
    assert kl_divergence(p, q).tolist() == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(p, p).tolist() == [0.0] * 5


def test_kl_of_a_tiny_difference_is_not_rounding():
    """To second order KL is half the variance of the difference under p: here below what float32 resolves."""
    torch.manual_seed(0)
    p = 3 * torch.randn(1, 50_000).double()
    difference = 1e-5 * torch.randn(1, 50_000).double()
    probability = torch.softmax(p, -1)
    variance = (probability * difference**2).sum() - (probability * difference).sum() ** 2
    assert kl_divergence(p, p + difference).item() == pytest.approx(variance.item() / 2, rel=1e-3)


def test_kl_where_tokens_are_ruled_out():
    inf = math.inf
    assert kl_divergence(torch.tensor([[0.0, 0.0, -inf]]), torch.tensor([[0.0, 0.0, -inf]])).item() == 0
    assert kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -inf]])).item() == inf


def test_divergence_by_hand(llama, tokenizer, text):
    other = nudged(make_llama(), 0.2)
    ids = tokenizer(text)["input_ids"][:50]
    with torch.no_grad():
        p, q = (m(input_ids=torch.tensor([ids[:-1]])).logits[0].double().tolist() for m in (llama, other))
    kl = [kl_by_hand(a, b) for a, b in zip(p, q, strict=True)]
    agree = sum(a.index(max(a)) == b.index(max(b)) for a, b in zip(p, q, strict=True)) / 49
    nll = [[-log_softmax(row)[ids[n + 1]] for n, row in enumerate(rows)] for rows in (p, q)]
    place = 0.99 * 48
    lower, upper = sorted(kl)[math.floor(place)], sorted(kl)[math.ceil(place)]

    result = divergence(llama, other, tokenizer, text, max_tokens=50, progress=False)
    assert result.tokens == 49
    assert result.kl_mean == pytest.approx(sum(kl) / 49, rel=1e-6)
    assert result.kl_max == pytest.approx(max(kl), rel=1e-6)
    assert result.kl_p99 == pytest.approx(lower + (place % 1) * (upper - lower), rel=1e-6)
    assert result.top1_agreement == pytest.approx(agree, rel=1e-12)
    assert 0.3 < agree < 1
    assert result.reference_perplexity == pytest.approx(math.exp(sum(nll[0]) / 49), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(nll[1]) / 49), rel=1e-6)
    difference = [b - a for a, b in zip(*nll, strict=True)]
    mean = sum(difference) / 49
    assert result.nll_difference == pytest.approx(mean, rel=1e-5)
    error = math.sqrt(sum((d - mean) ** 2 for d in difference) / 48 / 49)
    assert result.nll_difference_standard_error == pytest.approx(error, rel=1e-5)
    assert result.perplexity_change_percent == pytest.approx(
        100 * (result.perplexity / result.reference_perplexity - 1), rel=1e-9
    )


def test_perplexities_are_those_of_perplexity(llama, tokenizer, text):
    other = nudged(make_llama())
    settings = {"window": 16, "stride": 5, "progress": False}
    result = divergence(llama, other, tokenizer, text, batch_size=3, **settings)
    before, after = (perplexity(model, tokenizer, text, **settings) for model in (llama, other))
    assert result.reference_perplexity == pytest.approx(float(before), rel=1e-6)
    assert result.perplexity == pytest.approx(float(after), rel=1e-6)
    assert (result.tokens, result.windows) == (after.tokens, after.windows)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_recorded_reference_is_as_good_as_the_model(llama, tokenizer, text, tmp_path, batch_size):
    other = nudged(make_llama())
    settings = {"window": 16, "stride": 8, "progress": False}
    expected = divergence(llama, other, tokenizer, text, **settings)
    recorded = record_reference(llama, tokenizer, text, tmp_path / "r", batch_size=batch_size, **settings)
    assert_same(divergence(recorded, other, batch_size=batch_size, progress=False), expected, rel=1e-4)
    assert_same(divergence(str(tmp_path / "r"), other, progress=False), expected, rel=1e-4)
    alone = perplexity(llama, tokenizer, text, **settings)
    assert load_reference(tmp_path / "r").perplexity.perplexity == pytest.approx(float(alone), rel=1e-6)


def test_a_model_does_not_differ_from_its_own_record(llama, tokenizer, text, tmp_path):
    """Stored as given, nothing is lost, in bfloat16 neither; as float16 it costs a little."""
    for name, model in {"float32": llama, "bfloat16": make_llama().to(torch.bfloat16)}.items():
        recorded = record_reference(model, tokenizer, text, tmp_path / name, progress=False)
        result = divergence(recorded, model, progress=False)
        assert (result.kl_max, result.top1_agreement, result.nll_difference) == (0.0, 1.0, 0.0)
    half = record_reference(llama, tokenizer, text, tmp_path / "half", dtype=torch.float16, progress=False)
    assert 0 < divergence(half, llama, progress=False).kl_mean < 1e-5
    sizes = [(tmp_path / n / "window-000000.safetensors").stat().st_size for n in ("float32", "half")]
    assert sizes[1] < 0.6 * sizes[0] + 1000


def test_an_interrupted_recording_goes_on(llama, tokenizer, text, tmp_path):
    settings = {"window": 16, "stride": 8, "progress": False}
    whole = record_reference(llama, tokenizer, text, tmp_path / "r", **settings)
    kept, calls = whole.windows - 3, 0
    for number in range(kept, whole.windows):
        (tmp_path / "r" / f"window-{number:06d}.safetensors").unlink()
    manifest = json.loads((tmp_path / "r" / "reference.json").read_text())
    (tmp_path / "r" / "reference.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(ValueError, match="was interrupted"):
        load_reference(tmp_path / "r")

    def count(*_):
        nonlocal calls
        calls += 1

    with_hook = llama.register_forward_hook(count)
    again = record_reference(llama, tokenizer, text, tmp_path / "r", **settings)
    with_hook.remove()
    assert calls == 3
    assert again.perplexity.nll == whole.perplexity.nll
    assert_same(divergence(again, llama, progress=False), divergence(whole, llama, progress=False))


def test_a_folder_of_another_reference_is_left_alone(llama, tokenizer, text, tmp_path):
    record_reference(llama, tokenizer, text, tmp_path / "r", progress=False)
    with pytest.raises(ValueError, match="another model, text or setting"):
        record_reference(make_llama(seed=1), tokenizer, text, tmp_path / "r", progress=False)
    with pytest.raises(ValueError, match="another model, text or setting"):
        record_reference(llama, tokenizer, text[:50], tmp_path / "r", progress=False)


def test_unreadable_references(llama, tokenizer, text, tmp_path):
    with pytest.raises(ValueError, match=r"holds no reference \(reference.json is missing\)"):
        divergence(tmp_path, llama, progress=False)
    recorded = record_reference(llama, tokenizer, text, tmp_path / "r", progress=False)
    file = tmp_path / "r" / "window-000000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"window-000000\.safetensors cannot be read"):
        divergence(recorded, llama, progress=False)
    (tmp_path / "r" / "reference.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_reference(tmp_path / "r")
    with pytest.raises(ValueError, match=r"stored as torch\.float32, torch\.float16 or"):
        record_reference(llama, tokenizer, text, tmp_path / "s", dtype=torch.int8, progress=False)


def test_a_disk_that_is_too_small_is_told_before_it_is_full(llama, tokenizer, text, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    with pytest.raises(OSError, match=r"needs 0\.0 GB in .* give a smaller max_tokens"):
        record_reference(llama, tokenizer, text, tmp_path / "r", progress=False)


def test_masked_models_are_compared_at_the_masked_places(bert, tokenizer, text):
    other = BertForMaskedLM(bert.config).eval()
    other.load_state_dict(bert.state_dict())
    nudged(other, 0.1)
    settings = {"window": 16, "progress": False, "mask_probability": 0.25, "seed": 3}
    result = divergence(bert, other, tokenizer, text, batch_size=2, **settings)
    windows = MaskedWindows(window=16, separator=None, mask_probability=0.25, seed=3)
    planned = plan(bert, tokenizer, text, windows)
    kl, words = [], []
    for passage in planned.passages:
        ids = passage.input_ids.tolist()
        assert (ids[0], ids[-1]) == (2, 3) and len(ids) <= 16
        assert [n for n, i in enumerate(ids) if i == 4] == passage.positions.tolist()
        with torch.no_grad():
            p, q = (m(input_ids=passage.input_ids[None]).logits[0].double().tolist() for m in (bert, other))
        kl += [kl_by_hand(p[n], q[n]) for n in passage.positions]
        ids = passage.input_ids.clone()
        ids[passage.positions] = passage.targets
        words += ids.tolist()[1:-1]
    assert tokenizer.decode(words) == text
    # 75 words in pieces of 14: five of 14, one of 5
    assert result.tokens == len(kl) == 5 * round(0.25 * 14) + 1
    assert result.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert result.kl_mean > 0 and result.settings["task"] == "masked"


def test_masked_references_and_seeds(bert, tokenizer, text, tmp_path):
    recorded = record_reference(bert, tokenizer, text, tmp_path / "r", window=16, progress=False)
    result = divergence(recorded, bert, batch_size=3, progress=False)
    assert result.kl_mean < 1e-9 and result.top1_agreement == 1
    seeds = [divergence(bert, bert, tokenizer, text, seed=seed, progress=False) for seed in (0, 0, 1)]
    assert seeds[0].perplexity == seeds[1].perplexity != seeds[2].perplexity
    with pytest.raises(ValueError, match="stride is for causal"):
        divergence(bert, bert, tokenizer, text, stride=4, progress=False)
    with pytest.raises(ValueError, match="mask_probability is 0"):
        divergence(bert, bert, tokenizer, text, mask_probability=0, progress=False)


def test_quantized_models_rank_as_they_should(llama, tokenizer, text, tmp_path):
    recorded = record_reference(llama, tokenizer, text, tmp_path / "r", progress=False)
    int8, half = (
        divergence(recorded, quantize_model(make_llama(), MonoQuantConfig(weights=weights)), progress=False)
        for weights in ("int8", "float16")
    )
    assert 0 < half.kl_mean < int8.kl_mean / 10
    assert int8.kl_mean < 0.05 and int8.top1_agreement > 0.9


def test_wrong_use(llama, tokenizer, text, tmp_path):
    recorded = record_reference(llama, tokenizer, text, tmp_path / "r", progress=False)
    with pytest.raises(TypeError, match="holds its own tokens"):
        divergence(recorded, llama, tokenizer, text, progress=False)
    with pytest.raises(TypeError, match="a tokenizer and a text are needed"):
        divergence(llama, llama, progress=False)
    with pytest.raises(TypeError, match="reference is a int"):
        divergence(3, llama, tokenizer, text, progress=False)
    with pytest.raises(ValueError, match="only models of the same vocabulary"):
        divergence(recorded, make_llama(vocabulary=40), progress=False)
    with pytest.raises(ValueError, match="batch_size is 0"):
        divergence(recorded, llama, batch_size=0, progress=False)


def test_results_go_into_json(llama, tokenizer, text):
    result = divergence(llama, llama, tokenizer, text, max_tokens=2, progress=False)
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read["tokens"] == 1 and read["kl_standard_error"] is None
    assert set(read) == {field.name for field in dataclasses.fields(result)}
    assert "top-1 agreement 100.00%" in str(result)
