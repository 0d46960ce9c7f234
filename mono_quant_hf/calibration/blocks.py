"""Running a model piece by piece: the blocks before the one at work answer from what they gave last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]


class _Stop(Exception):
    """Ends a forward pass where all that it was for has been seen."""


class _Recall(nn.Module):
    """Stands for a block that is done: answers with what the last of its row gave; attributes are the block's."""

    def __init__(self, block: nn.Module):
        super().__init__()
        object.__setattr__(self, "block", block)  # no child: its parameters shall not be moved or listed
        self.value: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


@dataclass
class Stage:
    """Modules that are rounded before the pass goes on.

    Attributes:
        block: what is run for them, or None for modules outside of all blocks.
        groups: names of modules, in the order of their calls; those of a group are fed the same tensor.
    """

    block: str | None
    groups: list[list[str]] = field(default_factory=list)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in before.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with evaluating(model):
        ...     model[1].training, torch.is_grad_enabled()
        (False, False)
        >>> model[1].training
        True
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # no_grad and not inference_mode: a tensor that the model caches must stay usable for training
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output; an input called "" is handed over by position."""
    inputs = dict(inputs)
    positional = [inputs.pop("")] if "" in inputs else []
    return model(*positional, **inputs)


@contextmanager
def watching(
    model: nn.Module,
    names: Iterable[str],
    fed: Callable[[str, Tensor], None] | None = None,
    gives: Callable[[str, Any], None] | None = None,
) -> Iterator[None]:
    """Call `fed(name, x)` with the first tensor that each module is fed, `gives(name, output)` with what it gives.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with watching(model, ["1"], fed=lambda name, x: print(name, list(x.shape))):
        ...     _ = model(torch.ones(4, 2))
        1 [4, 3]
    """

    def before(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        assert fed is not None
        fed(name, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def after(name: str, _: nn.Module, args: Any, output: Any) -> None:
        assert gives is not None
        gives(name, output)

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            if fed is not None:
                hook = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                stack.callback(hook.remove)
            if gives is not None:
                stack.callback(module.register_forward_hook(partial(after, name)).remove)
        yield


def inputs_of(model: nn.Module, inputs: Inputs, name: str, all_calls: bool) -> list[Tensor]:
    """What module `name` is fed in a forward pass, which ends there unless `all_calls` are wanted."""
    seen: list[Tensor] = []

    def look(_: str, x: Tensor) -> None:
        seen.append(x)
        if not all_calls:
            raise _Stop

    with watching(model, [name], fed=look), suppress(_Stop):
        run(model, inputs)
    return seen


def block_pass(
    model: nn.Module, inputs: Inputs, block: str, names: Iterable[str] = ()
) -> tuple[Any, dict[str, list[Tensor]]]:
    """What `block` gives in a forward pass, which ends there, and what each of `names` is fed on the way."""
    given: list[Any] = []
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def look(name: str, x: Tensor) -> None:
        seen[name].append(x.clone())  # the model may go on to change it in place

    def answer(_: str, output: Any) -> None:
        given.append(output)
        raise _Stop

    with watching(model, seen, fed=look), watching(model, [block], gives=answer), suppress(_Stop):
        run(model, inputs)
    return given[0], seen


class Blocks:
    """The rows of blocks of a model (its `ModuleList`s of layers), which can be put aside one after the other.

    While block k is at work, the blocks before it in its row answer with what block k - 1 gave, so that a pass up to
    block k costs no more than block k itself and what surrounds the rows. Whether that is how the model works, each
    block once, in order, each fed by the one before it alone, is tried on one batch first; where it is not, there
    are no blocks and every pass is one of the whole model.
    """

    def __init__(self, model: nn.Module, names: list[str], inputs: Inputs):
        self.model = model
        self.rows: dict[str, list[str]] = {}
        self._aside: dict[str, _Recall] = {}
        calls, self.order = self._record(names, _rows_of(model, names), inputs)
        self.repeated = {name for name, count in Counter(name for name, _ in calls).items() if count > 1}
        self.stages = self._plan(calls)

    def put_aside(self, block: str) -> None:
        """From now on, `block` and those before it in its row answer with what `recalling` sets."""
        row, _, index = block.rpartition(".")
        recall = _Recall(self.model.get_submodule(block))
        self._aside[block] = recall
        self.model.get_submodule(row)._modules[index] = recall

    def put_back(self) -> None:
        """All blocks are in their places again."""
        for block, recall in self._aside.items():
            row, _, index = block.rpartition(".")
            self.model.get_submodule(row)._modules[index] = recall.block
        self._aside.clear()

    @contextmanager
    def recalling(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Let the blocks that were put aside answer with `values`, by the name of their row."""
        for block, recall in self._aside.items():
            recall.value = values[block.rpartition(".")[0]]
        try:
            yield
        finally:
            for recall in self._aside.values():
                recall.value = None

    def _record(
        self, names: list[str], rows: dict[str, list[str]], inputs: Inputs
    ) -> tuple[list[tuple[str, Tensor]], list[str]]:
        """One pass: the calls of the modules, and the blocks of the rows that can be put aside in their order."""
        calls: list[tuple[str, Tensor]] = []
        outputs: list[tuple[str, Any]] = []
        blocks_of_rows = [block for row in rows.values() for block in row]
        with (
            watching(self.model, names, fed=lambda name, x: calls.append((name, x))),
            watching(self.model, blocks_of_rows, gives=lambda name, output: outputs.append((name, output))),
        ):
            expected = run(self.model, inputs)
        order = [block for block, _ in outputs]
        for row, blocks in rows.items():
            in_order = [block for block in order if block in blocks] == blocks
            if in_order and self._answers_for_row(row, blocks, dict(outputs)[blocks[-1]], inputs, expected):
                self.rows[row] = blocks
            else:
                order = [block for block in order if block not in blocks]
        return calls, order

    def _answers_for_row(
        self, row: str, blocks: list[str], value: Any, inputs: Inputs, expected: Any
    ) -> bool:
        """Whether the model's output is the same where the last block's answer stands for those of its row."""
        for block in blocks:
            self.put_aside(block)
        try:
            with self.recalling({row: value}):
                found = run(self.model, inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False  # the answers of single blocks are used in another way
        finally:
            self.put_back()
        pairs = list(zip(_tensors(expected), _tensors(found), strict=False))
        # mostly the very same numbers: to compare logits within a tolerance takes longer than to compute them
        return bool(pairs) and all(
            torch.equal(a, b)
            or (a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4))
            for a, b in pairs
        )

    def _plan(self, calls: list[tuple[str, Tensor]]) -> list[Stage]:
        stages: list[Stage] = []
        previous: Tensor | None = None
        for name, x in calls:
            if any(name in group for stage in stages for group in stage.groups):
                continue
            block = next((b for b in self.order if name == b or name.startswith(f"{b}.")), None)
            if not stages or stages[-1].block != block:
                while block is not None and (todo := self._blocks_before(block, stages)):
                    stages.append(Stage(todo[0]))
                stages.append(Stage(block))
                previous = None
            groups = stages[-1].groups
            if previous is x and not {name, groups[-1][-1]} & self.repeated:
                groups[-1].append(name)
            else:
                groups.append([name])
            previous = x
        return stages

    def _blocks_before(self, block: str, stages: list[Stage]) -> list[str]:
        """Blocks without modules to round come between: they are run and put aside all the same."""
        done = {stage.block for stage in stages}
        return [b for b in self.order[: self.order.index(block)] if b not in done]


def _rows_of(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """The outermost `ModuleList`s and `Sequential`s with two or more children that hold modules to round."""
    rows: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or name == "":
            continue
        if any(name.startswith(f"{outer}.") for outer in rows):
            continue
        blocks = [f"{name}.{child}" for child in module._modules]
        holding = [b for b in blocks if any(n.startswith(f"{b}.") for n in names)]
        if len(holding) > 1:
            rows[name] = blocks
    return rows


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
