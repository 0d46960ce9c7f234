"""Weights that several modules share: quantized together, and kept one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mono_quant_hf.modules import QuantizedModule

_SUFFIXES = ("", "_scale", "_zero_point")


def input_embeddings_and_heads(model: nn.Module) -> set[str]:
    """Names of the modules that `quantize_embeddings` is about.

    In a `PreTrainedModel` the input embeddings and output heads of it and of the models inside it; in any other module
    every `nn.Embedding`.
    """
    found: set[int] = set()
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        try:
            embeddings = part.get_input_embeddings()
        except (NotImplementedError, AttributeError):  # of a model without any
            embeddings = None
        if isinstance(embeddings, nn.Embedding):
            found.add(id(embeddings))
        head = part.get_output_embeddings()
        if isinstance(head, nn.Module):
            found.add(id(head))
    if not parts:
        found = {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = {name for name, module in model.named_modules() if id(module) in found}
    return names | {name for group in tied_modules(model) if names.intersection(group) for name in group}


def tied_modules(model: nn.Module) -> list[list[str]]:
    """Names of the modules that share a weight, a list for each weight."""
    groups: dict[object, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() > 1:
                groups.setdefault(id(parameter), []).append(name)
    by_source: dict[str, list[str]] = {}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if model.get_parameter_or_buffer(source).dim() > 1:  # type: ignore[operator]  # of a PreTrainedModel
            by_source.setdefault(source, []).extend(key.rpartition(".")[0] for key in (source, target))
    merged: list[list[str]] = []
    for group in [*by_source.values(), *groups.values()]:
        names = list(dict.fromkeys(group))
        if len(names) < 2:
            continue
        met = [other for other in merged if set(other).intersection(names)]
        merged = [other for other in merged if other not in met]
        merged.append(list(dict.fromkeys(name for other in [*met, names] for name in other)))
    return merged


def share_storage(model: nn.Module, groups: Iterable[Iterable[str]]) -> None:
    """Give the quantized modules of each group one and the same codes, scales and zero-points."""
    for group in groups:
        modules = [model.get_submodule(name) for name in group]
        quantized = [module for module in modules if isinstance(module, QuantizedModule)]
        if len(quantized) < len(modules):
            continue
        for suffix in _SUFFIXES:
            shared = quantized[0]._parameters.get(f"weight{suffix}")
            for module in quantized[1:] if shared is not None else ():
                module._parameters[f"weight{suffix}"] = shared


def declare_tied_companions(model: PreTrainedModel) -> None:
    """Tell transformers that the scales and zero-points of tied quantized weights are tied too.

    It ties again by these declarations after loading and whenever `tie_weights` is called, and leaves out of a saved
    checkpoint what they say can be tied.
    """
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        companions = _companions_of(part, part.all_tied_weights_keys)
        if companions:
            own = part.get_expanded_tied_weights_keys(all_submodels=False)
            if own:
                part._tied_weights_keys = {**own, **_companions_of(part, own)}
            part.all_tied_weights_keys = {**part.all_tied_weights_keys, **companions}


def share_offloaded(model: PreTrainedModel) -> None:
    """Let tied weights on disk be read from one place, after they were quantized while loading.

    The loader enters the second of a tied pair where the first was in the float checkpoint, and does not know yet that
    the first is about to be written anew.
    """
    indices = {id(index): index for index in _offload_indices(model)}
    for index in indices.values():
        for target, source in model.all_tied_weights_keys.items():
            if source in index:
                index[target] = index[source]


def _offload_indices(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What accelerate's hooks know of the weights on disk, `{parameter name: where it is}`."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            weights: Any = getattr(part, "weights_map", None)
            while hasattr(weights, "dataset"):
                weights = weights.dataset
            index = getattr(weights, "index", None)
            if isinstance(index, dict):
                yield index


def _companions_of(model: PreTrainedModel, tied: dict[str, str]) -> dict[str, str]:
    return {
        target + suffix: source + suffix
        for target, source in tied.items()
        for suffix in _SUFFIXES[1:]
        if _has_companion(model, target, suffix) and _has_companion(model, source, suffix)
    }


def withdraw_tied_companions(model: PreTrainedModel) -> None:
    """Undo `declare_tied_companions` when the model is float again, and tie its weights."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        declared = part.all_tied_weights_keys
        there = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        companions = {
            key
            for key in declared.keys() - there
            for suffix in _SUFFIXES[1:]
            if key.removesuffix(suffix) in declared
        }
        if not companions:
            continue
        part.all_tied_weights_keys = {key: declared[key] for key in declared if key not in companions}
        own = part._tied_weights_keys or {}
        part._tied_weights_keys = {key: own[key] for key in own if key not in companions}
    model.tie_weights()


def _has_companion(model: nn.Module, key: str, suffix: str) -> bool:
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    return (
        isinstance(module, QuantizedModule)
        and name in module.weight_axes
        and module._parameters.get(name + suffix) is not None
    )
