"""How far a quantized language model's predictions are from its float model's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import tee
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.calibration.blocks import evaluating
from mono_quant_hf.evaluation.reference import Reference, load_reference
from mono_quant_hf.evaluation.results import Result, mean_and_standard_error, safe_exp
from mono_quant_hf.evaluation.scoring import negative_log_likelihood, row_chunks, score
from mono_quant_hf.evaluation.windows import MaskedOptions, MaskedWindows, Passage, plan


@dataclass(frozen=True)
class DivergenceResult(Result):
    """How far a model's predictions are from the reference's, over the scored tokens.

    Attributes:
        kl_mean: mean KL divergence KL(reference || model) per token, in nats.
        kl_standard_error: its standard error over the tokens, taken as independent; nan for one token.
        kl_p99: 99th percentile of the KL divergence (linear interpolation).
        kl_max: the largest.
        top1_agreement: share of tokens, 0 to 1, at which both find the same token most likely.
        perplexity: of the model.
        reference_perplexity: of the reference.  For masked models both are exp of the mean negative
            log-likelihood of the masked tokens.
        nll_difference: mean of nll(model) - nll(reference), token by token, in nats: ln of the ratio of the
            perplexities.
        nll_difference_standard_error: its standard error.  Paired by token, and so far smaller than the
            standard errors of the perplexities.
        tokens, windows, seconds, settings: as in `PerplexityResult`.
    """

    kl_mean: float
    kl_standard_error: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    nll_difference: float
    nll_difference_standard_error: float
    tokens: int
    windows: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def perplexity_change_percent(self) -> float:
        """100 * (perplexity / reference_perplexity - 1)."""
        return 100 * (safe_exp(self.nll_difference) - 1)

    def __str__(self) -> str:
        return (
            f"KL {self.kl_mean:.3g} ± {self.kl_standard_error:.1g} nats (99 %: {self.kl_p99:.3g}), top-1 "
            f"agreement {self.top1_agreement:.2%}, perplexity {self.perplexity:.4f} "
            f"({self.perplexity_change_percent:+.3f} %), {self.tokens:,} tokens"
        )


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) = Σ_i p_i (ln p_i - ln q_i) of each row, p = softmax(reference), q = softmax(logits).

    Over the whole vocabulary and in float64, where its rounding (1e-15) is far below what even a cast to
    float16 costs. Kullback and Leibler 1951, equation 2.2.

    Args:
        reference: float [rows, vocabulary].
        logits: float [rows, vocabulary].

    Returns:
        float64 [rows] on the CPU, not negative; inf where the model rules out what the reference allows.

    Example:
        >>> kl = kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log())
        >>> round(kl.item(), 6)  # ln(4 / 3) / 2
        0.143841
    """
    return _kl_and_agreement(reference, logits)[0]


