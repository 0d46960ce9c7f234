"""Weights that several modules share: quantized together, and kept one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mono_quant_hf.modules import QuantizedModule

STORED_SUFFIXES = ("_int8", "_float16", "_scale", "_zero_point")
_IN_FLOAT = "_tied_weights_keys_in_float"


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
        if all(_is_weight(model, key) for key in (source, target)):
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


def modules_tied_wholly(model: nn.Module, candidates: Mapping[str, nn.Module]) -> set[str]:
    """Names of the modules that share each of their weights with another module."""
    tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    users = Counter(id(p) for module in candidates.values() for p in module._parameters.values())
    return {
        name
        for name, module in candidates.items()
        if all(
            users[id(p)] > 1 or f"{name}.{key}" in tied
            for key, p in module._parameters.items()
            if p is not None and p.dim() > 1
        )
    }


def _is_weight(model: nn.Module, key: str) -> bool:
    """Whether a tied parameter is a weight, float or quantized, by its name."""
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, QuantizedModule):
        return any(name in (weight, f"{weight}_int8", f"{weight}_float16") for weight in module.weight_axes)
    parameter = getattr(module, name, None)
    return isinstance(parameter, nn.Parameter) and parameter.dim() > 1


def share_storage(model: nn.Module, groups: Iterable[Iterable[str]]) -> None:
    """Give the quantized modules of each group one and the same codes, scales and zero-points."""
    for group in groups:
        modules = [model.get_submodule(name) for name in group]
        quantized = [module for module in modules if isinstance(module, QuantizedModule)]
        if len(quantized) < len(modules):
            continue
        for name in quantized[0].storage_names():
            for module in quantized[1:]:
                module._parameters[name] = quantized[0]._parameters[name]


def declare_tied_storage(model: PreTrainedModel) -> None:
    """Tell transformers that what tied quantized weights are stored as is tied, and no longer the weights themselves.

    It ties again by these declarations after loading and whenever `tie_weights` is called, and leaves out of a saved
    checkpoint what they say can be tied.
    """
    for part in _parts_tied_otherwise(model, _by_storage):
        vars(part).setdefault(_IN_FLOAT, part._tied_weights_keys)  # perhaps patterns, of names in float
        part.all_tied_weights_keys = _by_storage(part, part.all_tied_weights_keys)
        part._tied_weights_keys = dict(part.all_tied_weights_keys)


def withdraw_tied_storage(model: PreTrainedModel) -> None:
    """Undo `declare_tied_storage` when the model is float again, and tie its weights."""
    for part in _parts_tied_otherwise(model, _by_weight):
        part.all_tied_weights_keys = _by_weight(part, part.all_tied_weights_keys)
        part._tied_weights_keys = vars(part).pop(_IN_FLOAT)
    model.tie_weights()


def _parts_tied_otherwise(
    model: PreTrainedModel, renamed: Callable[[PreTrainedModel, dict[str, str]], dict[str, str]]
) -> list[PreTrainedModel]:
    """The models in a model whose declarations of what is tied `renamed` would change."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    # One that did not set itself up has none.
    declared = {part: getattr(part, "all_tied_weights_keys", {}) for part in parts}
    return [part for part, tied in declared.items() if renamed(part, tied) != tied]


def _by_storage(model: PreTrainedModel, tied: dict[str, str]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for target, source in tied.items():
        owner, _, name = target.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, QuantizedModule) and name in module.weight_axes:
            suffixes = [key.removeprefix(name) for key in module.storage_names() if key.startswith(name)]
            renamed |= {target + suffix: source + suffix for suffix in suffixes}
        else:
            renamed[target] = source
    return renamed


def _by_weight(model: PreTrainedModel, tied: dict[str, str]) -> dict[str, str]:
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    renamed: dict[str, str] = {}
    for target, source in tied.items():
        suffix = next((s for s in STORED_SUFFIXES if target.endswith(s) and target not in there), "")
        renamed[target.removesuffix(suffix)] = source.removesuffix(suffix)
    return renamed


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
