"""Which modules should be int8, float16 or float: the smallest model for a KL divergence, or the reverse."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.core.quantizers import FLOAT16_MAX
from mono_quant_hf.evaluation.plots import draw_frontier, save_png
from mono_quant_hf.evaluation.results import Result, aligned
from mono_quant_hf.evaluation.sensitivity import OutputChange, batches_of
from mono_quant_hf.integration.selection import decide
from mono_quant_hf.integration.tying import input_embeddings_and_heads
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
        module_overrides: for `MonoQuantConfig(module_overrides=...)`: those of the config that was given, and the
            modules that are not int8.
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

    def table(self, rows: int = 20) -> str:
        """The frontier as aligned text, thinned to about `rows` lines; `>` marks the chosen one."""
        step = max(1, math.ceil(len(self.frontier) / rows))
        shown = [
            n
            for n, point in enumerate(self.frontier)
            if n % step == 0 or n in (self.chosen, len(self.frontier) - 1) or point.measured_kl is not None
        ]
        rows_shown = []
        for n in shown:
            point = self.frontier[n]
            rows_shown.append(
                [
                    ">" if n == self.chosen else "",
                    f"{point.bytes / 1e6:,.2f}",
                    f"{point.predicted_kl:.3g}",
                    "" if point.measured_kl is None else f"{point.measured_kl:.3g}",
                    str(point.float16),
                    str(point.float),
                    point.changed,
                ]
            )
        titles = ["", "MB", "KL predicted", "KL measured", "float16", "float", "last change"]
        return aligned(titles, rows_shown, left={0, 6})

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Draw the frontier, size against KL divergence.

        Raises:
            ImportError: matplotlib is not installed.
        """
        predicted = [(point.bytes, point.predicted_kl) for point in self.frontier]
        measured = [(p.bytes, p.measured_kl) for p in self.frontier if p.measured_kl is not None]
        budgets = (self.settings.get("max_bytes"), self.settings.get("max_kl"))
        save_png(path, draw_frontier, predicted, measured, (self.bytes, self.kl), *budgets)


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
        config: how int8 is made, and what is not chosen for: modules that stay in float, those that its overrides
            name, and embeddings. `weights` is not looked at.
        progress: show a progress bar.

    Raises:
        ValueError: both budgets or none, or a budget that is not positive.
        TypeError: the model gives no logits.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> inputs = {"input_ids": torch.arange(8)[None]}
        >>> result = search_overrides(LlamaForCausalLM(config), inputs, max_bytes=14_000)
        >>> result.met and result.bytes <= 14_000
        True
    """
    budgets = [budget for budget in (max_bytes, max_kl) if budget is not None]
    if len(budgets) != 1 or budgets[0] <= 0:
        raise ValueError(f"Expected one budget above 0, got max_bytes={max_bytes} and max_kl={max_kl}.")
    config = config or MonoQuantConfig()
    forms, given = _forms(model, config)
    measure = OutputChange(model, batches_of(inputs))
    if not forms or not measure.is_logits:
        lacks = (
            "logits, by whose KL divergence modules are chosen" if forms else "modules that can be quantized"
        )
        raise TypeError(f"{type(model).__name__} has no {lacks}.")
    found = _Frontier(model, forms, given, measure, progress).result(max_bytes, max_kl)
    return replace(found, module_overrides={**(config.module_overrides or {}), **found.module_overrides})


Forms = Mapping[str, Mapping[str, nn.Module]]
"""`{module name: {form: module}}`"""

Given = Mapping[str, tuple[nn.Module, int]]
"""`{module name: (its form by the settings, by how many bytes that changes the model)}` of what is not chosen for."""


class _Frontier:
    """The models from all modules in int8 to all in float, each with one module kept more exactly than the one before.

    Attributes:
        states: `{module name: form}` of each.
        totals: bytes of all parameters of each.
    """

    def __init__(self, model: nn.Module, forms: Forms, given: Given, measure: OutputChange, progress: bool):
        self.forms, self.measure = forms, measure
        self.given = {name: made for name, (made, _) in given.items()}
        self.given_cost = measure(self.given) if given else 0.0
        self.float_bytes = sum(p.nbytes for p in model.parameters())
        self.sizes = {name: {form: _bytes(m) for form, m in made.items()} for name, made in forms.items()}
        self.costs: dict[str, dict[str, float]] = {name: {FLOAT: 0.0} for name in forms}
        rounded = [(n, form, m) for n, made in forms.items() for form, m in made.items() if form != FLOAT]
        for name, form, module in tqdm(rounded, desc="Contributions", unit="pass", disable=not progress):
            self.costs[name][form] = measure({name: module})
        self._steps = sorted(
            (step for name in forms for step in self._upgrades(name)), key=lambda step: -step[0]
        )
        self.states = [dict.fromkeys(forms, INT8)]
        for _, name, form in self._steps:
            self.states.append(self.states[-1] | {name: form})
        fixed = self.float_bytes + sum(change for _, change in given.values())
        self.totals = [
            fixed + sum(self.sizes[n][form] - self.sizes[n][FLOAT] for n, form in state.items())
            for state in self.states
        ]
        self._measured: dict[int, float] = {}

    def _upgrades(self, name: str) -> list[tuple[float, str, str]]:
        """`(KL saved for a byte, module, form)` from int8 to float."""
        # the lower convex hull of (bytes, KL): a form above the line between its neighbours is never the best
        hull: list[str] = []
        for form in sorted(self.sizes[name], key=self.sizes[name].__getitem__):
            while len(hull) > 1 and self._rate(name, *hull[-2:]) <= self._rate(name, hull[-2], form):
                hull.pop()
            hull.append(form)
        return [(self._rate(name, before, after), name, after) for before, after in itertools.pairwise(hull)]

    def _rate(self, name: str, before: str, after: str) -> float:
        """KL saved for a byte."""
        sizes, costs = self.sizes[name], self.costs[name]
        return (costs[before] - costs[after]) / max(1, sizes[after] - sizes[before])

    def kl(self, index: int) -> float:
        """Measured, in nats."""
        if index not in self._measured:
            modules = {n: self.forms[n][form] for n, form in self.states[index].items() if form != FLOAT}
            modules |= self.given
            self._measured[index] = self.measure(modules) if modules else 0.0
        return self._measured[index]

    def result(self, max_bytes: int | None, max_kl: float | None) -> SearchResult:
        """What is chosen for a budget."""
        chosen, met = self.choose(max_bytes, max_kl)
        return SearchResult(
            module_overrides={n: {"weights": f} for n, f in self.states[chosen].items() if f != INT8},
            bytes=self.totals[chosen],
            kl=self.kl(chosen),
            float_bytes=self.float_bytes,
            met=met,
            frontier=self.points(),
            chosen=chosen,
            settings={"max_bytes": max_bytes, "max_kl": max_kl, "batches": len(self.measure.batches)},
        )

    def choose(self, max_bytes: int | None, max_kl: float | None) -> tuple[int, bool]:
        """Index of the state to take, and whether it meets the budget."""
        if max_bytes is not None:
            fitting = [n for n, total in enumerate(self.totals) if total <= max_bytes]
            return (fitting[-1], True) if fitting else (0, False)
        assert max_kl is not None
        low, high = 0, len(self.totals) - 1
        if self.kl(low) <= max_kl:
            return low, True
        while high - low > 1:  # low does not hold; high does, or is the float model, which is exact
            middle = (low + high) // 2
            low, high = (low, middle) if self.kl(middle) <= max_kl else (middle, high)
        return high, self.kl(high) <= max_kl

    def points(self) -> tuple[Point, ...]:
        """Each state; predictions are scaled to what all modules in int8 were measured to cost."""
        apart = sum((cost[INT8] for cost in self.costs.values()), self.given_cost)
        scale = self.kl(0) / apart if apart > 0 else 1.0
        changes = ["", *(f"{name} → {form}" for _, name, form in self._steps)]
        return tuple(
            Point(
                bytes=self.totals[index],
                predicted_kl=scale * sum((self.costs[n][form] for n, form in state.items()), self.given_cost),
                measured_kl=self._measured.get(index),
                changed=changes[index],
                float16=sum(form == FLOAT16 for form in state.values()),
                float=sum(form == FLOAT for form in state.values()),
            )
            for index, state in enumerate(self.states)
        )


def _forms(
    model: nn.Module, config: MonoQuantConfig
) -> tuple[dict[str, dict[str, nn.Module]], dict[str, tuple[nn.Module, int]]]:
    """The forms of what can be int8, float16 only where it is smaller than the float module; and what is given."""
    base = copy.deepcopy(config)
    base.weights = INT8
    embeddings = input_embeddings_and_heads(model)
    forms: dict[str, dict[str, nn.Module]] = {}
    given: dict[str, tuple[nn.Module, int]] = {}
    for decision in decide(model, base):
        named = decision.reason.startswith("module_overrides")
        if not decision.quantized or decision.module == "":
            continue
        module = model.get_submodule(decision.module)
        quantized_class = quantized_class_for(module)
        assert quantized_class is not None
        make = partial(quantized_class.from_float, module, name=decision.module)
        as_decided = make(decision.weights, bool(decision.symmetric), activations=decision.activations)
        if named or decision.module in embeddings:
            change = (
                _bytes(as_decided) - _bytes(module) if decision.parameters else 0
            )  # a tied one counts once
            given[decision.module] = as_decided, change
            continue
        made: dict[str, nn.Module] = {FLOAT: module, INT8: as_decided}
        weights = [module.get_parameter(name) for name in quantized_class.weight_axes]
        if all(w.dtype.itemsize > 2 and float(w.detach().abs().max()) <= FLOAT16_MAX for w in weights):
            made[FLOAT16] = make(FLOAT16, False)
        forms[decision.module] = made
    return forms, given


def _bytes(module: nn.Module) -> int:
    """Of the weights with their scales, and of the bias."""
    return sum(p.nbytes for p in module._parameters.values() if p is not None)