def _kl_and_agreement(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != logits.shape:
        raise ValueError(
            f"the reference's logits have the shape {list(reference.shape)} and the model's "
            f"{list(logits.shape)}: only models of the same vocabulary can be compared."
        )
    # Apple's GPUs have no float64
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device
    kl, same = [], []
    for rows in row_chunks(logits):
        p_logits = reference[rows].to(device)
        q_logits = logits[rows].to(device)
        log_p = torch.log_softmax(p_logits.double(), dim=-1)
        log_q = torch.log_softmax(q_logits.double(), dim=-1)
        p = log_p.exp()
        # a token that the reference rules out (logit -inf) adds nothing: 0 ln 0 = 0
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        kl.append(terms.sum(dim=-1).clamp_min(0).cpu())
        same.append((p_logits.argmax(dim=-1) == q_logits.argmax(dim=-1)).cpu())
    return torch.cat(kl), torch.cat(same)


def divergence(
    reference: nn.Module | Reference | str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Any = None,
    text_or_dataset: Any = None,
    *,
    progress: bool = True,
    **options: Unpack[MaskedOptions],
) -> DivergenceResult:
    """KL divergence, top-1 agreement and change of perplexity of `model` against `reference`, token by token.

    Perplexity alone hides small changes: it mixes the model's errors with the surprise of the text, and they
    cancel.  KL and top-1 agreement compare the two predictions themselves.

    Args:
        reference: the float model; or what `record_reference` made of it, or its folder, so that the two
            models need not be in memory together.
        model: the quantized model, of the same vocabulary; causal or masked.
        tokenizer, text_or_dataset, window, stride, column, separator, max_tokens, mask_probability, seed: as
            in `record_reference`; only with a model as the reference, for a recorded one holds its own
            tokens.
        batch_size: windows fed at once.
        progress: show a progress bar.

    Raises:
        ValueError: as `record_reference`; the vocabularies differ; or the reference cannot be read.
        TypeError: a tokenizer, text or window given with a recorded reference, or none without.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, max_position_embeddings=16)
        >>> model = LlamaForCausalLM(config)
        >>> tokenizer = lambda text, **_: {"input_ids": list(text.encode())}
        >>> result = divergence(model, model, tokenizer, "to be or not to be", progress=False)
        >>> result.kl_mean, result.top1_agreement, result.tokens
        (0.0, 1.0, 17)
    """
    started = time.perf_counter()
    pairs, sizes = _pairs(reference, model, tokenizer, text_or_dataset, options)
    kl, same, nll, reference_nll = [], [], [], []
    with (
        evaluating(reference if isinstance(reference, nn.Module) else model),
        evaluating(model),
        tqdm(total=sizes.pop("scored"), unit="token", desc="divergence", disable=not progress) as bar,
    ):
        for targets, expected, logits in pairs:
            window_kl, window_same = _kl_and_agreement(expected, logits)
            kl.append(window_kl)
            same.append(window_same)
            nll.append(negative_log_likelihood(logits, targets))
            reference_nll.append(negative_log_likelihood(expected, targets))
            bar.update(len(targets))
    figures = _figures(*(torch.cat(parts) for parts in (kl, same, nll, reference_nll)))
    return DivergenceResult(**figures, **sizes, seconds=time.perf_counter() - started)


def _pairs(
    reference: nn.Module | Reference | str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Any,
    source: Any,
    options: MaskedOptions,
) -> tuple[Iterator[tuple[Tensor, Tensor, Tensor]], dict[str, Any]]:
    """Targets with the logits of both, window by window; and the number of scored tokens and windows, the settings."""
    windows = MaskedWindows(**options)
    passages: Iterable[Passage]
    if isinstance(reference, (str, os.PathLike, Reference)):
        given = [tokenizer, source, *(v for name, v in options.items() if name != "batch_size")]
        if any(value is not None for value in given):
            raise TypeError(
                "a recorded reference holds its own tokens and windows: call divergence(reference, model) "
                "without a tokenizer, text, window or stride."
            )
        recorded = reference if isinstance(reference, Reference) else load_reference(reference)
        answers, again = tee(recorded.logits())  # read once, and kept while its batch is fed to the model
        passages = (passage for passage, _ in again)
        scored, count, settings = recorded.perplexity.tokens, recorded.windows, recorded.settings
    else:
        if not isinstance(reference, nn.Module):
            raise TypeError(
                f"reference is a {type(reference).__name__}, not a model or a recorded reference."
            )
        if tokenizer is None or source is None:
            raise TypeError(
                "a tokenizer and a text are needed to compare two models: divergence(reference, model, "
                "tokenizer, text)."
            )
        planned = plan(reference, tokenizer, source, windows)
        answers, passages = score(reference, planned.passages, windows.batch_size), planned.passages
        scored, count, settings = planned.scored, len(planned.passages), planned.settings
    pairs = (
        (passage.targets, expected, logits)
        for (passage, expected), (_, logits) in zip(
            answers, score(model, passages, windows.batch_size), strict=True
        )
    )
    settings = settings | {"batch_size": windows.batch_size}
    return pairs, {"scored": scored, "windows": count, "settings": settings}


def _figures(kl: Tensor, same: Tensor, nll: Tensor, reference_nll: Tensor) -> dict[str, Any]:
    kl_mean, kl_error = mean_and_standard_error(kl)
    difference, difference_error = mean_and_standard_error(nll - reference_nll)
    return {
        "kl_mean": kl_mean,
        "kl_standard_error": kl_error,
        "kl_p99": float(np.quantile(kl.numpy(), 0.99)),
        "kl_max": float(kl.max()),
        "top1_agreement": float(same.double().mean()),
        "perplexity": safe_exp(float(nll.mean())),
        "reference_perplexity": safe_exp(float(reference_nll.mean())),
        "nll_difference": difference,
        "nll_difference_standard_error": difference_error,
        "tokens": len(kl),
    }
