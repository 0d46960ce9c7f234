"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from mono_quant_hf.calibration.blocks import evaluating
from mono_quant_hf.evaluation.results import Result, mean_and_standard_error, safe_exp
from mono_quant_hf.evaluation.scoring import negative_log_likelihood, score
from mono_quant_hf.evaluation.windows import Passage, Plan, WindowOptions, Windows, plan, task_of


@dataclass(frozen=True)
class PerplexityResult(Result):
    """Perplexity and what it was made of; `float(result)` is the perplexity.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood of a scored token, in nats.
        nll_standard_error: standard error of `nll` over the tokens, taken as independent; nan for one token.
        tokens: how many tokens were scored: all but the first of the text.
        text_tokens: how many tokens the text has.
        windows: how many windows were fed.
        seconds: wall-clock time of scoring, tokenizing and loading aside.
        settings: what it was measured with (model, dtype, window, stride, ...).
    """

    perplexity: float
    nll: float
    nll_standard_error: float
    tokens: int
    text_tokens: int
    windows: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.perplexity

    @property
    def perplexity_standard_error(self) -> float:
        """Standard error of the perplexity to first order: d exp(x) = exp(x) dx."""
        return self.perplexity * self.nll_standard_error

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} ± {self.perplexity_standard_error:.4f} ({self.tokens:,} "
            "tokens)"
        )


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text_or_dataset: Any,
    *,
    progress: bool = True,
    split_between_processes: bool = False,
    **options: Unpack[WindowOptions],
) -> PerplexityResult:
    """Perplexity of a causal language model on a text, with a sliding window.

    For tokens x_0 ... x_t, PPL = exp(-1/t Σ_{i=1..t} ln p(x_i | context)) (formula and strided method:
    "Perplexity of fixed-length models", transformers documentation).  Every token but the first is scored
    exactly once, after the first window with at least `window - stride` tokens of context; the mean is over
    scored tokens, so that a short last window weighs no more than it should.  The log-softmax is taken in
    float32 and the mean in float64, whatever the dtype of the model.

    Args:
        model: a causal language model, float or quantized, on any device, also spread or offloaded by
            `device_map`. It is put in evaluation mode and, afterwards, back as it was.
        tokenizer: the tokenizer of the model.  Special tokens are added as it does by default.
        text_or_dataset: a str, a `pathlib.Path` of a text file, a list of str, a `Dataset` or `IterableDataset`.
        window: tokens in a window.  Default: what the model has positions for, at most 1024: memory grows
            with the window, and beyond that little is gained.
        stride: tokens between windows, from 1 (most context, slowest) to `window` (no overlap, fastest).
            Default: half the window.
        batch_size: windows fed at once; the result does not depend on it, but for float rounding.
        column: the column of a dataset that holds the text.
        separator: joins the texts of a list or dataset into one, "\\n\\n" as in the documentation.  None
            scores each text by itself; then the first token of each is not scored.
        max_tokens: use only so many tokens from the start; of a dataset only the rows needed are read.
        progress: show a progress bar.
        split_between_processes: every process of torch.distributed scores its share of the windows, and each
            returns the result of all; all of them must call this, each with the whole model.

    Raises:
        ValueError: no text or fewer than 2 tokens; a number out of range; a missing column; a dataset of several
            splits; a model that is not causal; a tokenizer of another model.
        TypeError: something that is not text, or a model without logits.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, max_position_embeddings=16)
        >>> tokenizer = lambda text, **_: {"input_ids": list(text.encode())}
        >>> result = perplexity(LlamaForCausalLM(config), tokenizer, "to be or not to be", progress=False)
        >>> result.tokens, result.text_tokens, result.windows, 100 < float(result) < 160  # guesses among 128
        (17, 18, 2, True)
    """
    windows = Windows(**options)
    if task_of(model) != "causal":
        raise ValueError(
            f"perplexity is not defined for {type(model).__name__}, a masked language model: use divergence()."
        )
    planned = plan(model, tokenizer, text_or_dataset, windows)
    started = time.perf_counter()
    losses = _shared_losses if split_between_processes else _losses
    parts = losses(model, planned.passages, windows.batch_size, progress)
    return summarize(torch.cat(parts), planned, time.perf_counter() - started)


def _shared_losses(
    model: nn.Module, passages: Sequence[Passage], batch_size: int, progress: bool
) -> list[torch.Tensor]:
    """As `_losses`, each process computing those of its share."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "split_between_processes needs torch.distributed: start the program with torchrun and make an "
            "accelerate.PartialState() first."
        )
    with PartialState().split_between_processes(passages) as own:
        parts: list[torch.Tensor] = gather_object(_losses(model, own, batch_size, progress))
    # older accelerate gives the last one again to processes that are left over where there are few
    return parts[: len(passages)]


def _losses(
    model: nn.Module, passages: Sequence[Passage], batch_size: int, progress: bool
) -> list[torch.Tensor]:
    """The negative log-likelihood (float64 [tokens]) of every scored token of each passage."""
    parts: list[torch.Tensor] = []
    total, count = 0.0, sum(len(passage.targets) for passage in passages)
    with (
        evaluating(model),
        tqdm(total=count, unit="token", desc="perplexity", disable=not progress) as bar,
    ):
        for passage, logits in score(model, passages, batch_size):
            parts.append(negative_log_likelihood(logits, passage.targets))
            total += float(parts[-1].sum())
            bar.update(len(passage.targets))
            bar.set_postfix(perplexity=f"{safe_exp(total / bar.n):.3f}" if bar.n else "", refresh=False)
    return parts


def summarize(nll: torch.Tensor, planned: Plan, seconds: float) -> PerplexityResult:
    """The result for the negative log-likelihood (float64 [tokens]) of every scored token."""
    broken = int(nll.isnan().sum())
    if broken:
        warnings.warn(
            f"the model gave nan for {broken} of {len(nll)} tokens, so its perplexity is nan: its "
            "activations may overflow its dtype (try bfloat16 or float32).",
            RuntimeWarning,
            stacklevel=3,
        )
    mean, error = mean_and_standard_error(nll)
    return PerplexityResult(
        perplexity=safe_exp(mean),
        nll=mean,
        nll_standard_error=error,
        tokens=len(nll),
        text_tokens=planned.tokens,
        windows=len(planned.passages),
        seconds=seconds,
        settings=planned.settings,
    )
