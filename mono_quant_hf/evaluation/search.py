"""Which modules should be int8, float16 or float: the smallest model for a KL divergence, or the reverse."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.calibration.blocks import evaluating
from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.core.quantizers import FLOAT16_MAX
from mono_quant_hf.evaluation.divergence import kl_divergence
from mono_quant_hf.evaluation.results import Result
from mono_quant_hf.evaluation.sensitivity import answer_of, run_on, swapped
from mono_quant_hf.integration.selection import decide
from mono_quant_hf.modules import quantized_class_for

INT8, FLOAT16, FLOAT = "int8", "float16", "float"


@dataclass(frozen=True)
class Point:
    """One model on the frontier.

    Attributes:
        bytes: of all its parameters.
        predicted_kl: from the contributions of its modules, in nats.
        measured_kl: mean KL divergence from the float model, in nats; None where it was not measured.
        changed: the module that is kept more exactly than at the point before, and how; empty for the first.
        float16, float: how many modules are in these.
    """

    bytes: int
    predicted_kl: float
    measured_kl: float | None
    changed: str
    float16: int
    float: int


@dataclass(frozen=True)
class SearchResult(Result):
    """What the search found.

    Attributes:
        module_overrides: for `MonoQuantConfig(module_overrides=...)`: the modules that are not int8.
        bytes: of all parameters of the model with these overrides.
        kl: its mean KL divergence from the float model, measured, in nats.
        float_bytes: of the float model.
        met: whether the budget is met; where it cannot be, the nearest model is given.
        frontier: from all modules in int8 to all in float, the best step first.
        chosen: its index in the frontier.
    """

    module_overrides: dict[str, dict[str, Any]]
    bytes: int
    kl: float
    float_bytes: int
    met: bool
    frontier: tuple[Point, ...]
    chosen: int
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"frontier": [vars(point) for point in self.frontier]}

    def table(self, rows: int = 20) -> str:
        """The frontier as aligned text, thinned to about `rows` lines; `>` marks the chosen one."""
        step = max(1, math.ceil(len(self.frontier) / rows))
        shown = [
            n
            for n, point in enumerate(self.frontier)
            if n % step == 0 or n in (self.chosen, len(self.frontier) - 1) or point.measured_kl is not None
        ]
        titles = ["", "MB", "KL predicted", "KL measured", "float16", "float", "last change"]
        lines = [titles]
        for n in shown:
            point = self.frontier[n]
            measured = "" if point.measured_kl is None else f"{point.measured_kl:.3g}"
            lines.append(
                [
                    ">" if n == self.chosen else "",
                    f"{point.bytes / 1e6:,.2f}",
                    f"{point.predicted_kl:.3g}",
                    measured,
                    str(point.float16),
                    str(point.float),
                    point.changed,
                ]
            )
        widths = [max(len(line[n]) for line in lines) for n in range(len(titles))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if n in (0, 6) else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Draw the frontier, size against KL divergence.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from mono_quant_hf.evaluation.plots import draw_frontier

        draw_frontier(self, Path(path))


def search_overrides(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor | Iterable[Mapping[str, Any] | Tensor],
    *,
    max_bytes: int | None = None,
    max_kl: float | None = None,
    config: MonoQuantConfig | None = None,
    progress: bool = False,
) -> SearchResult:
    """Choose for each module among int8, float16 and float, by what each costs at the model's output.

    Each module's KL divergence is measured with it alone in int8, and in float16. That they add up is an
    approximation, so the sum is scaled to what all in int8 together give. From all in int8, the module is kept more
    exactly that saves most KL for a byte, again and again (Everett 1963, generalized Lagrange multipliers); that
    gives the frontier. The model chosen on it is measured as a whole: for `max_kl` the smallest that holds, found
    by bisection, for `max_bytes` the largest that fits.

    Args:
        model: float, with logits; unchanged afterwards.
        inputs: batches, as for `quantization_report`.
        max_bytes: budget for all parameters of the model.
        max_kl: budget for the mean KL divergence from the float model, in nats. One of the two must be given.
        config: for int8: symmetric or not, and modules that stay in float. Its overrides are part of the search no
            more.
        progress: show a progress bar.

    Raises:
        ValueError: both budgets or none, or a budget that is not positive.
        TypeError: the model gives no logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> result = search_overrides(model, {"input_ids": torch.arange(8)[None]}, max_bytes=14_000)
        >>> result.met, result.bytes <= 14_000
        (True, True)
    """
    if (max_bytes is None) == (max_kl is None):
        raise ValueError("give one budget, max_bytes or max_kl.")
    if (max_bytes if max_kl is None else max_kl) <= 0:  # type: ignore[operator]
        raise ValueError("the budget must be above 0.")
    batches = [inputs] if isinstance(inputs, (Mapping, Tensor)) else list(inputs)
    if not batches:
        raise ValueError("inputs is empty: give at least one batch.")
    forms = _forms(model, config or MonoQuantConfig())
    if not forms:
        raise TypeError(f"{type(model).__name__} has no modules that can be quantized.")
    measure = _Measure(model, batches)
    float_bytes = sum(p.nbytes for p in model.parameters())
    sizes = {name: {form: _bytes(module) for form, module in made.items()} for name, made in forms.items()}
    costs: dict[str, dict[str, float]] = {}
    with tqdm(total=2 * len(forms), desc="Contributions", unit="pass", disable=not progress) as bar:
        for name, made in forms.items():
            costs[name] = {FLOAT: 0.0}
            for form, module in made.items():
                if form != FLOAT:
                    costs[name][form] = measure({name: module})
                bar.update(form != FLOAT)

    steps = _steps(sizes, costs)
    together = measure({name: made[INT8] for name, made in forms.items()})
    apart = sum(cost[INT8] for cost in costs.values())
    scale = together / apart if apart > 0 else 1.0

    states = [dict.fromkeys(forms, INT8)]
    for name, form in steps:
        states.append(states[-1] | {name: form})
    totals = [float_bytes + sum(sizes[n][f] - sizes[n][FLOAT] for n, f in state.items()) for state in states]
    measured: dict[int, float] = {0: together}

    def kl(index: int) -> float:
        if index not in measured:
            modules = {n: forms[n][f] for n, f in states[index].items() if f != FLOAT}
            measured[index] = measure(modules) if modules else 0.0
        return measured[index]

    chosen, met = _choose(totals, kl, max_bytes, max_kl)
    points = tuple(
        Point(
            bytes=total,
            predicted_kl=scale * sum(costs[n][f] for n, f in state.items()),
            measured_kl=measured.get(index),
            changed="" if index == 0 else " → ".join(steps[index - 1]),
            float16=sum(form == FLOAT16 for form in state.values()),
            float=sum(form == FLOAT for form in state.values()),
        )
        for index, (state, total) in enumerate(zip(states, totals, strict=True))
    )
    return SearchResult(
        module_overrides={n: {"weights": form} for n, form in states[chosen].items() if form != INT8},
        bytes=totals[chosen],
        kl=measured[chosen],
        float_bytes=float_bytes,
        met=met,
        frontier=points,
        chosen=chosen,
        settings={"max_bytes": max_bytes, "max_kl": max_kl, "batches": len(batches)},
    )


def _choose(
    totals: list[int], kl: Callable[[int], float], max_bytes: int | None, max_kl: float | None
) -> tuple[int, bool]:
    """Index of the state to take, and whether it meets the budget."""
    if max_bytes is not None:
        fitting = [n for n, total in enumerate(totals) if total <= max_bytes]
        chosen = fitting[-1] if fitting else 0
        kl(chosen)
        return chosen, bool(fitting)
    assert max_kl is not None
    low, high = 0, len(totals) - 1
    if kl(low) <= max_kl:
        return low, True
    while high - low > 1:  # low does not hold; high does, or is the float model, which is exact
        middle = (low + high) // 2
        low, high = (low, middle) if kl(middle) <= max_kl else (middle, high)
    return high, kl(high) <= max_kl


def _forms(model: nn.Module, config: MonoQuantConfig) -> dict[str, dict[str, nn.Module]]:
    """`{module name: {form: module}}` of what can be int8; float16 only where it is smaller than the float module."""
    base = MonoQuantConfig(
        symmetric=config.symmetric,
        modules_to_not_convert=config.modules_to_not_convert,
    )
    forms: dict[str, dict[str, nn.Module]] = {}
    for decision in decide(model, base):
        if not decision.quantized or decision.module == "":
            continue
        module = model.get_submodule(decision.module)
        quantized_class = quantized_class_for(module)
        assert quantized_class is not None
        made: dict[str, nn.Module] = {FLOAT: module}
        made[INT8] = quantized_class.from_float(module, INT8, bool(decision.symmetric), decision.module)
        weights = [module.get_parameter(name) for name in quantized_class.weight_axes]
        if all(w.dtype.itemsize > 2 and float(w.detach().abs().max()) <= FLOAT16_MAX for w in weights):
            made[FLOAT16] = quantized_class.from_float(module, FLOAT16, False, decision.module)
        forms[decision.module] = made
    return forms


def _bytes(module: nn.Module) -> int:
    """Of the weights with their scales, and of the bias."""
    return sum(p.nbytes for p in module._parameters.values() if p is not None)


def _steps(
    sizes: Mapping[str, Mapping[str, int]], costs: Mapping[str, Mapping[str, float]]
) -> list[tuple[str, str]]:
    """Upgrades `(module, form)` from int8 to float, those that save most KL for a byte first."""
    steps = []
    for name, size in sizes.items():
        forms = sorted(size, key=lambda form: size[form])
        # the lower convex hull of (bytes, KL): a form above the line between its neighbours is never the best
        hull = [forms[0]]
        for form in forms[1:]:
            while len(hull) > 1 and _rate(name, hull[-2], hull[-1], sizes, costs) <= _rate(
                name, hull[-2], form, sizes, costs
            ):
                hull.pop()
            hull.append(form)
        for before, after in itertools.pairwise(hull):
            steps.append((_rate(name, before, after, sizes, costs), name, after))
    steps.sort(key=lambda step: -step[0])
    return [(name, form) for _, name, form in steps]


def _rate(
    name: str,
    before: str,
    after: str,
    sizes: Mapping[str, Mapping[str, int]],
    costs: Mapping[str, Mapping[str, float]],
) -> float:
    """KL saved for a byte."""
    return (costs[name][before] - costs[name][after]) / max(1, sizes[name][after] - sizes[name][before])


class _Measure:
    """KL divergence of the model with some modules swapped, from the model as it is."""

    def __init__(self, model: nn.Module, batches: list[Any]):
        self.model, self.batches = model, batches
        with evaluating(model):
            answers = [answer_of(run_on(model, batch)) for batch in batches]
        if not all(is_logits for _, is_logits in answers):
            raise TypeError(
                f"{type(model).__name__} gives no logits, by whose KL divergence modules are chosen."
            )
        self.expected = [logits for logits, _ in answers]

    def __call__(self, modules: Mapping[str, nn.Module]) -> float:
        with evaluating(self.model), swapped(self.model, modules):
            parts = [
                kl_divergence(expected, answer_of(run_on(self.model, batch))[0])
                for expected, batch in zip(self.expected, self.batches, strict=True)
            ]
        return float(torch.cat(parts).mean())
