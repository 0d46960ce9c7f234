"""Which modules of a model become quantized, how, and why not: one decision for each, as plain data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from mono_quant_hf.config import OVERRIDE_FIELDS, MonoQuantConfig
from mono_quant_hf.modules import QuantizedModule, quantized_class_for

from .patterns import Aliases, PatternTracker, Stopwatch, as_in_transformers, glob_or_expression
from .tying import input_embeddings_and_heads, modules_tied_wholly, tied_modules

logger = logging.getLogger("mono_quant_hf")

EMBEDDINGS_OFF = "quantize_embeddings is off"


@dataclass(frozen=True)
class Decision:
    """What becomes of one module that holds weights.

    Attributes:
        module: qualified name in the model.
        kind: class name of the float module.
        weights: `"int8"`, `"float16"` or `"float"` (left alone).
        symmetric: whether int8 codes go without zero-points; None where not int8.
        activations: `"int8"` where the input is rounded too, else None.
        reason: why it is left in float, or which setting chose it; empty for the default.
        parameters: number of elements of its own parameters, bias included; a tied weight counts once.
    """

    module: str
    kind: str
    weights: str
    symmetric: bool | None
    reason: str
    parameters: int
    activations: str | None = None

    @property
    def quantized(self) -> bool:
        return self.weights != "float"

    def left_in_float(self, reason: str) -> Decision:
        return replace(self, weights="float", symmetric=None, activations=None, reason=reason)

    def set_to(
        self, settings: dict[str, Any], quantized_class: type[QuantizedModule] | None, reason: str
    ) -> Decision:
        """As an override says, in a module of this quantized form."""
        int8 = settings["weights"] == "int8"
        rounds_inputs = int8 and quantized_class is not None and quantized_class.quantizes_activations
        return replace(
            self,
            weights=settings["weights"],
            symmetric=settings["symmetric"] if int8 else None,
            activations=settings["activations"] if rounds_inputs else None,
            reason=reason,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(model: nn.Module, config: MonoQuantConfig) -> list[Decision]:
    """A decision for every module that has a weight of two or more dimensions, in the order of the model.

    Patterns that match nothing, and overrides of modules that must stay in float, are warned about.

    Args:
        model: any module, also on the meta device. In a `PreTrainedModel` the output head, and what is tied to it or
            to an embedding, are left alone, in addition to the user's own list.
        config: what the user asks for.
    """
    candidates = {name: module for name, module in model.named_modules() if _holds_weight(module)}
    aliases = aliases_of(model)
    stopwatch = Stopwatch()
    skips = PatternTracker(
        "modules_to_not_convert", config.modules_to_not_convert or [], as_in_transformers, aliases, stopwatch
    )
    overrides = PatternTracker(
        "module_overrides", list(config.module_overrides or {}), glob_or_expression, aliases, stopwatch
    )
    embeddings_and_heads = input_embeddings_and_heads(model)
    chosen = embeddings_and_heads if config.quantize_embeddings else set()
    defaults = _default_skips(model, candidates, embeddings_and_heads, chosen)
    if not config.quantize_embeddings:
        tables = [name for name in embeddings_and_heads if isinstance(candidates.get(name), nn.Embedding)]
        defaults |= dict.fromkeys(tables, EMBEDDINGS_OFF)

    tied = getattr(model, "all_tied_weights_keys", {})  # a weight that is another module's counts there
    decisions = []
    for name, module in candidates.items():
        settings: dict[str, Any] = {key: getattr(config, key) for key in OVERRIDE_FIELDS}
        skip, override = skips.first_match(name), overrides.first_match(name)
        if override is not None:
            settings |= (config.module_overrides or {})[override]
        quantized_class = quantized_class_for(module)
        own = (p for key, p in module.named_parameters(recurse=False) if f"{name}.{key}" not in tied)
        decision = Decision(
            module=name,
            kind=type(module).__name__,
            weights="float",
            symmetric=None,
            reason="",
            parameters=sum(p.numel() for p in own),
        ).set_to(settings, quantized_class, "" if override is None else f"module_overrides[{override!r}]")
        if quantized_class is None:
            decision = decision.left_in_float(f"no quantized form of {type(module).__name__}")
        elif (refusal := quantized_class.refuses(module)) is not None:
            decision = decision.left_in_float(refusal)
        elif name in defaults:
            decision = decision.left_in_float(defaults[name])
            if override is not None:
                logger.warning(
                    "module_overrides[%r] has no effect on %s, which stays in float: %s.",
                    override,
                    name,
                    decision.reason,
                )
        elif skip is not None:
            decision = decision.left_in_float(f"modules_to_not_convert: {skip!r}")
        elif (
            isinstance(module, nn.Embedding)
            and name not in embeddings_and_heads
            and (override is None or not config.quantize_embeddings)
        ):
            decision = decision.left_in_float("no input embedding")
        decisions.append(decision)

    names = [name for name, _ in model.named_modules()]
    skips.warn_of_unmatched(names)
    overrides.warn_of_unmatched(names)
    return _decide_together(tied_modules(model), decisions)


def decide_recorded(model: nn.Module, config: MonoQuantConfig) -> list[Decision]:
    """As `decide`, by the config of a checkpoint: an override of a module's full name is no wish there but a fact."""
    aliases, overrides = aliases_of(model), config.module_overrides or {}
    facts = {
        name: alias for name, _ in model.named_modules() for alias in aliases(name) if alias in overrides
    }
    wishes = {pattern: o for pattern, o in overrides.items() if pattern not in facts.values()}
    config = copy.deepcopy(config)
    config.module_overrides = wishes or None
    decisions = []
    for decision in decide(model, config):
        if (fact := facts.get(decision.module)) is not None:
            settings = {key: getattr(config, key) for key in OVERRIDE_FIELDS} | overrides[fact]
            module = model.get_submodule(decision.module)
            quantized_class = quantized_class_for(module)
            if quantized_class is not None and quantized_class.refuses(module) is None:
                decision = decision.set_to(settings, quantized_class, f"module_overrides[{fact!r}]")
        decisions.append(decision)
    return decisions


