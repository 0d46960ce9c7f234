"""What a quantized checkpoint on disk holds, read from the headers of its safetensors files, and whether it fits.

The rules here hold whether or not the config has checksums, for `from_pretrained`, `load_quantized` and `verify` alike.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.modules import QuantizedModule, quantized_class_for
from mono_quant_hf.texts import shown

from .selection import Decision, settings_of

FLOAT_IN_CHECKPOINT = "float in the checkpoint"
COMPANIONS = ("_scale", "_zero_point")
_STORED_AS = {torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


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


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, and what they become in a model.

    Attributes:
        stored: by name on disk.
        sources: `{name in the model: names on disk}`, several where they are joined on loading.
        converted: names on disk of what is joined or split, whose shapes are not those of the model.
    """

    stored: Mapping[str, StoredTensor]
    sources: Mapping[str, Sequence[str]]
    converted: frozenset[str] = frozenset()

    @classmethod
    def as_named(cls, stored: Mapping[str, StoredTensor]) -> Checkpoint:
        """One whose tensors have the names of the model's."""
        return cls(stored, {name: [name] for name in stored})

    def of(self, name: str) -> Iterator[tuple[str, StoredTensor]]:
        """What becomes the model's tensor `name`, by name on disk."""
        return ((key, self.stored[key]) for key in self.sources.get(name, ()))


def decide_by_checkpoint(
    model: nn.Module, decisions: list[Decision], config: MonoQuantConfig, checkpoint: Checkpoint
) -> list[Decision]:
    """Let the checkpoint have the last word on which modules are quantized, and its config on how.

    The config's patterns speak of the module names of the class that was saved; another class (the base model, say)
    may name or skip modules differently. Modules that the checkpoint does not name stay as the config decided.

    Args:
        model: float, such as on the meta device.
        decisions: those of `decide_recorded`.
        config: the one they were made by.
        checkpoint: what is stored.

    Raises:
        ValueError: a weight is stored in a way that fits neither a quantized module nor a float one; names it.
    """
    settings = settings_of(config, model)
    return [_by_checkpoint(model, decision, settings, checkpoint) for decision in decisions]


def _by_checkpoint(
    model: nn.Module,
    decision: Decision,
    settings: Callable[[str], dict[str, Any]],
    checkpoint: Checkpoint,
) -> Decision:
    module, quantized_class = model.get_submodule(decision.module), None
    refusal = f"there is no quantized form of {decision.kind}"
    if (found_class := quantized_class_for(module)) is not None:
        refusal = found_class.refuses(module) or ""
        quantized_class = None if refusal else found_class
    weights = module._parameters if quantized_class is None else quantized_class.weight_axes
    dtypes = set()
    for weight in weights:
        name = _joined(decision.module, weight)
        for key, found in checkpoint.of(name):
            dtypes.add(found.dtype)
            if found.dtype != "I8" and found.dtype not in _FLOATS:
                raise ValueError(
                    f"{key} in {found.file} is {found.dtype}, neither int8 codes nor floating-point; "
                    "save the quantized model again."
                )
            if found.dtype == "I8" and refusal:
                raise ValueError(
                    f"{key} in {found.file} is I8, but {decision.module} holds no int8 codes here: {refusal}; "
                    "load it with the version of the model's class that it was saved with."
                )
            beside = next((key + s for s in COMPANIONS if key + s in checkpoint.stored), None)
            if quantized_class is not None and found.dtype != "I8" and beside is not None:
                raise ValueError(
                    f"{key} in {found.file} is {found.dtype}, but {beside} belongs to int8 codes; "
                    "save the quantized model again."
                )
    if quantized_class is None or not dtypes:
        return decision
    if _has_other_rows(quantized_class, module, decision.module, checkpoint):
        return decision.left_in_float("another number of rows in the checkpoint")
    if "I8" in dtypes:
        if decision.weights == "int8":
            return decision
        told = settings(decision.module) | {"weights": "int8"}
        return decision.set_to(told, quantized_class, "int8 in the checkpoint")
    if decision.quantized and (decision.weights != "float16" or dtypes != {"F16"}):
        return decision.left_in_float(FLOAT_IN_CHECKPOINT)
    return decision


