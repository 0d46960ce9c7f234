"""What a quantized checkpoint on disk holds, read from the headers of its safetensors files, and whether it fits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from mono_quant_hf.modules import QuantizedModule, quantized_class_for
from mono_quant_hf.modules.base import DTYPE_NAME, STORAGE_DTYPES

from .conversions import StoredRenaming
from .selection import Decision
from .tying import tied_modules

NOT_THERE = "not in the checkpoint, newly initialized"
_SUFFIXES = ("int8", "float16", "scale", "zero_point")
_SAFETENSORS_NAMES = {torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor: where it is, its safetensors dtype (`"I8"`, `"F32"`, ...), shape, and name there."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Flaw:
    """Something that is wrong with a checkpoint.

    Attributes:
        file: where, as a path; empty where it is not about one file.
        tensor: name of the tensor; empty where it is not about one.
        message: a whole sentence that names both, and the remedy.
    """

    file: str
    tensor: str
    message: str


def read_headers(files: Sequence[str]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name.

    Raises:
        ValueError: a file is missing, truncated or no safetensors file, or a tensor is in two files; names the file.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"{file} is no safetensors file; a mono_quant checkpoint is saved as safetensors only."
            )
        if not Path(file).is_file():
            raise ValueError(f"{file} is missing; the checkpoint is incomplete, download or save it again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    if name in stored:
                        raise ValueError(
                            f"{name} is both in {stored[name].file} and in {file}; save the model again."
                        )
                    part = tensors.get_slice(name)
                    stored[name] = StoredTensor(file, part.get_dtype(), tuple(part.get_shape()), name)
        except SafetensorError as problem:
            raise ValueError(f"{file} is damaged ({problem}); download or save it again.") from problem
    return stored


def opener() -> Callable[[str], Any]:
    """A function that opens safetensors files by path, each once: reading a header takes longer than most tensors."""
    return functools.cache(lambda file: safe_open(file, framework="pt"))


def stored_in_model(model: PreTrainedModel, files: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a quantized checkpoint by the names that the loader will give them in the model.

    Args:
        model: float, before room is made for what is quantized.
        files: as from `read_headers`.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    renaming = StoredRenaming(renamings, files)
    names = {name: tensor for name, tensor in model.state_dict().items()}
    names |= {f"{name}_{suffix}": names[name] for name in list(names) for suffix in _SUFFIXES}
    prefix = model.base_model_prefix
    return {rename_source_key(key, [renaming], [], prefix, names)[0]: tensor for key, tensor in files.items()}


def decide_by_checkpoint(
    model: nn.Module, decisions: list[Decision], stored: dict[str, StoredTensor]
) -> list[Decision]:
    """Let the checkpoint have the last word on which modules are quantized, and how: it says so by its names.

    Args:
        model: float, before room is made for what is quantized.
        decisions: by the config, whose patterns speak of the module names of the class that was saved.
        stored: by the names of the model.
    """
    tied = {name: group for group in tied_modules(model) for name in group}
    revised = []
    for decision in decisions:
        quantized_class = quantized_class_for(model.get_submodule(decision.module))
        names = [
            f"{module}.{weight}".lstrip(".")
            for module in tied.get(decision.module, [decision.module])
            for weight in (quantized_class.weight_axes if quantized_class is not None else ())
        ]
        form = next(((name, w) for name in names for w in STORAGE_DTYPES if f"{name}_{w}" in stored), None)
        if form is not None:
            name, weights = form
            symmetric = f"{name}_zero_point" not in stored and decision.symmetric is not False
            reason = decision.reason if decision.quantized else ""
            decision = replace(
                decision, weights=weights, symmetric=symmetric if weights == "int8" else None, reason=reason
            )
        elif decision.quantized:
            there = any(name in stored for name in names)
            decision = decision.left_in_float("float in the checkpoint" if there else NOT_THERE)
        revised.append(decision)
    return revised


def stems_of_codes(stored: Iterable[str]) -> list[str]:
    """Names of the float weights for which a checkpoint holds int8 codes.

    Example:
        >>> stems_of_codes(["proj.weight_int8", "proj.weight_scale", "norm.weight"])
        ['proj.weight']
    """
    return [name.removesuffix("_int8") for name in stored if name.endswith("_int8")]


def modules_saying_dtype(stored: dict[str, StoredTensor]) -> list[str]:
    """Names of the modules for which the checkpoint holds a parameter that says the dtype."""
    return [name.removesuffix(f".{DTYPE_NAME}") for name in stored if name.endswith(f".{DTYPE_NAME}")]


def check_stored_tensors(model: nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Compare the headers with the quantized modules that will hold the tensors.

    Raises:
        ValueError: a tensor is missing, or has the wrong dtype or shape; names file and tensor.
    """
    for flaw in flaws_of_stored_tensors(model, stored):
        raise ValueError(flaw.message)


def flaws_of_stored_tensors(model: nn.Module, stored: dict[str, StoredTensor]) -> Iterator[Flaw]:
    """What does not fit the quantized modules of a model: missing tensors, wrong dtypes and shapes, no real scales.

    Args:
        model: with room for what is quantized.
        stored: by the names of the model.
    """
    opened = opener()
    names: dict[int, list[str]] = {}  # of what is tied, any
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        for key in module.storage_names() if isinstance(module, QuantizedModule) else ():
            assert isinstance(module, QuantizedModule)
            parameter = module.get_parameter(key)
            full_name = next((n for n in names[id(parameter)] if n in stored), f"{name}.{key}".lstrip("."))
            found = stored.get(full_name)
            dtype = _SAFETENSORS_NAMES[module.storage_dtype(key)]
            if found is None:
                beside = (tensor.file for n, tensor in stored.items() if n.startswith(f"{name}.".lstrip(".")))
                yield Flaw(
                    next(beside, ""),
                    full_name,
                    f"{full_name} is missing from the checkpoint, which holds the other tensors of "
                    f"{name or 'the model'}; save the quantized model again.",
                )
            elif found.dtype != dtype or found.shape != tuple(parameter.shape):
                yield Flaw(
                    found.file,
                    found.name,
                    f"Expected {found.name} in {found.file} to be {dtype} {list(parameter.shape)}, got {found.dtype} "
                    f"{list(found.shape)}; is it the checkpoint of another model?",
                )
            elif key.endswith("_scale"):
                yield from flaws_of_scale(found.name, found.file, opened)


def flaws_of_scale(key: str, file: str, opened: Callable[[str], Any]) -> Iterator[Flaw]:
    """One, where a stored scale is not finite and positive throughout; `opened` gives the open file."""
    scale = opened(file).get_tensor(key)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        yield Flaw(
            file,
            key,
            f"{key} in {file} holds values that are no scale (NaN, infinite, zero or negative); "
            "save the quantized model again.",
        )