def settings_of(config: MonoQuantConfig, model: nn.Module) -> Callable[[str], dict[str, Any]]:
    """A function of a module's name: what a config says of it, if it is quantized.

    It gives `{"weights": ..., "symmetric": ..., "activations": ...}`.
    """
    patterns, aliases = config.module_overrides or {}, aliases_of(model)
    tracker = PatternTracker("module_overrides", list(patterns), glob_or_expression, aliases, Stopwatch())
    usual = {key: getattr(config, key) for key in OVERRIDE_FIELDS}

    def of(name: str) -> dict[str, Any]:
        exact = next((alias for alias in aliases(name) if alias in patterns), None)
        override = tracker.first_match(name) if exact is None else exact
        return usual if override is None else usual | patterns[override]

    return of


def aliases_of(model: nn.Module) -> Aliases:
    """The names by which the modules of a model may be called."""
    prefix = getattr(model, "base_model_prefix", "")
    return Aliases(prefix if isinstance(prefix, str) else "")


def quantized_share(decisions: Iterable[Decision]) -> float:
    """Share of the parameters in the decisions' modules that are quantized, 0 to 1; 0 for none.

    Example:
        >>> body = Decision("body", "Linear", "int8", symmetric=False, reason="", parameters=300)
        >>> head = Decision("head", "Linear", "float", symmetric=None, reason="output head", parameters=100)
        >>> quantized_share([body, head])
        0.75
    """
    decisions = list(decisions)
    total = sum(decision.parameters for decision in decisions)
    return sum(decision.parameters for decision in decisions if decision.quantized) / total if total else 0.0


def log_summary(model: nn.Module, decisions: list[Decision]) -> None:
    """One line on what was quantized; a warning, with the largest left out, where it is under half."""
    share = quantized_share(decisions)
    count = sum(decision.quantized for decision in decisions)
    summary = f"{type(model).__name__}: {count} of {len(decisions)} modules quantized, {share:.1%} of their parameters"
    before, after = _bytes_of(model)
    sizes = f"{_readable(after)} instead of {_readable(before)}"
    tables = [d for d in decisions if d.reason == EMBEDDINGS_OFF]
    if tables:
        table = max(tables, key=lambda d: d.parameters)
        weight = model.get_submodule(table.module).get_parameter("weight")
        saved = weight.numel() * (weight.element_size() - 1) - 5 * len(weight)
        sizes += f"; quantize_embeddings=True would save another {_readable(saved)}" if saved > 0 else ""
    if share >= 0.5:
        logger.info("%s. %s.", summary, sizes)
        return
    left_out = sorted((d for d in decisions if not d.quantized), key=lambda d: -d.parameters)[:3]
    named = "; ".join(
        f"{d.module or 'the model itself'} ({d.parameters:,} parameters: {d.reason})" for d in left_out
    )
    logger.warning("%s. The largest left in float: %s. %s.", summary, named, sizes)