def _has_other_rows(
    quantized_class: type[QuantizedModule], module: nn.Module, name: str, checkpoint: Checkpoint
) -> bool:
    """Whether all its tensors have one other number of rows, as a head for other labels has.

    `from_pretrained(..., ignore_mismatched_sizes=True)` makes a new one then, and refuses it without, as for float.
    """
    rows = set()
    for key, parameter in module._parameters.items():
        for suffix in ("", *COMPANIONS) if key in quantized_class.weight_axes else ("",):
            for source, found in checkpoint.of(_joined(name, key + suffix)):
                if parameter is None or source in checkpoint.converted or not found.shape:
                    return False
                if not suffix and found.shape[1:] != tuple(parameter.shape[1:]):
                    return False
                rows.add((found.shape[0], parameter.shape[0]))
    return len(rows) == 1 and all(found != expected for found, expected in rows)


def check_stored_tensors(
    model: nn.Module, checkpoint: Checkpoint, *, complete: bool = False, exact: bool = False
) -> None:
    """Compare the headers with a model that has room for the tensors.

    Raises:
        ValueError: the first of `flaws_of_stored_tensors`.
    """
    for flaw in flaws_of_stored_tensors(model, checkpoint, complete=complete, exact=exact):
        raise ValueError(flaw.message)


def flaws_of_stored_tensors(
    model: nn.Module, checkpoint: Checkpoint, *, complete: bool = False, exact: bool = False
) -> Iterator[Flaw]:
    """What does not fit the quantized modules: missing and surplus tensors, dtypes, shapes, and what is no scale.

    Args:
        model: with room for the tensors, such as on the meta device.
        checkpoint: what is stored.
        complete: whether no tensor may be missing. Not where a model of another class was saved: heads are new then.
        exact: whether what is not quantized must look as it was saved, too. Not needed where there are checksums.
    """
    opened = opener()
    quantized: set[str] = set()
    for name, module in model.named_modules():
        for weight in module.weight_axes if isinstance(module, QuantizedModule) else ():
            full = _joined(name, weight)
            quantized |= {full + suffix for suffix in ("", *COMPANIONS)}
            yield from _flaws_of_weight(module, weight, full, checkpoint, opened)
    groups = groups_of_one_tensor(model)
    if complete:
        yield from _missing_tensors(model, groups, checkpoint)
    if exact:
        yield from _changed_tensors(model, quantized, groups, checkpoint, opened)


def _flaws_of_weight(
    module: QuantizedModule, weight: str, full: str, checkpoint: Checkpoint, opened: Callable[[str], Any]
) -> Iterator[Flaw]:
    stored, codes = checkpoint.stored, list(checkpoint.of(full))
    for suffix in ("", *COMPANIONS):
        parameter = module._parameters.get(weight + suffix)
        for key, found in checkpoint.of(full + suffix):
            base = key.removesuffix(suffix)
            if parameter is None:
                how = "symmetric" if module.quantization.weights == "int8" else module.quantization.weights
                yield Flaw(
                    found.file,
                    key,
                    f"{key} is in {found.file}, but the config says {how}; save the quantized model again.",
                )
                continue
            dtype = _STORED_AS[module.storage_dtype(weight + suffix)]
            shape = tuple(parameter.shape)
            if (
                key in checkpoint.converted
            ):  # its shape is not the model's, but fits that of the codes beside it
                shape = found.shape
                if base in stored and len(shape) == len(stored[base].shape):
                    pairs = zip(shape, stored[base].shape, strict=True)
                    shape = tuple(size if size in (1, of_codes) else of_codes for size, of_codes in pairs)
            if not suffix and found.dtype == dtype and found.shape != shape:
                yield Flaw(
                    found.file,
                    key,
                    f"{key} in {found.file} has shape {list(found.shape)} where the model has {list(shape)}; "
                    "is it the checkpoint of another model?",
                )
            elif found.dtype != dtype or found.shape != shape:
                yield Flaw(
                    found.file,
                    key,
                    f"{key} in {found.file} is {found.dtype} {list(found.shape)} where the model needs {dtype} "
                    f"{list(shape)}; save the quantized model again.",
                )
            elif suffix == "_scale":
                yield from flaws_of_scale(key, found.file, opened)
            if suffix and base not in stored:
                yield _missing(base, found.file)
        for key, found in codes if suffix and parameter is not None else ():
            if key + suffix not in stored:
                yield _missing(key + suffix, found.file)


