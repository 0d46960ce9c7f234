"""What all exports have in common: a model opened and checked, its weights rewritten, all of it written or nothing."""

from __future__ import annotations

import copy
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mono_quant_hf.files import check_room
from mono_quant_hf.hub.checkpoint import quantized_model_of
from mono_quant_hf.hub.errors import HubError
from mono_quant_hf.hub.folders import check_destination, copy_companions, written_beside
from mono_quant_hf.modules import QuantizedModule
from mono_quant_hf.modules.base import DTYPE_NAME

logger = logging.getLogger("mono_quant_hf")


@dataclass
class Exporter(ABC):
    """One export. Each format is a subclass, which says what it refuses and how it is written.

    Attributes:
        model: the model, or its folder or name on the Hub; opened by `run`.
        destination, activations, tokenizer, overwrite, max_shard_size, inputs: as in `export`.
        source: the folder of the model, if it came from one.
        takes: the options that not every format has.
    """

    model: Any
    destination: str | os.PathLike[str]
    activations: str | None = None
    tokenizer: Any = None
    overwrite: bool = False
    max_shard_size: int | str = "5GB"
    inputs: dict[str, Tensor] | None = None
    source: Path | None = None
    takes: ClassVar[tuple[str, ...]] = ()

    def run(self) -> None:
        """Export; a destination that is taken is refused before the model is loaded."""
        self.check_destination()
        if not isinstance(self.model, PreTrainedModel):
            self.model, self.source = quantized_model_of(self.model)
        if not any(isinstance(module, QuantizedModule) for module in self.model.modules()):
            raise HubError(
                f"{type(self.model).__name__} is not quantized by mono_quant_hf; quantize it first."
            )
        if any(tensor.is_meta for tensor in self.model.state_dict().values()):
            raise HubError("The model is offloaded; load it without a device_map to export it.")
        self.write()

    def check_destination(self) -> None:
        """Refuse a destination that is taken."""
        check_destination(self.destination, self.overwrite, self.model)

    @abstractmethod
    def write(self) -> None:
        """Write the model, which is a quantized one in memory."""

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder that becomes the destination, with the tokenizer and what else belongs to the model."""
        with written_beside(self.destination, self.overwrite, self.source) as folder:
            yield folder
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if self.source is not None:
                copy_companions(self.source, folder)


class CheckpointExporter(Exporter):
    """An export to a folder of safetensors with another quantization config, and other tensors for some modules."""

    engine: ClassVar[str]
    """For messages."""
    linear_classes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    """What the engine takes for quantized unless the config says otherwise."""

    @abstractmethod
    def is_target(self, module: nn.Module) -> bool:
        """Whether a module has a form in this format; what has none is written in float."""

    @abstractmethod
    def check(self, targets: Mapping[str, QuantizedModule]) -> None:
        """Refuse, with a HubError, what the format cannot hold; `targets` by name."""

    @abstractmethod
    def tensors_of(self, module: QuantizedModule) -> dict[str, Tensor]:
        """What stands for the weights of a target, named within the module."""

    @abstractmethod
    def settings(self, skeleton: PreTrainedModel, left: list[str]) -> dict[str, Any]:
        """The `quantization_config`; `left` are the linear modules that are float, `skeleton` is the float model."""

    def write(self) -> None:
        targets: dict[str, Any] = {n: m for n, m in self.model.named_modules() if self.is_target(m)}
        self.check(targets)
        if not targets:
            raise HubError(
                "No Linear of the model is int8, so there is nothing to export; float16 needs no export."
            )
        tensors, as_float = self._rewritten()
        left = [
            name
            for name, module in self.model.named_modules()
            if issubclass(_float_class(module), self.linear_classes)
            and (name in as_float or name not in targets)
        ]
        skeleton = skeleton_like(self.model)
        skeleton.config.quantization_config = self.settings(skeleton, left)
        check_room(self.destination, sum(tensor.nbytes for tensor in tensors.values()), "The export")
        with self.folder() as folder:
            # The skeleton is float and so saves like any model, with the conversions to names on disk.
            skeleton.save_pretrained(folder, state_dict=tensors, max_shard_size=self.max_shard_size)

    def _rewritten(self) -> tuple[dict[str, Tensor], list[str]]:
        """All tensors by the model's own names, and the names of the quantized modules that are float in them."""
        modules = {n: m for n, m in self.model.named_modules() if isinstance(m, QuantizedModule)}
        tensors: dict[str, Tensor] = dict(self.model.state_dict())
        weights = {
            name: {key: module.stored(key)[0].data_ptr() for key in module.weight_axes}
            for name, module in modules.items()
        }
        holders = Counter(address for held in weights.values() for address in held.values())
        floats: dict[int, Tensor] = {}  # tied weights stay one tensor, so that they are written once
        as_float: list[str] = []
        for name, module in modules.items():
            # Its bias stays; buffers are its own, the float module has none.
            for key in [*module.storage_names(), DTYPE_NAME, *module._buffers]:
                tensors.pop(f"{name}.{key}", None)
            # A head that is tied to an embedding would be tied to codes there.
            if self.is_target(module) and all(holders[address] == 1 for address in weights[name].values()):
                new = self.tensors_of(module)
            else:
                as_float.append(name)
                for key, address in weights[name].items():
                    if address not in floats:
                        floats[address] = module.dequantized(key, self.model.dtype)
                new = {key: floats[address] for key, address in weights[name].items()}
            tensors |= {f"{name}.{key}": tensor for key, tensor in new.items()}
        if as_float:
            logger.warning(
                "%s has no form for %d quantized modules (%s), such as %s: they are written in float.",
                self.engine,
                len(as_float),
                ", ".join(sorted({_float_class(modules[name]).__name__ for name in as_float})),
                as_float[0],
            )
        return tensors, as_float


def _float_class(module: nn.Module) -> type[nn.Module]:
    return module.quantization.float_class if isinstance(module, QuantizedModule) else type(module)


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