def _bytes_of(model: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters in the dtype that the model computes in, and as they are."""
    before = after = 0
    floating = [p for p in model.parameters() if p.is_floating_point()]
    computes_in = model.dtype if isinstance(model, PreTrainedModel) else None
    element_size = (computes_in or (floating[0].dtype if floating else torch.float32)).itemsize
    seen: set[int] = set()
    for module in model.modules():
        storage: set[str] = set()
        if isinstance(module, QuantizedModule):
            storage = set(module.storage_names())
            weights = {id(p): p for p in (module.stored(name)[0] for name in module.weight_axes)}
            before += sum(p.numel() * element_size for key, p in weights.items() if key not in seen)
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            after += parameter.numel() * parameter.element_size()
            if name not in storage:
                before += parameter.numel() * parameter.element_size()
    return before, after


def _readable(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _is_within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def _holds_weight(module: nn.Module) -> bool:
    return any(p is not None and p.dim() > 1 for p in module._parameters.values())


def _default_skips(
    model: nn.Module, candidates: dict[str, nn.Module], embeddings_and_heads: set[str], chosen: set[str]
) -> dict[str, str]:
    """`{module name: reason}` for what is left in float whatever the user says, unless it is `chosen`."""
    reasons: dict[str, str] = {}
    twins: set[str] = set()
    if isinstance(model, PreTrainedModel):  # which keeps what is tied so, also in what it saves
        twins = modules_tied_wholly(model, candidates) - embeddings_and_heads
    outermost: list[str] = []
    for prefix, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and not any(_is_within(prefix, other) for other in outermost):
            outermost.append(prefix)
            heads = [".".join(filter(None, (prefix, key))) for key in get_keys_to_not_convert(part)]
            *_, (last, _) = (
                part.named_parameters()
            )  # transformers takes it for a head where no other is known
            for name in candidates.keys() - chosen:
                tied_only = name in twins and f"{name}.weight" != ".".join(filter(None, (prefix, last)))
                if not tied_only and any(_is_within(name, head) for head in heads):
                    reasons[name] = "output head or tied weight"
    for group in tied_modules(model):
        if not (chosen.issuperset(group) or twins.issuperset(group)):
            for name in group:
                other = next(other for other in group if other != name)
                reasons.setdefault(name, f"it shares its weight with {other}")
    return reasons


def _decide_together(groups: list[list[str]], decisions: list[Decision]) -> list[Decision]:
    """Modules that share a weight are quantized all in one way, that of the first, or not at all."""
    by_name = {decision.module: decision for decision in decisions}
    for group in groups:
        members = [by_name[name] for name in group if name in by_name]
        in_float = next((member for member in members if not member.quantized), None)
        for member in members if any(other.quantized for other in members) else ():
            if in_float is None:
                first = members[0]
                by_name[member.module] = replace(
                    member,
                    weights=first.weights,
                    symmetric=first.symmetric,
                    activations=member.activations if first.weights == "int8" else None,
                    reason=first.reason,
                )
            elif member.quantized:
                reason = (
                    f"it shares its weight with {in_float.module}, which stays in float: {in_float.reason}"
                )
                by_name[member.module] = member.left_in_float(reason)
    return [by_name[decision.module] for decision in decisions]


def modules_that_say_dtype(model: nn.Module, quantized: Collection[str]) -> set[str]:
    """Names of the quantized modules that need a parameter to say the dtype of a (sub)model.

    `dtype` of the models of transformers and diffusers, by which inputs are cast and which is saved in config.json, is
    the dtype of the first floating-point parameter. Where that would be a scale (or a float16 weight), a parameter of
    one element goes before it.

    Args:
        model: float, before its modules are quantized.
        quantized: names of the modules that will be.
    """
    found = set()
    for prefix, part in model.named_modules():
        if isinstance(getattr(type(part), "dtype", None), property):
            first = next((name for name, p in part.named_parameters() if p.is_floating_point()), "")
            owner = ".".join(filter(None, (prefix, first.rpartition(".")[0])))
            module = model.get_submodule(owner)
            quantized_class = quantized_class_for(module)
            if first and owner in quantized and quantized_class is not None:
                others = (
                    p for name, p in module._parameters.items() if name not in quantized_class.weight_axes
                )
                if not any(p is not None and p.is_floating_point() for p in others):
                    found.add(owner)
    return found
