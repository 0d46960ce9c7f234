"""The format of compressed-tensors, which vLLM, SGLang and transformers serve.

Symmetric int8 weights are written as `pack-quantized` (W8A16): four codes, each plus 128, in an int32, the first in
the lowest byte. With int8 activations, or with zero-points, they are written as `int-quantized`, whose tensors are
those of mono_quant_hf itself. The codes and scales are the same, so nothing is rounded again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mono_quant_hf.hub.errors import HubError
from mono_quant_hf.modules import QuantizedLinear, QuantizedModule
from mono_quant_hf.modules.experts import expert_weights

from .exporter import CheckpointExporter

logger = logging.getLogger("mono_quant_hf")

PACK_QUANTIZED, INT_QUANTIZED = "pack-quantized", "int-quantized"


class CompressedTensorsExporter(CheckpointExporter):
    """Writes int8 Linears. vLLM and SGLang serve symmetric weights only, which is said."""

    engine = "compressed-tensors"
    takes = ("activations",)
    symmetric = True

    @property
    def format(self) -> str:
        return PACK_QUANTIZED if self.symmetric and self.activations is None else INT_QUANTIZED

    def is_target(self, module: nn.Module) -> bool:
        return (
            isinstance(module, QuantizedLinear)
            and module.quantization.weights == "int8"
            and module.quantization.float_class is nn.Linear
        )

    def check(self, targets: Mapping[str, QuantizedModule]) -> None:
        recorded = getattr(self.model.config, "quantization_config", None)
        self.activations = self.activations or getattr(recorded, "activations", None)
        if self.activations not in (None, "int8"):
            raise HubError(f"activations={self.activations!r} cannot be exported; choose None or 'int8'.")
        experts = next((name for name, module in self.model.named_modules() if _holds_experts(module)), None)
        if experts is not None:
            raise HubError(
                f"{experts} holds the weights of several experts in one tensor, which this export cannot write in a "
                "form that other engines load; serve the model with transformers and mono_quant_hf."
            )
        self.symmetric = all(module.quantization.symmetric for module in targets.values())
        if not self.symmetric:
            logger.warning(
                "The weights have zero-points: transformers reads this export, vLLM and SGLang serve symmetric "
                "weights only (MonoQuantConfig(symmetric=True))."
            )

    def tensors_of(self, module: QuantizedModule) -> dict[str, Tensor]:
        codes, scale, zero_point = (None if t is None else t.detach() for t in module.stored())
        assert codes is not None and scale is not None
        if self.format == PACK_QUANTIZED:
            shape = torch.tensor(codes.shape, dtype=torch.int64)
            return {"weight_packed": pack(codes), "weight_scale": scale, "weight_shape": shape}
        tensors = {"weight": codes, "weight_scale": scale}
        if not self.symmetric:
            none = torch.zeros_like(scale, dtype=torch.int8)
            tensors["weight_zero_point"] = none if zero_point is None else zero_point
        return tensors

    def settings(self, skeleton: PreTrainedModel, left: list[str]) -> dict[str, Any]:
        names: list[
            str
        ] = []  # as the checkpoint has them, which other engines go by, and as the model has them
        for name in left:
            saved = revert_weight_conversion(skeleton, {f"{name}.weight": torch.zeros(1)})
            names += [*(key.removesuffix(".weight") for key in saved), name]
        ignore = list(dict.fromkeys(names))
        return quantization_config(self.format, self.symmetric, self.activations, ignore)


def _holds_experts(module: nn.Module) -> bool:
    if isinstance(module, QuantizedModule):
        weights = () if isinstance(module, nn.Conv1d) else module.weight_axes
        return any(module.stored(name)[0].dim() == 3 for name in weights)
    return bool(expert_weights(module))


def pack(codes: Tensor) -> Tensor:
    """int8 codes [out, in] as int32 [out, ceil(in / 4)]: code + 128 in each byte, the first in the lowest.

    Example:
        >>> pack(torch.tensor([[-128, -127, 0, 127, 1]], dtype=torch.int8)).tolist()
        [[-8388352, 129]]
    """
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
    unsigned = nn.functional.pad(unsigned, (0, -codes.shape[1] % 4))
    words = unsigned.reshape(codes.shape[0], -1, 4).to(torch.int32)
    return words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16 | words[..., 3] << 24


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The int8 codes of `shape` in what `pack` made.

    Example:
        >>> codes = torch.tensor([[-128, -127, 0, 127, 1]], dtype=torch.int8)
        >>> bool((unpack(pack(codes), (1, 5)) == codes).all())
        True
    """
    parts = [(packed >> shift & 0xFF) for shift in (0, 8, 16, 24)]
    unsigned = torch.stack(parts, dim=-1).flatten(1)[:, : shape[1]]
    return (unsigned - 128).to(torch.int8)


def quantization_config(
    format: str, symmetric: bool, activations: str | None, ignore: list[str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json, as compressed-tensors reads it."""
    scheme = {"num_bits": 8, "type": "int", "group_size": None, "block_structure": None, "actorder": None}
    per_token = {"symmetric": True, "strategy": "token", "dynamic": True, "observer": None}
    group = {
        "targets": ["Linear"],
        "weights": {
            **scheme,
            "symmetric": symmetric,
            "strategy": "channel",
            "dynamic": False,
            "observer": "minmax",
            "observer_kwargs": {},
        },
        "input_activations": {**scheme, **per_token, "observer_kwargs": {}} if activations else None,
        "output_activations": None,
        "format": format,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