def _missing(name: str, file: str) -> Flaw:
    return Flaw(
        file,
        name,
        f"{name} is missing from the checkpoint, though the rest of its module is there (in {file}); "
        "save the quantized model again.",
    )


def _missing_tensors(
    model: nn.Module, groups: Mapping[str, Sequence[str]], checkpoint: Checkpoint
) -> Iterator[Flaw]:
    fields = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save")
    optional = [re.compile(pattern) for field in fields for pattern in getattr(model, field, None) or ()]
    for name, group in groups.items():
        there = any(checkpoint.sources.get(other) for other in group)
        if not there and not any(pattern.search(name) for pattern in optional):
            kind = type(model).__name__
            message = f"{name} of {kind} is missing from the checkpoint; save the quantized model again."
            yield Flaw("", name, message)


def _changed_tensors(
    model: nn.Module,
    quantized: set[str],
    groups: Mapping[str, Sequence[str]],
    checkpoint: Checkpoint,
    opened: Callable[[str], Any],
) -> Iterator[Flaw]:
    """Float tensors that were cast, and those that are one in the model and differ in the files."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in groups}
    held = {key: found for name in tensors.keys() - quantized for key, found in checkpoint.of(name)}
    dtypes = Counter(found.dtype for found in held.values() if found.dtype in _FLOATS)
    usual = dtypes.most_common(1)[0][0] if dtypes else "F32"
    for name, tensor in tensors.items():
        for key, found in checkpoint.of(name) if name not in quantized else ():
            if key not in checkpoint.converted and found.shape != tuple(tensor.shape):
                continue  # the loader refuses it, or with ignore_mismatched_sizes makes a new one
            if not _may_be_stored_as(found.dtype, tensor, usual):
                yield Flaw(
                    found.file,
                    key,
                    f"{key} in {found.file} is {found.dtype}, which is not what it was saved as; "
                    "save the quantized model again.",
                )
    for group in {id(group): group for group in groups.values()}.values():
        keys = [key for name in group for key in checkpoint.sources.get(name, ())]
        if len(keys) < 2 or checkpoint.converted.intersection(keys):
            continue
        first, *others = (opened(checkpoint.stored[key].file).get_tensor(key) for key in keys)
        for key, other in zip(keys[1:], others, strict=True):
            if not torch.equal(first, other):
                file = checkpoint.stored[key].file
                yield Flaw(
                    file,
                    key,
                    f"{key} in {file} differs from {keys[0]}, which is the same tensor in {type(model).__name__}; "
                    "save the quantized model again.",
                )


def _may_be_stored_as(dtype: str, tensor: Tensor, usual: str) -> bool:
    """Not where digits were lost: a model is saved in one dtype, but for what it keeps in a wider one."""
    if not tensor.is_floating_point():
        return dtype not in _FLOATS
    return dtype == usual or _FLOATS.get(dtype, 0) > _FLOATS[usual]


def groups_of_one_tensor(model: nn.Module) -> dict[str, list[str]]:
    """`{name: every name of that tensor, itself included}`, by identity and by what transformers ties on loading."""
    groups: dict[str, list[str]] = {}
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            groups[name] = by_tensor.setdefault(id(tensor), [])
            groups[name].append(name)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target in groups and source in groups and groups[target] is not groups[source]:
            groups[source] += groups[target]
            groups |= dict.fromkeys(groups[target], groups[source])
    return groups


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


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
