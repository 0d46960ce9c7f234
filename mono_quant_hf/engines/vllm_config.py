"""What vLLM asks of a checkpoint of this package: which layers are quantized, how, and whether it is undamaged.

The headers of the safetensors files have the last word, as on loading with transformers: a layer of vLLM may stand for
several modules (q, k and v), and each of those may be quantized in a way of its own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.hub.checkpoint import local_folder
from mono_quant_hf.integration.fingerprints import check_fingerprints
from mono_quant_hf.integration.selection import settings_of
from mono_quant_hf.modules.base import DTYPE_NAME, STORAGE_DTYPES
from mono_quant_hf.names import QUANT_METHOD
from mono_quant_hf.weight_files import read_headers, weight_files

from .vllm_layers import CodesMethod, ExpertsMethod, Part

FUSED_EXPERTS = ("gate_up_proj", "down_proj")
"""The stacked weights that experts are stored as."""


@register_quantization_config(QUANT_METHOD)
class MonoQuantVllmConfig(QuantizationConfig):
    """The quantization config of a checkpoint, as vLLM wants one.

    Attributes:
        config: as in config.json.
        stored: `{name of a tensor: its name on disk}`, by the names of the checkpoint and those of vLLM's model.
        shapes: of the tensors, by name on disk.
        claimed: modules that a layer of vLLM stands for.
    """

    def __init__(self, config: MonoQuantConfig):
        super().__init__()
        self.config = config
        self.stored: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.claimed: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MonoQuantVllmConfig:
        return cls(MonoQuantConfig.from_dict(dict(config)))

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # plain operations of torch will do

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the headers of a checkpoint, a folder or a name on the Hub, and compare its checksums.

        Raises:
            HubError: it is neither, or cannot be downloaded.
            FileNotFoundError, ValueError: a file is missing, damaged, or not what was saved with the config.
        """
        folder = local_folder(model_name, revision)
        files = tuple(map(str, weight_files(folder)))
        headers = read_headers(files)
        self.stored = {name: name for name in headers}
        self.shapes = {name: tensor.shape for name, tensor in headers.items()}
        if self.config.checksums is not None:
            times = tuple(Path(file).stat().st_mtime_ns for file in files)
            _compare(files, times, self.config.to_json_string(use_diff=False))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        # Models within models each have a mapper, so that the names before stay too.
        self.stored |= hf_to_vllm_mapper.apply_dict(self.stored)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is computed; None, or vLLM's own, for what is float in the checkpoint."""
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            return None
        if not prefix and isinstance(layer, VocabParallelEmbedding):
            prefix = self._table(layer.org_vocab_size, layer.embedding_dim)
        stem, _, last = prefix.rpartition(".")
        names = [f"{stem}.{part}" if stem else part for part in self.packed_modules_mapping.get(last, [last])]
        parts = [self._part(name, "weight") for name in names]
        if isinstance(layer, ParallelLMHead) and parts == [None]:
            return CodesMethod(prefix, [])  # of what it is tied to, which may be quantized
        if all(part is None or part.weights == "float" for part in parts):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        self.claimed.update(names)
        missing = [name for name, part in zip(names, parts, strict=True) if part is None]
        if missing:
            raise ValueError(
                f"Expected weights of {', '.join(missing)} beside those that vLLM joins to {prefix}, got none in the "
                "checkpoint; save the quantized model again."
            )
        return CodesMethod(prefix, [part for part in parts if part is not None])

    def _experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        experts = prefix.removesuffix(".routed_experts")
        parts = [self._part(experts, name) for name in FUSED_EXPERTS]
        if all(part is None or part.weights == "float" for part in parts):
            return None
        if None in parts or parts[0] != parts[1]:
            raise ValueError(
                f"Expected {' and '.join(FUSED_EXPERTS)} of {experts} to be quantized alike for vLLM, got {parts}; "
                "quantize them alike, or serve the model with transformers."
            )
        self.claimed.add(experts)
        # vLLM finds the stacked weights by these; some models name the weights of single experts otherwise.
        layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name = "gate_proj", "up_proj"
        layer.ckpt_down_proj_name = "down_proj"

        assert parts[0] is not None
        return ExpertsMethod(layer.moe_config, experts, parts[0])

    def _table(self, rows: int, columns: int) -> str:
        """The one table of this shape that the checkpoint holds, as some models of vLLM's do not name theirs."""
        endings = tuple(f".weight_{form}" for form in STORAGE_DTYPES)
        tables = [
            name.rpartition(".")[0]
            for name, disk in self.stored.items()
            if name.endswith(endings) and self.shapes[disk] == (rows, columns) and "head" not in name
        ]
        return tables[0] if len(tables) == 1 else ""

    def _part(self, module: str, weight: str) -> Part | None:
        """How the weight of a module is stored; None where it is not in the checkpoint."""
        name = f"{module}.{weight}"
        for form in STORAGE_DTYPES:
            if (key := f"{name}_{form}") in self.stored:
                on_disk = self.stored[key].removesuffix(f".{weight}_{form}")
                activations = self._settings(on_disk)["activations"] if form == "int8" else None
                return Part(form, f"{name}_zero_point" in self.stored, activations)
        return Part("float") if name in self.stored else None

    @functools.cached_property
    def _settings(self) -> Any:
        return settings_of(self.config, nn.Module())

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """What vLLM's loader is to leave out; asked for when all layers are made.

        Raises:
            ValueError: no layer stands for a quantized module.
        """
        if get_pp_group().world_size == 1:  # else each stage has some of the layers
            self._refuse_unclaimed()
        return WeightsMapper(orig_to_new_suffix={f".{DTYPE_NAME}": None})

    def _refuse_unclaimed(self) -> None:
        claimed = {self._on_disk(module) for module in self.claimed}
        for key in self.stored.values():
            form = next((form for form in STORAGE_DTYPES if key.endswith(f"_{form}")), None)
            if form is not None and key.rpartition(".")[0] not in claimed:
                raise ValueError(
                    f"Expected a layer of vLLM's model that takes the quantized weights of {key.rpartition('.')[0]}, "
                    "got none; leave that module in float (modules_to_not_convert, or quantize_embeddings=False), or "
                    "serve the model with transformers."
                )

    def _on_disk(self, module: str) -> str:
        names = (disk for name, disk in self.stored.items() if name.startswith(f"{module}."))
        return next(names).rpartition(".")[0]


@functools.lru_cache(maxsize=4)
def _compare(files: Sequence[str], times: Sequence[int], config: str) -> None:
    """Compare checksums, once for files that are the same: vLLM makes its config several times."""
    check_fingerprints(files, MonoQuantConfig.from_dict(json.loads(config)), ())
