"""Sharing the passages of an evaluation between processes that each hold the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def share(items: Sequence[T]) -> list[T]:
    """The part of `items` that this process is to work on: every n-th of n processes.

    Raises:
        ValueError: torch.distributed was not initialized.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "split_between_processes needs torch.distributed: start the program with torchrun and make an "
            "accelerate.PartialState() first."
        )
    return list(items[dist.get_rank() :: dist.get_world_size()])


def gather(parts: list[Tensor]) -> list[Tensor]:
    """The results of all processes for what `share` gave them, in the order of the items; the same in each process."""
    everyones: list[list[Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, [part.cpu() for part in parts])
    return [
        part
        for turn in range(max(len(theirs or ()) for theirs in everyones))
        for theirs in everyones
        if theirs is not None
        for part in theirs[turn : turn + 1]
    ]
