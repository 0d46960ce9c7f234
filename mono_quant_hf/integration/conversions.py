"""The operations that transformers' checkpoint loader runs on the tensors of modules that are to be quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from mono_quant_hf.modules.base import DTYPE_NAME, stored_names
from mono_quant_hf.weight_files import StoredTensor

from .by_version import renamed
from .checkpoint import Checkpoint
from .tying import STORED_SUFFIXES

_CODES = ("_int8", "_float16")


class QuantizeWeights(ConversionOps):
    """Quantizes each module as its float weight comes from the checkpoint: the weight becomes codes and scales."""

    def __init__(self, hf_quantizer: Any):
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: PreTrainedModel,
        source_patterns: Sequence[str] = (),
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if self.hf_quantizer.read_ahead is not None:
            # Where nothing is joined or split, the pattern is the name in the file.
            for name in (*source_patterns, *input_dict):
                self.hf_quantizer.read_ahead.reached(name)
        converted: dict[str, Tensor] = {}
        while input_dict:
            # Popped, so that the float tensor is freed before the next one is made.
            name, tensor = input_dict.popitem()
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            converted |= self.hf_quantizer.quantize_arrived(model, name, tensor, missing_keys)
        return converted

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError(
            "Expected codes to be saved as they are, got a request to reverse their making."
        )


def checkpoint_of(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> Checkpoint:
    """What the tensors of a checkpoint become in a model, by the renamings and conversions of the model's own.

    Args:
        model: float or quantized, such as on the meta device.
        stored: by name on disk.
    """
    conversions = get_model_conversion_mapping(model)
    own_renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    renamings: list[WeightRenaming] = [StoredRenaming(own_renamings, stored)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    own = dict(model.state_dict())
    for name in list(own):
        quantized = (
            *stored_names(name, "int8", symmetric=False),
            *stored_names(name, "float16", symmetric=True),
        )
        own |= dict.fromkeys(quantized, own[name])
        own[f"{name.rpartition('.')[0]}.{DTYPE_NAME}".lstrip(".")] = own[name]
    sources: dict[str, list[str]] = {}
    converted = set()
    for name in stored:
        target_name, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        targets = [target_name]
        if target_name not in own and name in own:
            targets = [name]
        elif pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            targets += [target_name.replace(first, other) for other in others]
            converted.add(name)
        for target in targets:
            sources.setdefault(target, []).append(name)
    return Checkpoint(stored, sources, frozenset(converted))


def keep_conversions(model: PreTrainedModel) -> None:
    """Have `save_pretrained` undo only those of the model's conversions that are of float weights.

    What is quantized is saved by the names that it has in the model: codes and scales of weights that a conversion
    joined, such as those of experts, are not taken apart again.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if (
        conversions is None
    ):  # no checkpoint was loaded into the model; what save_pretrained would look up itself
        conversions = [
            conversion
            for conversion in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(conversion, PrefixChange)
        ]
    conversions = [part for conversion in conversions for part in _parts_used(conversion)]
    parameters = [name for name, _ in model.named_parameters()]
    names = "\n".join(parameters)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    kept: list[WeightTransform] = [
        conversion
        for conversion in conversions
        if isinstance(conversion, WeightConverter) and not _quantized(conversion, names)
    ]
    if renamings:
        kept.append(StoredRenaming(renamings, parameters))
    setattr(model, "_weight_conversions", kept)  # noqa: B010  no declared attribute


class StoredRenaming(WeightRenaming):
    """All renamings of a model as one, by which what stands for a weight is renamed as the weight is.

    A pattern ends where a name ends: what matches `proj.weight` does not match `proj.weight_int8`.
    """

    __slots__ = ("names", "renamings")

    def __init__(self, renamings: Sequence[WeightRenaming], names: Iterable[str]):
        """
        Args:
            renamings: applied one after the other.
            names: all that are to be renamed, of which those of codes and the like are told by their endings.
        """
        super().__init__([], [])
        self.renamings = list(renamings)
        names = set(names)
        self.names = {name for name in names if names.intersection(f"{_weight_of(name)}{s}" for s in _CODES)}

    def rename_source_key(self, source_key: str) -> tuple[str, None]:
        weight = _weight_of(source_key) if source_key in self.names else source_key
        return renamed(weight, self.renamings) + source_key.removeprefix(weight), None

    def reverse_transform(self) -> StoredRenaming:
        reversed_parts: Any = [part.reverse_transform() for part in reversed(self.renamings)]
        return StoredRenaming(reversed_parts, self.names)

    def was_used(self) -> bool:
        return any(part.was_used() for part in self.renamings)


def _weight_of(name: str) -> str:
    """The weight that something stands for, by name."""
    suffix = next((suffix for suffix in STORED_SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


def _parts_used(conversion: WeightTransform) -> list[WeightTransform]:
    if isinstance(conversion, StoredRenaming):
        return [part for part in conversion.renamings if part.was_used()]
    return [conversion]


def _quantized(conversion: WeightConverter, names: str) -> bool:
    """Whether something that a conversion gives is quantized, by the names of the model's parameters, one a line.

    What it gives is named by a weight ("experts.gate_up_proj") or by a module ("self_attn.q_proj").
    """
    targets = (target.removesuffix("$") for target in conversion._original_target_patterns)
    return any(re.search(rf"{target}(\.\w+)?_(int8|float16)$", names, re.MULTILINE) for target in targets)
