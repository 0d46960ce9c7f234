"""A text, cut into the windows that a language model reads and the places where it is scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from mono_quant_hf.calibration.samples import max_positions
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


Task = Literal["causal", "masked"]

# Attention memory grows with the window and the gain in context flattens, so a window of the model's full
# length (128k tokens and more today) would be a poor default.
DEFAULT_WINDOW = 1024


class WindowOptions(TypedDict, total=False):
    """The keyword arguments of `perplexity` that say how the text is cut and fed."""

    window: int | None
    stride: int | None
    batch_size: int
    column: str
    separator: str | None
    max_tokens: int | None


class MaskedOptions(WindowOptions, total=False):
    """Those of `divergence` and `record_reference`, which read masked models too."""

    mask_probability: float
    seed: int


@dataclass(frozen=True)
class Windows:
    """How a text is cut and fed, see `perplexity`."""

    window: int | None = None
    stride: int | None = None
    batch_size: int = 1
    column: str = "text"
    separator: str | None = "\n\n"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, but it must be at least 1.")


@dataclass(frozen=True)
class MaskedWindows(Windows):
    """The same for models that may be masked ones, see `record_reference`."""

    mask_probability: float = 0.15
    seed: int = 0


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


def plan(model: nn.Module, tokenizer: Any, source: Any, windows: Windows) -> Plan:
    """Tokenize `source` and cut it for `model`; every argument is checked here, before anything runs."""
    task = task_of(model)
    if task == "masked" and windows.stride is not None:
        raise ValueError("stride is for causal language models: the windows of a masked one do not overlap.")
    window = _choose_window(model, tokenizer, windows.window)
    stride = max(1, window // 2) if windows.stride is None else windows.stride
    check_window(window, stride)
    sequences = token_sequences(
        tokenizer,
        source,
        column=windows.column,
        separator=windows.separator,
        max_tokens=windows.max_tokens,
        add_special_tokens=task == "causal",
    )
    _check_vocabulary(model, sequences)
    settings: dict[str, Any] = {
        "task": task,
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "dtype": str(getattr(model, "dtype", "unknown")).removeprefix("torch."),
        "window": window,
        "batch_size": windows.batch_size,
        "max_tokens": windows.max_tokens,
        "separator": windows.separator,
    }
    if isinstance(windows, MaskedWindows) and task == "masked":
        settings |= {"mask_probability": windows.mask_probability, "seed": windows.seed}
        passages = list(_masked_passages(sequences, window, tokenizer, windows))
    else:
        settings["stride"] = stride
        passages = list(_causal_passages(sequences, window, stride))
    tokens = sum(len(sequence) for sequence in sequences)
    if not passages:
        raise ValueError(
            f"the text makes {tokens} token(s) in {len(sequences)} sequence(s), and at least 2 in a row are "
            "needed: the first token is never scored."
        )
    return Plan(passages=passages, tokens=tokens, settings=settings)


def _causal_passages(sequences: Iterable[Tensor], window: int, stride: int) -> Iterator[Passage]:
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


def _masked_passages(
    sequences: Iterable[Tensor], window: int, tokenizer: Any, masking: MaskedWindows
) -> Iterator[Passage]:
    """Pieces of each sequence between the tokenizer's special tokens, a share of the tokens masked.

    The places are drawn without replacement from a generator seeded with `seed`, `mask_probability` of each
    piece and at least one; all of them become the mask token (Devlin et al. 2019, section 3.1, with the
    80/10/10 replacement of training left out).
    """
    share = masking.mask_probability
    if not 0 < share <= 1:
        raise ValueError(f"mask_probability is {share}, but it must be above 0 and at most 1.")
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise ValueError("the tokenizer has no mask token, which a masked language model is scored with.")
    before, after = special_frame(tokenizer)
    room = window - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"window is {window}, which leaves no room beside the special tokens: give a larger one."
        )
    generator = torch.Generator().manual_seed(masking.seed)
    for original in (piece for tokens in sequences if len(tokens) for piece in tokens.split(room)):
        count = max(1, round(share * len(original)))
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
