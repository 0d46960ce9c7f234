"""Run a model over passages, and turn logits into numbers, in bounded memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mono_quant_hf.evaluation.windows import Passage, input_embedding

# Logits widened to float32 or float64 at a time: 32 MB in float64, whatever batch, window and vocabulary are.
_CHUNK_ELEMENTS = 2**22


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its inputs, also when accelerate has spread or offloaded it."""
    embedding = input_embedding(model)
    for module in (embedding, model):
        execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            return torch.device(execution)
    for module in (embedding, model):
        for parameter in module.parameters() if isinstance(module, nn.Module) else ():
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cpu")


def run_on(model: nn.Module, batch: Any) -> Any:
    """The model's output for a tensor, or a mapping of names to tensors."""
    device = input_device(model)
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"the model returned {type(output).__name__} without logits: load it with its task's class, such as "
        "AutoModelForCausalLM."
    )


def score(model: nn.Module, passages: Iterable[Passage], batch_size: int) -> Iterator[tuple[Passage, Tensor]]:
    """Feed `passages` in batches; yield each with its logits [scored, vocabulary] in the model's dtype.

    Shorter passages of a batch are padded on the right and masked, which no token to their left can see in a
    causal model.  Only the logits from the first scored position on are asked for, where the model can tell
    (`logits_to_keep`).
    """
    parameters = inspect.signature(model.forward).parameters
    device = input_device(model)
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    remaining = iter(passages)
    while batch := list(islice(remaining, batch_size)):
        rows = [passage.input_ids for passage in batch]
        input_ids = pad_sequence(
            rows, batch_first=True, padding_value=pad if isinstance(pad, int) and pad >= 0 else 0
        )
        length = input_ids.shape[1]
        skipped = min(int(passage.positions[0]) for passage in batch)
        arguments: dict[str, Any] = {
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(
                device
            ),
            "use_cache": False,
        }
        if skipped:
            arguments["logits_to_keep"] = length - skipped
        known = {name: value for name, value in arguments.items() if name in parameters}
        logits = logits_of(model(input_ids=input_ids.to(device), **known))
        if (
            logits.dim() != 3
            or logits.shape[0] != len(batch)
            or logits.shape[1] not in (length, length - skipped)
        ):
            raise TypeError(
                f"the model's logits have the shape {list(logits.shape)}, but a language model's are [batch, "
                f"length, vocabulary], here [{len(batch)}, {length}, ...]."
            )
        offset = length - logits.shape[1]
        for row, passage in enumerate(batch):
            yield passage, logits[row, (passage.positions - offset).to(logits.device)]


def row_chunks(logits: Tensor) -> Sequence[slice]:
    """Slices of the rows of [rows, vocabulary] logits, each of at most `_CHUNK_ELEMENTS` elements."""
    rows = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    return [slice(begin, begin + rows) for begin in range(0, len(logits), rows)]


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln softmax(logits)[target] of each row, the softmax in float32 whatever the dtype of the logits.

    Args:
        logits: float [rows, vocabulary], any device.
        targets: int64 [rows].

    Returns:
        float64 [rows] on the CPU.
    """
    targets = targets.to(logits.device)
    parts = [
        F.cross_entropy(logits[s].float(), targets[s], reduction="none").cpu() for s in row_chunks(logits)
    ]
    return torch.cat(parts).double()
