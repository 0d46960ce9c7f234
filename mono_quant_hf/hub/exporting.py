"""A quantized model as a checkpoint that other engines read."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mono_quant_hf.config import QUANT_METHOD
from mono_quant_hf.files import check_room
from mono_quant_hf.modules import QuantizedModule

from .errors import HubError
from .folders import copy_companions, written_beside
from .opening import model_of, quantization_of
from .sources import local_folder

logger = logging.getLogger("mono_quant_hf")

Rewrite = Callable[[str, QuantizedModule], dict[str, Tensor] | None]
"""Name and module to the tensors that stand for its weights, named within the module; None: written in float."""


@dataclass(frozen=True)
class Rewritten:
    """A model's tensors for another format.

    Attributes:
        tensors: by the names of the model's own state dict.
        quantized: names of the modules whose codes are in it.
        as_float: names of the modules that are quantized here and float there, with their class.
    """

    tensors: dict[str, Tensor]
    quantized: list[str]
    as_float: dict[str, str]


def load_quantized(
    source: str | os.PathLike[str], revision: str | None = None
) -> tuple[PreTrainedModel, Path]:
    """A model quantized by mono_quant_hf, from a folder or the Hub, and its folder.

    Raises:
        HubError, ValueError: it is not one, or a file of it is damaged.
    """
    folder = local_folder(source, revision)
    method = (quantization_of(folder) or {}).get("quant_method")
    if method != QUANT_METHOD:
        raise HubError(
            f"The model in {folder} is {f'quantized by {method}' if method else 'float'}, not quantized by "
            "mono_quant_hf; quantize it first (mono-quant-hf quantize)."
        )
    return model_of(folder), folder


def rewritten(model: PreTrainedModel, rewrite: Rewrite) -> Rewritten:
    """The tensors of a model, those of its quantized modules replaced by what `rewrite` makes of them.

    Raises:
        HubError: the model holds no quantized module, or is offloaded.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    if not modules:
        raise HubError(f"{type(model).__name__} is not quantized by mono_quant_hf; quantize it first.")
    tensors: dict[str, Tensor] = dict(model.state_dict())
    if any(tensor.is_meta for tensor in tensors.values()):
        raise HubError("The model is offloaded; load it without a device_map to export it.")
    dtype = model.dtype
    done: list[str] = []
    as_float: dict[str, str] = {}
    shared: dict[int, Tensor] = {}
    tied = _storages_of_several(modules.values())
    for name, module in modules.items():
        # Its bias stays; buffers are its own, the float module has none.
        for key in [*module.storage_names(), *module._buffers]:
            tensors.pop(f"{name}.{key}", None)
        # A head that is tied to an embedding would be tied to codes there.
        is_tied = any(module.get_parameter(key).data_ptr() in tied for key in module.weight_axes)
        new = None if is_tied else rewrite(name, module)
        if new is None:
            as_float[name] = module.quantization.float_class.__name__
            new = {}
            for key in module.weight_axes:
                # Tied weights stay one tensor, so that they are written once.
                stored = module.get_parameter(key)
                if stored.data_ptr() not in shared:
                    shared[stored.data_ptr()] = module.dequantized(key, dtype)
                new[key] = shared[stored.data_ptr()]
        else:
            done.append(name)
        tensors |= {f"{name}.{key}": tensor for key, tensor in new.items()}
    return Rewritten(tensors, done, as_float)


def _storages_of_several(modules: Iterable[QuantizedModule]) -> set[int]:
    """Addresses of the weights that more than one module holds."""
    counts = Counter(module.get_parameter(key).data_ptr() for module in modules for key in module.weight_axes)
    return {address for address, count in counts.items() if count > 1}


def float_linears(
    model: PreTrainedModel, exported: list[str], kinds: tuple[type[nn.Module], ...]
) -> list[str]:
    """Names of the modules of the given kinds that are float in the export."""
    names = []
    for name, module in model.named_modules():
        kind = module.quantization.float_class if isinstance(module, QuantizedModule) else type(module)
        if issubclass(kind, kinds) and name not in exported:
            names.append(name)
    return names


def notice(result: Rewritten, target: str) -> None:
    """Say which quantized modules are float in the export."""
    if not result.as_float:
        return
    kinds = sorted(set(result.as_float.values()))
    logger.warning(
        "%s has no form for %d quantized modules (%s), such as %s: they are written in float.",
        target,
        len(result.as_float),
        ", ".join(kinds),
        next(iter(result.as_float)),
    )


def save_as(
    model: PreTrainedModel,
    result: Rewritten,
    quantization_config: dict[str, Any],
    destination: str | os.PathLike[str],
    *,
    source: Path | None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the tensors with the model's own config and another quantization config, whole or not at all."""
    skeleton = skeleton_like(model)
    skeleton.config.quantization_config = quantization_config
    check_room(destination, sum(tensor.nbytes for tensor in result.tensors.values()), "The export")
    with written_beside(destination, overwrite, source) as folder:
        # The skeleton is float and so saves like any model, with the conversions to names on disk.
        skeleton.save_pretrained(folder, state_dict=result.tensors, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if source is not None:
            copy_companions(source, folder)


def skeleton_like(model: PreTrainedModel) -> PreTrainedModel:
    """The float model of the same class and config on the meta device."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(config)
    nn.Module.to(skeleton, dtype=model.dtype)
    if model.can_generate():
        skeleton.generation_config = model.generation_config
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        skeleton._weight_conversions = conversions
    return skeleton
