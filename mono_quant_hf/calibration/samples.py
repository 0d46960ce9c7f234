"""What to calibrate on: texts, inputs as they are, or text that the model itself writes."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.texts import texts, token_sequences

from .blocks import Inputs, evaluating
from .resume import TEXT, check_resume_folder, fingerprint_of, load_kept, save_kept

SELF = "self"
_POSITION_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)


@dataclass(frozen=True)
class Sampling:
    """How many samples are taken, and how long they are.

    Attributes:
        samples: rows of text (paragraphs for an encoder), taken evenly over all of it; batches of inputs are all used.
        length: tokens in a row, at most for an encoder; no more than the model has positions for.
        batch_size: rows fed at once.
        column: of a dataset, the one that holds the text.
        seed: of the text that the model writes itself.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1)
        >>> sampling = Sampling(samples=4, length=16, batch_size=2)
        >>> batches = calibration_batches(LlamaForCausalLM(config), "self", sampling=sampling)
        >>> [list(batch["input_ids"].shape) for batch in batches]
        [[2, 16], [2, 16]]
    """

    samples: int = 128
    length: int = 512
    batch_size: int = 8
    column: str = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but it must be a whole number from 1.")


def calibration_batches(
    model: nn.Module,
    source: Any,
    tokenizer: Any = None,
    sampling: Sampling | None = None,
    progress: bool = False,
    resume_folder: str | os.PathLike[str] | None = None,
) -> list[Inputs]:
    """Batches of inputs for the model.

    Args:
        model: the float model.
        source: `"self"`, for a causal language model to write its own text; texts (a list of str, a
            `pathlib.Path`, a `datasets.Dataset`), of which a str alone is not one, so that a misspelt `"self"` is
            noticed; or inputs as the model takes them: tensors, or mappings of names to tensors, one per batch.
        tokenizer: of the model; for texts.
        sampling: how many and how long; `Sampling()` if None.
        progress: show a progress bar while the model writes.
        resume_folder: what the model writes is kept here, and read again for the same model and sampling.

    Raises:
        TypeError, ValueError: nothing in it, no tokenizer, too little text, or a model that cannot write.

    Example:
        >>> import torch
        >>> calibration_batches(torch.nn.Linear(2, 2), [torch.zeros(3, 2)])
        [{'': tensor([[0., 0.],
                [0., 0.],
                [0., 0.]])}]
    """
    sampling = sampling or Sampling()
    if isinstance(source, str):
        if source != SELF:
            raise ValueError(
                f"calibration={source[:40]!r} is not known: give 'self', 'data-free', a list of texts, a Dataset or "
                "batches of inputs."
            )
        return _rows(list(_own_text(model, sampling, progress, resume_folder)), sampling, model)
    if isinstance(source, (Tensor, Mapping)) and not hasattr(source, "column_names"):
        source = [source]
    if isinstance(source, Sequence) and len(source) == 0:
        raise ValueError("calibration is empty: give at least one text or batch.")
    if not reads_text(source):
        return [_as_inputs(batch) for batch in source]
    if tokenizer is None:
        raise TypeError("texts to calibrate on need the model's tokenizer: give tokenizer=.")
    return _rows(_cut(model, source, tokenizer, sampling), sampling, model)


def reads_text(source: Any) -> bool:
    """Whether what to calibrate on is text, for which the model's tokenizer is needed.

    Example:
        >>> reads_text(["a text"]), reads_text("self"), reads_text([torch.zeros(3, 2)])
        (True, False, False)
    """
    if isinstance(source, str) or (
        isinstance(source, (Tensor, Mapping)) and not hasattr(source, "column_names")
    ):
        return False
    return not (isinstance(source, Sequence) and len(source) > 0 and _is_batch(source[0]))


def _own_text(
    model: nn.Module, sampling: Sampling, progress: bool, folder: str | os.PathLike[str] | None
) -> Tensor:
    """`write_text`, whose rows are kept in a folder: to write them can take as long as to calibrate on them."""
    if folder is None:
        return write_text(model, sampling, progress=progress)
    check_resume_folder(folder)
    file, fingerprint = Path(folder) / TEXT, fingerprint_of(model, astuple(sampling))
    expected = {"input_ids": (torch.long, (sampling.samples, _length(model, sampling)))}
    kept = load_kept(file, fingerprint, expected)
    if kept is None:
        kept = {"input_ids": write_text(model, sampling, progress=progress)}
        save_kept(file, fingerprint, kept)
    return kept["input_ids"]


def write_text(model: nn.Module, sampling: Sampling, progress: bool = False) -> Tensor:
    """Text that a causal language model writes: each token drawn from its own distribution, temperature 1.

    Every row starts with the model's first token (`bos_token_id`), and goes on after an end of text as its training
    data did, with another one.

    Args:
        model: causal, with a cache of keys and values.
        sampling: `samples` rows of `length` tokens, the same for the same seed and model.
        progress: show a progress bar.

    Returns:
        int64 `[samples, length]` on the CPU.

    Raises:
        TypeError: the model is no causal language model.
        ValueError: it has no first token.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1)
        >>> text = write_text(LlamaForCausalLM(config), Sampling(samples=2, length=5))
        >>> text.shape, bool((text[:, 0] == config.bos_token_id).all())
        (torch.Size([2, 5]), True)
    """
    first = _first_token(model)
    length = _length(model, sampling)
    device = next(p.device for p in model.parameters())
    generator = torch.Generator().manual_seed(sampling.seed)
    cache_name = cache_argument(model)
    rows = []
    with (
        evaluating(model),
        tqdm(total=sampling.samples * length, desc="Writing", unit="token", disable=not progress) as bar,
    ):
        for begin in range(0, sampling.samples, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, sampling.samples - begin)
            tokens = torch.full((count, 1), first, dtype=torch.long)
            written, cache = [tokens], None
            bar.update(count)
            for _ in range(length - 1):
                output = model(input_ids=tokens.to(device), use_cache=True, **{cache_name: cache})
                cache = getattr(output, cache_name)
                tokens = _draw(output.logits[:, -1].float().softmax(-1).cpu(), generator)
                written.append(tokens)
                bar.update(count)
            rows.append(torch.cat(written, dim=1))
    return torch.cat(rows)


def _first_token(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    can_write = getattr(model, "can_generate", None)
    if config is None or can_write is None or not can_write() or getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"calibration='self' is for causal language models, which {type(model).__name__} is not: give texts or "
            "batches of inputs."
        )
    config = config.get_text_config()
    first = next((t for t in (config.bos_token_id, config.eos_token_id) if t is not None), None)
    first = first[0] if isinstance(first, (list, tuple)) and first else first
    if not isinstance(first, int):
        raise ValueError(
            f"{type(model).__name__} has no bos_token_id to start a text with: give texts instead."
        )
    return first


def cache_argument(model: nn.Module) -> str:
    """Name of the argument and the output for the keys and values of earlier tokens: transformers 5.24 renamed them."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _draw(likely: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row `[rows, vocabulary]` of probabilities, `[rows, 1]`, with one random number for each.

    By the inverse of the cumulative distribution: `torch.multinomial` draws a random number for every token of the
    vocabulary, which took a fifth of the time. On the CPU, whose numbers are the same whatever the model runs on.
    """
    cumulative = likely.double().cumsum(-1)
    chance = torch.rand(len(likely), 1, generator=generator, dtype=torch.float64)
    # right=True: the first token whose sum is above, so that one of probability 0 is never drawn
    drawn = torch.searchsorted(cumulative, chance * cumulative[:, -1:], right=True)
    return drawn.clamp_(max=likely.shape[-1] - 1)


# Rows that are written side by side: more are hardly faster, and hold more keys and values.
_ROWS_AT_ONCE = 64


def _cut(model: nn.Module, source: Any, tokenizer: Any, sampling: Sampling) -> list[Tensor]:
    """Rows of tokens, as many as wanted, evenly over the text.

    A causal model reads pieces of the whole text, all of one length. An encoder reads paragraphs between its special
    tokens, as it does when it is used: how much of what its layers see is special tokens depends on the length.
    """
    length = _length(model, sampling)
    if getattr(tokenizer, "mask_token", None):
        paragraphs = [
            " ".join(part.split())
            for text in texts(source, sampling.column)
            for part in _BLANK_LINES.split(text)
        ]
        chosen = _evenly([part for part in paragraphs if part], sampling.samples)
        encoded = (tokenizer(part, truncation=True, max_length=length)["input_ids"] for part in chosen)
        rows = [torch.as_tensor(ids, dtype=torch.long) for ids in encoded]
    else:
        (tokens,) = token_sequences(tokenizer, source, column=sampling.column)
        whole = tokens[: max(1, len(tokens) // length) * length]
        rows = _evenly(list(whole.split(length)), sampling.samples)
    if not rows:
        raise ValueError("there is no text to calibrate on: what was given is empty.")
    return rows


_BLANK_LINES = re.compile(r"\n\s*\n")


def _evenly(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, from the first to the last."""
    if len(items) <= count:
        return items
    return [items[int(n)] for n in torch.linspace(0, len(items) - 1, count).round()]


def max_positions(model: nn.Module) -> int | None:
    """The longest input the model has positions for, or None where its config sets no limit.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> max_positions(BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)))
        512
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = (getattr(config, name, None) for name in _POSITION_FIELDS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _length(model: nn.Module, sampling: Sampling) -> int:
    return min(sampling.length, max_positions(model) or sampling.length)


def _rows(rows: Sequence[Tensor], sampling: Sampling, model: nn.Module) -> list[Inputs]:
    """Batches of rows of one length: padding would count among the inputs of the layers."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    extra = {"use_cache": False} if getattr(model, "can_generate", lambda: False)() else {}
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [
        {"input_ids": part.to(device), **extra}
        for _, same in sorted(by_length.items(), reverse=True)
        for part in torch.stack(same).split(sampling.batch_size)
    ]


def _is_batch(item: Any) -> bool:
    return isinstance(item, Tensor) or (
        isinstance(item, Mapping) and any(isinstance(value, Tensor) for value in item.values())
    )


def _as_inputs(batch: Any) -> Inputs:
    if isinstance(batch, Tensor):
        return {"": batch}
    return {name: value for name, value in batch.items() if name not in ("label", "labels")}
