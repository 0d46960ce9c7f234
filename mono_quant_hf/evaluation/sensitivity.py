"""What each quantized module does to the outputs: its own, and the model's when it alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.calibration.blocks import evaluating
from mono_quant_hf.core import sqnr
from mono_quant_hf.evaluation.divergence import kl_divergence
from mono_quant_hf.evaluation.scoring import input_device
from mono_quant_hf.modules import QuantizedModule


def run_on(model: nn.Module, batch: Any) -> Any:
    """The model's output for a tensor, or a mapping of names to tensors."""
    device = input_device(model)
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})


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
    measured = {}
    for name in found:
        if signal[name] or noise[name]:
            measured[name] = float(decibels_of(torch.tensor(signal[name]), torch.tensor(noise[name])))
    return measured


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(v for v in output if isinstance(v, Tensor))


def contributions(
    reference: nn.Module, found: Mapping[str, QuantizedModule], batches: list[Any], progress: bool
) -> tuple[str, float, dict[str, float]]:
    """The error of the output with all modules quantized, and with each alone."""
    with evaluating(reference):
        expected = [answer_of(run_on(reference, batch)) for batch in batches]
        is_logits = expected[0][1]

        def error() -> float:
            parts = [
                (e, answer_of(run_on(reference, b))[0]) for (e, _), b in zip(expected, batches, strict=True)
            ]
            if is_logits:
                return float(torch.cat([kl_divergence(e, got) for e, got in parts]).mean())
            exact = torch.cat([e.double().flatten() for e, _ in parts])
            got = torch.cat([g.double().flatten() for _, g in parts])
            return 10 ** (-sqnr(exact, got) / 20)

        with swapped(reference, found):
            total = error()
        alone = {}
        for name, module in tqdm(found.items(), desc="contributions", unit="module", disable=not progress):
            with swapped(reference, {name: module}):
                alone[name] = error()
    what = "mean KL divergence per prediction, in nats" if is_logits else "relative error of the output"
    return what, total, alone


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
