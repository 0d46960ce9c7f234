"""What each quantized module does to the outputs: its own, and the model's when it alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant_hf.calibration.blocks import evaluating
from mono_quant_hf.core import sqnr
from mono_quant_hf.core.metrics import decibels
from mono_quant_hf.evaluation.divergence import kl_divergence
from mono_quant_hf.evaluation.scoring import run_on
from mono_quant_hf.modules import QuantizedModule


def batches_of(inputs: Mapping[str, Any] | Tensor | Iterable[Mapping[str, Any] | Tensor]) -> list[Any]:
    """One batch or several as a list.

    Raises:
        ValueError: there is none.
    """
    batches = [inputs] if isinstance(inputs, (Mapping, Tensor)) else list(inputs)
    if not batches:
        raise ValueError("inputs is empty: give at least one batch.")
    return batches


def answer_of(output: Any) -> tuple[Tensor, bool]:
    """What counts of an output as `[rows, values]`, and whether it is logits."""
    if isinstance(output, Tensor):
        return output.reshape(-1, output.shape[-1]), False
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        # classes are the last dimension, but the second of pictures (segmentation)
        return (
            logits.flatten(2).mT.flatten(0, 1) if logits.dim() == 4 else logits.reshape(-1, logits.shape[-1])
        ), True
    values = output.values() if isinstance(output, Mapping) else output
    tensor = next(value for value in values if isinstance(value, Tensor))
    return tensor.reshape(-1, tensor.shape[-1]), False


def decibels_of(signal: Tensor, noise: Tensor) -> Tensor:
    """10 log10(signal / noise), infinite where there is no noise, also of no signal."""
    return torch.where(noise > 0, 10 * torch.log10(signal / noise), math.inf)


def output_sqnr(
    reference: nn.Module, found: Mapping[str, QuantizedModule], batches: list[Any]
) -> dict[str, float]:
    """Of each quantized module on what its float twin is fed; both run side by side in a pass of the float model."""
    signal, noise = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
    handles = []
    try:
        for name, module in found.items():

            def compare(
                _: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Any,
                name: str = name,
                module: QuantizedModule = module,
            ) -> None:
                exact, got = _first(output), _first(module(*args, **kwargs))
                signal[name] += float(exact.double().square().sum())
                noise[name] += float((exact.double() - got.double()).square().sum())

            handles.append(reference.get_submodule(name).register_forward_hook(compare, with_kwargs=True))
        with evaluating(reference):
            for batch in batches:
                run_on(reference, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: decibels(signal[name], noise[name]) for name in found if signal[name] or noise[name]}


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(v for v in output if isinstance(v, Tensor))


class OutputChange:
    """How far the model's output is, with some modules in the place of its own, from its output as it is.

    Attributes:
        is_logits: whether the output is; then the change is a KL divergence.
        of: what the change is, in words.
    """

    def __init__(self, model: nn.Module, batches: list[Any]):
        self.model, self.batches = model, batches
        with evaluating(model):
            answers = [answer_of(run_on(model, batch)) for batch in batches]
        self.expected = [answer for answer, _ in answers]
        self.is_logits = all(is_logits for _, is_logits in answers)
        self.of = "relative error of the output"
        if self.is_logits:
            self.of = "mean KL divergence per prediction, in nats"

    def __call__(self, modules: Mapping[str, nn.Module]) -> float:
        """With `{name: module}` in place of the model's own."""
        with evaluating(self.model), swapped(self.model, modules):
            got = [answer_of(run_on(self.model, batch))[0] for batch in self.batches]
        pairs = list(zip(self.expected, got, strict=True))
        if self.is_logits:
            return float(torch.cat([kl_divergence(a, b) for a, b in pairs]).mean())
        exact, found = (torch.cat([t.double().flatten() for t in side]) for side in zip(*pairs, strict=True))
        return 10 ** (-sqnr(exact, found) / 20)


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with these modules in the place of its own, which come back afterwards."""
    undo: list[tuple[nn.Module, str, nn.Module | None]] = []
    try:
        for name, module in modules.items():
            if name == "":
                raise ValueError(
                    "a model that is a single layer has no module to swap: wrap it in another one."
                )
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            undo.append((parent, child, parent._modules[child]))
            parent._modules[child] = module
        yield
    finally:
        for parent, child, old in reversed(undo):
            parent._modules[child] = old
