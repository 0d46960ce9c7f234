"""Compare what classifiers and encoders answer, before and after quantizing."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.calibration.blocks import evaluating
from mono_quant_hf.evaluation.divergence import kl_divergence
from mono_quant_hf.evaluation.results import Result
from mono_quant_hf.evaluation.scoring import logits_of, run_on


@dataclass(frozen=True)
class ClassifierComparison(Result):
    """How far a classifier's answers are from the reference's.

    Attributes:
        top1_agreement: share of samples, 0 to 1, for which both find the same class most likely.
        relative_error: ||logits - reference|| / ||reference|| over all samples (Frobenius norm).
        worst_relative_error: the largest of the same for a single sample.
        kl_mean: mean KL(softmax(reference) || softmax(logits)) per sample, in nats.
        samples: how many there were.
    """

    top1_agreement: float
    relative_error: float
    worst_relative_error: float
    kl_mean: float
    samples: int


@dataclass(frozen=True)
class EncoderComparison(Result):
    """How far an encoder's embeddings are from the reference's.

    Attributes:
        cosine_mean: mean cosine similarity of the two embeddings of a sample.
        cosine_min: the smallest.
        relative_error: ||embeddings - reference|| / ||reference|| over all samples (Frobenius norm).
        samples: how many there were.
    """

    cosine_mean: float
    cosine_min: float
    relative_error: float
    samples: int


def classifier_logits(
    model: nn.Module, batches: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, progress: bool = False
) -> Tensor:
    """The logits of a classifier (of text, images, audio, ...) for batches of its inputs.

    Args:
        model: any model whose output has `logits` [samples, classes].
        batches: what its tokenizer or processor returns, or an iterable of such; labels in it are not fed.
        progress: show a progress bar.

    Returns:
        float32 [samples, classes] on the CPU.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=8, num_labels=3)
        >>> model = BertForSequenceClassification(config)
        >>> batch = {"input_ids": torch.tensor([[1, 5, 2], [1, 7, 2]]), "labels": torch.tensor([0, 1])}
        >>> classifier_logits(model, [batch, batch]).shape
        torch.Size([4, 3])
    """
    batches = [batches] if isinstance(batches, Mapping) else batches
    parts = []
    with evaluating(model):
        for batch in tqdm(batches, unit="batch", desc="classifier", disable=not progress):
            inputs = {name: value for name, value in batch.items() if name not in ("label", "labels")}
            parts.append(logits_of(run_on(model, inputs)).float().cpu())
    if not parts:
        raise ValueError("there is nothing to classify: batches is empty.")
    return torch.cat(parts)


def text_embeddings(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    pooling: Literal["mean", "first"] = "mean",
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = False,
) -> Tensor:
    """One embedding for each text from an encoder's last hidden state.

    Args:
        model: an encoder whose output has `last_hidden_state` [samples, length, hidden].
        tokenizer: its tokenizer, with a padding token.
        texts: one text or several.
        pooling: "mean" over the tokens that are no padding (Reimers and Gurevych 2019, section 3), or the
            "first" token.
        batch_size: texts fed at once.
        max_length: cut texts to this many tokens; default: what the tokenizer says the model takes.
        progress: show a progress bar.

    Returns:
        float32 [texts, hidden] on the CPU, not normalized.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=128, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=8)
        >>> def tokenizer(texts, **_):     # texts of one length, so that none is padded
        ...     ids = torch.tensor([list(text.encode()) for text in texts])
        ...     return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        >>> text_embeddings(BertModel(config), tokenizer, ["good", "fair"]).shape
        torch.Size([2, 8])
    """
    if pooling not in ("mean", "first"):
        raise ValueError(f"pooling is {pooling!r}, but it must be 'mean' or 'first'.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but it must be at least 1.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("there is nothing to embed: texts is empty.")
    known = inspect.signature(model.forward).parameters
    parts = []
    with evaluating(model):
        starts = range(0, len(texts), batch_size)
        for begin in tqdm(starts, unit="batch", desc="embeddings", disable=not progress):
            part = texts[begin : begin + batch_size]
            encoded = tokenizer(
                part, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            inputs = {name: value for name, value in encoded.items() if name in known}
            hidden = run_on(model, inputs).last_hidden_state.float().cpu()
            if pooling == "mean":
                mask = encoded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                parts.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
            else:
                parts.append(hidden[:, 0])
    return torch.cat(parts)


def compare_classifiers(
    reference: nn.Module | Tensor,
    model: nn.Module | Tensor,
    batches: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
    *,
    progress: bool = False,
) -> ClassifierComparison:
    """Top-1 agreement and error of the logits of a quantized classifier against its float form.

    Args:
        reference: the float model; or its `classifier_logits`, so that the models need not be in memory
            together.
        model: the quantized model, or its `classifier_logits`.
        batches: the inputs, as in `classifier_logits`; not needed where both are logits.
        progress: show a progress bar.

    Example:
        >>> result = compare_classifiers(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]]))
        >>> result.top1_agreement, result.relative_error
        (1.0, 0.1)
    """
    if batches is not None and not isinstance(batches, Mapping):
        batches = list(batches)  # read twice
    expected, logits = (
        side.float().cpu()
        if isinstance(side, Tensor)
        else classifier_logits(side, _given(batches), progress=progress)
        for side in (reference, model)
    )
    _check_pair(expected, logits, "logits", "classes")
    difference = (logits - expected).double().norm(dim=1)
    size = expected.double().norm(dim=1)
    return ClassifierComparison(
        top1_agreement=float((expected.argmax(dim=1) == logits.argmax(dim=1)).double().mean()),
        relative_error=_ratio(difference.norm(), size.norm()),
        worst_relative_error=max(_ratio(d, s) for d, s in zip(difference, size, strict=True)),
        kl_mean=float(kl_divergence(expected, logits).mean()),
        samples=len(logits),
    )


def compare_encoders(
    reference: nn.Module | Tensor,
    model: nn.Module | Tensor,
    tokenizer: Any = None,
    texts: str | Sequence[str] | None = None,
    *,
    pooling: Literal["mean", "first"] = "mean",
    batch_size: int = 32,
    progress: bool = False,
) -> EncoderComparison:
    """Cosine similarity of the embeddings of a quantized text encoder with those of its float form.

    Args:
        reference: the float model; or any embeddings [samples, hidden] of it, such as `text_embeddings`, so
            that the models need not be in memory together.
        model: the quantized model, or its embeddings.
        tokenizer, texts, pooling, batch_size, progress: as in `text_embeddings`; not needed where both are
            embeddings.

    Example:
        >>> compare_encoders(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])).cosine_min
        1.0
    """
    expected, embedded = (
        side.float().cpu()
        if isinstance(side, Tensor)
        else text_embeddings(
            side, tokenizer, _given(texts), pooling=pooling, batch_size=batch_size, progress=progress
        )
        for side in (reference, model)
    )
    _check_pair(expected, embedded, "embeddings", "hidden")
    cosine = F.cosine_similarity(expected.double(), embedded.double(), dim=1)
    return EncoderComparison(
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        relative_error=_ratio((embedded - expected).double().norm(), expected.double().norm()),
        samples=len(cosine),
    )


def _given(inputs: Any) -> Any:
    if inputs is None:
        raise TypeError("a model is given, but no inputs to run it on.")
    return inputs


def _ratio(error: Tensor, size: Tensor) -> float:
    """error / size, with 0 / 0 = 0: nothing differs from nothing."""
    return float(error / size) if float(size) or float(error) else 0.0


def _check_pair(reference: Tensor, other: Tensor, what: str, axis: str) -> None:
    if reference.shape != other.shape or reference.dim() != 2 or not len(reference):
        raise ValueError(
            f"the reference's {what} have the shape {list(reference.shape)} and the model's "
            f"{list(other.shape)}: both must be [samples, {axis}], the same, with at least one sample."
        )
