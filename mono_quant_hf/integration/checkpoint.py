"""What a quantized checkpoint on disk holds, read from the headers of its safetensors files, and whether it fits.

The rules here hold whether or not the config has checksums, for `from_pretrained`, `load_quantized` and `verify` alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.modules import QuantizedModule, quantized_class_for
from mono_quant_hf.modules.base import DTYPE_NAME, STORAGE_DTYPES, stored_names
from mono_quant_hf.weight_files import StoredTensor, opener

from .selection import Decision, settings_of
from .tying import tied_modules

NOT_THERE = "not in the checkpoint, newly initialized"
_STORED_AS = {torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


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


class FlawedCheckpoint(ValueError):
    """A checkpoint that cannot be loaded.

    Attributes:
        flaw: what is wrong with it.
    """

    def __init__(self, flaw: Flaw):
        super().__init__(flaw.message)
        self.flaw = flaw


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
    def as_named(
        cls, stored: Mapping[str, StoredTensor], aliases: Mapping[str, str] | None = None
    ) -> Checkpoint:
        """One whose tensors have the names of the model's.

        Args:
            aliases: `{name: the name it was written by}` of tensors that have several.
        """
        return cls(stored, {name: [name] for name in stored} | {n: [w] for n, w in (aliases or {}).items()})

    def of(self, name: str) -> Iterator[tuple[str, StoredTensor]]:
        """What becomes the model's tensor `name`, by name on disk."""
        return ((key, self.stored[key]) for key in self.sources.get(name, ()))


def stems_of_codes(stored: Iterable[str]) -> list[str]:
    """Names of the float weights for which a checkpoint holds int8 codes.

    Example:
        >>> stems_of_codes(["proj.weight_int8", "proj.weight_scale", "norm.weight"])
        ['proj.weight']
    """
    return [name.removesuffix("_int8") for name in stored if name.endswith("_int8")]


def modules_saying_dtype(checkpoint: Checkpoint) -> list[str]:
    """Names of the modules for which a checkpoint holds a parameter that says the dtype."""
    return [n.removesuffix(f".{DTYPE_NAME}") for n in checkpoint.sources if n.endswith(f".{DTYPE_NAME}")]


def decide_by_checkpoint(
    model: nn.Module, decisions: list[Decision], config: MonoQuantConfig, checkpoint: Checkpoint
) -> list[Decision]:
    """Let the checkpoint have the last word on which modules are quantized, which its names say.

    The config's patterns speak of the module names of the class that was saved; another class (the base model, say)
    may name or skip modules differently.

    Args:
        model: float, such as on the meta device.
        decisions: by the config.
        config: the one they were made by; it says whether there are zero-points, and of activations.
        checkpoint: what is stored.

    Raises:
        FlawedCheckpoint: there are codes for a module that cannot be quantized; names it.
    """
    tied = {name: group for group in tied_modules(model) for name in group}
    settings = settings_of(config, model)
    return [_by_checkpoint(model, d, tied.get(d.module, [d.module]), settings, checkpoint) for d in decisions]


def _by_checkpoint(
    model: nn.Module,
    decision: Decision,
    group: Sequence[str],
    settings: Callable[[str], dict[str, Any]],
    checkpoint: Checkpoint,
) -> Decision:
    module = model.get_submodule(decision.module)
    quantized_class = quantized_class_for(module)
    names = module._parameters if quantized_class is None else quantized_class.weight_axes
    weights = [_joined(other, name) for other in group for name in names]
    form = next(((w, f) for w in weights for f in STORAGE_DTYPES if f"{w}_{f}" in checkpoint.sources), None)
    if form is None:
        there = any(weight in checkpoint.sources for weight in weights)
        reason = "float in the checkpoint" if there else NOT_THERE
        return decision.left_in_float(reason) if decision.quantized else decision
    if quantized_class is None or (refusal := quantized_class.refuses(module)) is not None:
        refusal = f"there is no quantized form of {decision.kind}" if quantized_class is None else refusal
        key, found = next(checkpoint.of("_".join(form)))
        message = (
            f"{key} in {found.file} stands for a quantized weight, but {decision.module} stays in float: {refusal}; "
            "load it with the version of the model's class that it was saved with."
        )
        raise FlawedCheckpoint(Flaw(found.file, key, message))
    if decision.weights == form[1]:
        return decision
    told = settings(decision.module) | {"weights": form[1]}
    return decision.set_to(told, quantized_class, f"{form[1]} in the checkpoint")


