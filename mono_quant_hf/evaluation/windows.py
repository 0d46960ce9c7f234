"""A text, cut into the windows that a language model reads and the places where it is scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from mono_quant_hf.texts import special_frame, token_sequences


@dataclass(frozen=True)
class Window:
    """Tokens `[start, stop)` are fed; tokens `[first_target, stop]` are scored, each by the one before it."""

    start: int
    stop: int
    first_target: int

    @property
    def positions(self) -> range:
        """Places in the fed tokens whose output predicts a scored token."""
        return range(self.first_target - 1 - self.start, self.stop - self.start)

    @property
    def targets(self) -> range:
        """Places in the sequence of the scored tokens, one for each of `positions`."""
        return range(self.first_target, self.stop + 1)


def check_window(window: int, stride: int) -> None:
    """Raise ValueError unless `window >= 2` and `1 <= stride <= window`."""
    if window < 2:
        raise ValueError(
            f"window is {window}, but it must be at least 2 tokens: one to read, one to predict."
        )
    if stride < 1:
        raise ValueError(f"stride is {stride}, but it must be at least 1 token.")
    if stride > window:
        raise ValueError(
            f"stride ({stride}) is larger than window ({window}), which would leave tokens out: "
            f"give a stride of {window} or less."
        )


def sliding_windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over a sequence of `length` tokens that score every token but the first exactly once.

    The k-th window covers tokens `[k * stride, k * stride + window)`, the last one is cut at the end of the
    sequence, and in each only the tokens that no earlier window scored are scored: the overlap is context
    alone.  That is the strided sliding window of "Perplexity of fixed-length models" (transformers
    documentation), with two details made exact.  The last token of a window is predicted but never
    read, so it is not fed.  And where `stride == window` leaves no overlap, one token of the window before is
    fed in its place, so that the first token of each window is scored too (in the documentation's
    code it is lost).  Never more than `window` tokens are fed.

    Args:
        length: tokens in the sequence, at least 2.
        window: tokens a window covers, at least 2.
        stride: tokens from one window to the next, from 1 to `window`.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> for w in sliding_windows(length=7, window=4, stride=2):
        ...     print("feed", list(range(w.start, w.stop)), "score", list(w.targets))
        feed [0, 1, 2] score [1, 2, 3]
        feed [2, 3, 4] score [4, 5]
        feed [4, 5] score [6]
    """
    check_window(window, stride)
    if length < 2:
        raise ValueError(f"a sequence of {length} token(s) has nothing to score: it must have at least 2.")
    scored_to = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield Window(start=min(begin, scored_to - 1), stop=end - 1, first_target=scored_to)
        scored_to = end
        if end == length:
            return


def chunks(length: int, window: int) -> Iterator[range]:
    """`range(length)` cut into pieces of `window`; the last may be shorter."""
    for begin in range(0, length, window):
        yield range(begin, min(begin + window, length))


Task = Literal["causal", "masked"]

# Attention memory grows with the window and the gain in context flattens, so a window of the model's full
# length (128k tokens and more today) would be a poor default.
DEFAULT_WINDOW = 1024
_POSITION_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)


@dataclass(frozen=True)
class Passage:
    """Tokens to feed and the places where the output is scored.

    `input_ids` int64 [length]; `positions` int64 [scored], ascending places in it; `targets` int64 [scored],
    the token that the output at each position should predict.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Plan:
    """All passages of a text, and the settings they were made with."""

    task: Task
    passages: list[Passage]
    tokens: int
    settings: dict[str, Any]

    @property
    def scored(self) -> int:
        return sum(len(passage.targets) for passage in self.passages)


def task_of(model: nn.Module) -> Task:
    """Whether the language model predicts the next token or a masked one.

    A class that transformers does not list as either counts as causal.

    Raises:
        ValueError: an encoder-decoder.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    name = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder, and only causal and masked language models are evaluated."
        )
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal"
    masked = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("ForMaskedLM")
    return "masked" if masked else "causal"


