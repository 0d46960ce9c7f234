"""What a quantized checkpoint on disk holds, read from the headers of its safetensors files, and whether it fits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mono_quant_hf.modules import QuantizedModule
from mono_quant_hf.texts import shown

from .selection import Decision

_STORED_DTYPES = {"I8": "int8", "F16": "float16"}
_FLOAT_DTYPES = frozenset({"F64", "F32", "BF16", "F16"})
_COMPANION_DTYPES = {"_scale": "F32", "_zero_point": "I8"}


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor: where it is, its safetensors dtype (`"I8"`, `"F32"`, ...) and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


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
                    if not name.isprintable():
                        raise ValueError(
                            f"{file} holds a tensor named {shown(name)}, with characters that no name has; download or "
                            "save it again."
                        )
                    if name in stored:
                        raise ValueError(
                            f"{name} is both in {stored[name].file} and in {file}; save the model again."
                        )
                    part = tensors.get_slice(name)
                    stored[name] = StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as problem:
            raise ValueError(f"{file} is damaged ({problem}); download or save it again.") from problem
    return stored


def opener() -> Callable[[str], Any]:
    """A function that opens safetensors files by path, each once: reading a header takes longer than most tensors."""
    return functools.cache(lambda file: safe_open(file, framework="pt"))


def decide_by_checkpoint(
    decisions: list[Decision], stored: dict[str, StoredTensor], aliases: Callable[[str], list[str]]
) -> list[Decision]:
    """Let the checkpoint have the last word on which modules are quantized.

    The config's patterns speak of the module names of the class that was saved; another class (the base model, say)
    may name or skip modules differently. Modules that the checkpoint does not name stay as the config decided.
    """
    revised = []
    for decision in decisions:
        key = next((f"{a}.weight" for a in aliases(decision.module) if f"{a}.weight" in stored), None)
        if key is not None:
            dtype = stored[key].dtype
            if dtype == "I8":
                symmetric = f"{key}_zero_point" not in stored and decision.symmetric is not False
                decision = replace(decision, weights="int8", symmetric=symmetric)
            elif dtype not in _FLOAT_DTYPES:
                raise ValueError(
                    f"{key} in {stored[key].file} is {dtype}, neither int8 codes nor floating-point; "
                    "save the quantized model again."
                )
            elif decision.quantized and _STORED_DTYPES.get(dtype) != decision.weights:
                decision = decision.left_in_float("float in the checkpoint")
        revised.append(decision)
    return revised


def check_stored_tensors(
    model: nn.Module, stored: dict[str, StoredTensor], aliases: Callable[[str], list[str]]
) -> None:
    """Compare the headers with the quantized modules that will hold the tensors.

    Raises:
        ValueError: a scale or zero-point is missing, or a tensor has the wrong dtype or shape; names file and tensor.
    """
    for flaw in flaws_of_stored_tensors(model, stored, aliases):
        raise ValueError(flaw.message)


def flaws_of_stored_tensors(
    model: nn.Module, stored: dict[str, StoredTensor], aliases: Callable[[str], list[str]]
) -> Iterator[Flaw]:
    """What does not fit the quantized modules of a model: missing scales, wrong dtypes and shapes, no real scales."""
    opened = opener()
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        for weight in module.weight_axes:
            key = next((f"{a}.{weight}" for a in aliases(name) if f"{a}.{weight}" in stored), None)
            if key is None:
                continue
            for suffix, dtype in _COMPANION_DTYPES.items():
                parameter = module._parameters.get(weight + suffix)
                if parameter is None:
                    continue
                found = stored.get(key + suffix)
                if found is None:
                    yield Flaw(
                        stored[key].file,
                        key + suffix,
                        f"{key}{suffix} is missing from the checkpoint, whose {key} (in {stored[key].file}) holds "
                        "int8 codes; save the quantized model again.",
                    )
                elif found.dtype != dtype or found.shape != tuple(parameter.shape):
                    yield Flaw(
                        found.file,
                        key + suffix,
                        f"{key}{suffix} in {found.file} is {found.dtype} {list(found.shape)} where the model needs "
                        f"{dtype} {list(parameter.shape)}; save the quantized model again.",
                    )
                elif suffix == "_scale":
                    yield from flaws_of_scale(key + suffix, found.file, opened)
            expected = tuple(module.get_parameter(weight).shape)
            if stored[key].shape != expected:
                yield Flaw(
                    stored[key].file,
                    key,
                    f"{key} in {stored[key].file} has shape {list(stored[key].shape)} where the model has "
                    f"{list(expected)}; is it the checkpoint of another model?",
                )


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
