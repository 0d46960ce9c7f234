"""The operations that transformers' checkpoint loader runs on the tensors of quantized modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from mono_quant_hf.modules import QuantizedModule

from .checkpoint import COMPANIONS, Checkpoint, StoredTensor

if TYPE_CHECKING:
    from .quantizer import MonoQuantHfQuantizer


class PassThrough(ConversionOps):
    """Changes nothing, but is an operation: the loader then writes the tensors of disk-offloaded modules anew.

    For a parameter without operations the loader points the offload index at the checkpoint, where it is still
    float; the codes made of it would be forgotten.
    """

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        return {target_patterns[0]: next(iter(input_dict.values()))}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class QuantizeWeights(ConversionOps):
    """Turns each float weight, as it comes from the checkpoint, into codes, scale and zero-point."""

    def __init__(self, hf_quantizer: MonoQuantHfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: torch.nn.Module,
        source_patterns: Sequence[str] = (),
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
            module_name, _, parameter_name = name.rpartition(".")
            module = model.get_submodule(module_name)
            if isinstance(module, QuantizedModule) and parameter_name in module.weight_axes:
                shape = module.get_parameter(parameter_name).shape
                if tensor.dim() == len(shape) and tensor.shape[1:] == shape[1:] and tensor.shape != shape:
                    # A head for other labels: the loader refuses it, or with ignore_mismatched_sizes makes a new one.
                    self.hf_quantizer.other_rows.add(name)
                    converted[name] = tensor
                    continue
                try:
                    tensors = module.quantized_tensors(parameter_name, tensor)
                except ValueError as problem:
                    # The loader would bury it in a report with a traceback; the quantizer raises it after loading.
                    self.hf_quantizer.problems.append(str(problem))
                    tensors = {
                        key: torch.zeros_like(module.get_parameter(key), device=tensor.device)
                        for key in module.storage_names()
                    }
                self.hf_quantizer.quantized_modules.add(module_name)
                converted |= {f"{module_name}.{key}": value for key, value in tensors.items()}
            else:
                converted[name] = tensor.to(model.get_parameter(name).dtype)
        return converted

    @property
    def reverse_op(self) -> ConversionOps:
        return PassThrough()


def checkpoint_of(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> Checkpoint:
    """What the tensors of a checkpoint become in a model, by the renamings and conversions of the model's own.

    Args:
        model: float or quantized, such as on the meta device.
        stored: by name on disk.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    own = model.state_dict()

    def targets(name: str) -> tuple[list[str], bool]:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if pattern is None or (renamed not in own and name in own):
            return [renamed if renamed in own or name not in own else name], False
        first, *others = by_pattern[pattern].target_patterns
        return [renamed, *(renamed.replace(first, other) for other in others)], True

    sources: dict[str, list[str]] = {}
    converted = set()
    for name in stored:
        found, is_converted = targets(name)
        suffix = next((s for s in COMPANIONS if name.endswith(s)), "")
        if suffix and found[0] not in own:  # of a weight, and goes where it goes
            found, is_converted = targets(name.removesuffix(suffix))
            found = [target + suffix for target in found]
        for target in found:
            sources.setdefault(target, []).append(name)
        if is_converted:
            converted.add(name)
    return Checkpoint(stored, sources, frozenset(converted))


def look_up_conversions(model: PreTrainedModel) -> None:
    """Give a model that no checkpoint was loaded into the conversions that `save_pretrained` would look up itself.

    They can then be changed to take scales and zero-points along (`MonoQuantHfQuantizer.restore_conversions`).
    """
    if getattr(model, "_weight_conversions", None) is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        kept = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
        setattr(model, "_weight_conversions", kept)  # noqa: B010  no declared attribute