def max_positions(model: nn.Module) -> int | None:
    """The longest input the model has positions for, or None where its config sets no limit."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for field in _POSITION_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def plan(
    model: nn.Module,
    tokenizer: Any,
    source: Any,
    *,
    window: int | None,
    stride: int | None,
    batch_size: int,
    column: str,
    separator: str | None,
    max_tokens: int | None,
    mask_probability: float = 0.15,
    seed: int = 0,
) -> Plan:
    """Tokenize `source` and cut it for `model`; every argument is checked here, before anything runs."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but it must be at least 1.")
    task = task_of(model)
    if task == "masked" and stride is not None:
        raise ValueError("stride is for causal language models: the windows of a masked one do not overlap.")
    window = _choose_window(model, tokenizer, window)
    stride = max(1, window // 2) if stride is None else stride
    check_window(window, stride)
    sequences = token_sequences(
        tokenizer,
        source,
        column=column,
        separator=separator,
        max_tokens=max_tokens,
        add_special_tokens=task == "causal",
    )
    _check_vocabulary(model, sequences)
    settings: dict[str, Any] = {
        "task": task,
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "dtype": str(getattr(model, "dtype", "unknown")).removeprefix("torch."),
        "window": window,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "separator": separator,
    }
    if task == "causal":
        settings["stride"] = stride
        passages = list(causal_passages(sequences, window, stride))
    else:
        settings |= {"mask_probability": mask_probability, "seed": seed}
        passages = list(masked_passages(sequences, window, tokenizer, mask_probability, seed))
    tokens = sum(len(sequence) for sequence in sequences)
    if not passages:
        raise ValueError(
            f"the text makes {tokens} token(s) in {len(sequences)} sequence(s), and at least 2 in a row are "
            "needed: the first token is never scored."
        )
    return Plan(task=task, passages=passages, tokens=tokens, settings=settings)


def causal_passages(sequences: Iterable[Tensor], window: int, stride: int) -> Iterable[Passage]:
    """The sliding windows of each sequence; a sequence of one token has nothing to score and is left out."""
    for tokens in sequences:
        if len(tokens) < 2:
            continue
        for w in sliding_windows(len(tokens), window, stride):
            yield Passage(
                input_ids=tokens[w.start : w.stop],
                positions=torch.arange(w.positions.start, w.positions.stop),
                targets=tokens[w.targets.start : w.targets.stop],
            )


def masked_passages(
    sequences: Iterable[Tensor], window: int, tokenizer: Any, mask_probability: float, seed: int
) -> Iterable[Passage]:
    """Pieces of each sequence between the tokenizer's special tokens, a share of the tokens masked.

    The places are drawn without replacement from a generator seeded with `seed`, `mask_probability` of each
    piece and at least one; all of them become the mask token (Devlin et al. 2019, section 3.1, with the
    80/10/10 replacement of training left out).
    """
    if not 0 < mask_probability <= 1:
        raise ValueError(f"mask_probability is {mask_probability}, but it must be above 0 and at most 1.")
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise ValueError("the tokenizer has no mask token, which a masked language model is scored with.")
    before, after = special_frame(tokenizer)
    room = window - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"window is {window}, which leaves no room beside the special tokens: give a larger one."
        )
    generator = torch.Generator().manual_seed(seed)
    for tokens in sequences:
        for piece in chunks(len(tokens), room):
            original = tokens[piece.start : piece.stop]
            count = max(1, round(mask_probability * len(original)))
            places = torch.randperm(len(original), generator=generator)[:count].sort().values
            masked = original.clone()
            masked[places] = mask
            yield Passage(torch.cat([before, masked, after]), places + len(before), original[places])


def _choose_window(model: nn.Module, tokenizer: Any, window: int | None) -> int:
    positions = max_positions(model)
    if window is None:
        # a tokenizer that knows no limit says 1e30
        limit = min(getattr(tokenizer, "model_max_length", None) or DEFAULT_WINDOW, DEFAULT_WINDOW)
        return max(2, int(min(limit, positions or DEFAULT_WINDOW)))
    if positions is not None and window > positions:
        raise ValueError(
            f"window is {window}, but the model has positions for {positions} tokens: give a window of "
            f"{positions} or less."
        )
    return window


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that embeds tokens, where the model says which it is."""
    get = getattr(model, "get_input_embeddings", None)
    if get is None:
        return None
    try:
        return get()
    except NotImplementedError:  # transformers' answer for a model without one
        return None


def _check_vocabulary(model: nn.Module, sequences: list[Tensor]) -> None:
    """An id past the embedding is an IndexError on a CPU and a device-side assert on a GPU: say it before."""
    known = getattr(input_embedding(model), "num_embeddings", None)
    largest = max((int(ids.max()) for ids in sequences if len(ids)), default=0)
    if isinstance(known, int) and largest >= known:
        raise ValueError(
            f"the tokenizer made token id {largest}, but the model embeds {known} tokens (ids below "
            f"{known}): use the tokenizer that belongs to the model."
        )