def check_stored_tensors(
    model: nn.Module, checkpoint: Checkpoint, *, complete: bool = False, exact: bool = False
) -> None:
    """Compare the headers with a model that has room for the tensors.

    Raises:
        FlawedCheckpoint: the first of `flaws_of_stored_tensors`.
    """
    for flaw in flaws_of_stored_tensors(model, checkpoint, complete=complete, exact=exact):
        raise FlawedCheckpoint(flaw)


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
    groups = groups_of_one_tensor(model)
    storage: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            storage |= {_joined(name, key) for key in module.storage_names()}
            yield from _flaws_of_module(name, module, groups, checkpoint, opened)
    yield from _surplus_tensors(model, groups, checkpoint)
    if complete:
        yield from _missing_tensors(model, groups, checkpoint)
    if exact:
        yield from _changed_tensors(model, storage, groups, checkpoint, opened)


def _flaws_of_module(
    name: str,
    module: QuantizedModule,
    groups: Mapping[str, Sequence[str]],
    checkpoint: Checkpoint,
    opened: Callable[[str], Any],
) -> Iterator[Flaw]:
    found: dict[str, tuple[str, StoredTensor]] = {}
    for key in module.storage_names():
        stored = (pair for other in groups[_joined(name, key)] for pair in checkpoint.of(other))
        if (pair := next(stored, None)) is not None:
            found[key] = pair
    other_rows = _have_other_rows(module, {key: tensor for key, (_, tensor) in found.items()})
    for key in module.storage_names():
        if key not in found:
            other, tensor = next(iter(found.values()))
            message = f"{_joined(name, key)} is missing from the checkpoint, though {other} is there (in {tensor.file})"
            yield Flaw(tensor.file, _joined(name, key), f"{message}; save the quantized model again.")
            continue
        source, tensor = found[key]
        dtype, shape = _STORED_AS[module.storage_dtype(key)], tuple(module.get_parameter(key).shape)
        if tensor.dtype != dtype or (tensor.shape != shape and not other_rows):
            yield Flaw(
                tensor.file,
                source,
                f"Expected {source} in {tensor.file} to be {dtype} {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}; save the quantized model again, or load it with the class that was saved.",
            )
        elif key.endswith("_scale"):
            yield from flaws_of_scale(source, tensor.file, opened)


def _have_other_rows(module: QuantizedModule, found: Mapping[str, StoredTensor]) -> bool:
    """Whether all its tensors have one other number of rows, as those of a head for other labels have.

    `from_pretrained(..., ignore_mismatched_sizes=True)` makes a new one then, and refuses it without, as for float.
    """
    pairs = [(tensor.shape, tuple(module.get_parameter(key).shape)) for key, tensor in found.items()]
    alike = all(len(a) == len(b) and a[1:] == b[1:] and a[:1] != b[:1] for a, b in pairs)
    return alike and len({(a[0], b[0]) for a, b in pairs if a}) == 1


def _surplus_tensors(
    model: nn.Module, groups: Mapping[str, Sequence[str]], checkpoint: Checkpoint
) -> Iterator[Flaw]:
    """What looks as if it belonged to a quantized weight, and is none of the model's."""
    for name, module in model.named_modules():
        quantized_class = type(module) if isinstance(module, QuantizedModule) else quantized_class_for(module)
        axes: Iterable[str] = quantized_class.weight_axes if quantized_class is not None else ()
        for weight in axes:
            for key in (weight, *stored_names(weight, "int8", False), *stored_names(weight, "float16", True)):
                full = _joined(name, key)
                for source, found in checkpoint.of(full) if full not in groups else ():
                    how = module.quantization if isinstance(module, QuantizedModule) else None
                    kind = "float" if how is None else how.weights
                    kind = "symmetric" if kind == "int8" and how is not None and how.symmetric else kind
                    yield Flaw(
                        found.file,
                        source,
                        f"{source} is in {found.file}, but the config says {kind}; save the quantized model again.",
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
