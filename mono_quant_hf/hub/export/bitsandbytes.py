"""The int8 format of bitsandbytes (LLM.int8): `weight` int8, `SCB` = absmax of every row, `weight_format` 0.

The weights are the same, so nothing is rounded again. bitsandbytes also rounds activations to int8 while it runs
(Dettmers et al. 2022, "LLM.int8()"), which mono_quant_hf does not: its logits differ by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mono_quant_hf.hub.errors import HubError
from mono_quant_hf.modules import QuantizedConv1DProjection, QuantizedLinear, QuantizedModule

from .exporter import CheckpointExporter

ROW_MAJOR = 0
"""The only `weight_format` that bitsandbytes still writes."""


class BitsAndBytesExporter(CheckpointExporter):
    """Writes symmetric int8 Linears and `Conv1D`s as transformers loads them with bitsandbytes."""

    engine = "bitsandbytes"
    linear_classes = (nn.Linear, Conv1D)

    def is_target(self, module: nn.Module) -> bool:
        return (
            isinstance(module, (QuantizedLinear, QuantizedConv1DProjection))
            and module.quantization.float_class in self.linear_classes
            and module.quantization.weights == "int8"
        )

    def check(self, targets: Mapping[str, QuantizedModule]) -> None:
        asymmetric = [name for name, module in targets.items() if not module.quantization.symmetric]
        if asymmetric:
            raise HubError(
                f"{asymmetric[0]} and {len(asymmetric) - 1} other modules have zero-points, for which bitsandbytes "
                "has no place; quantize the float model with MonoQuantConfig(symmetric=True)."
            )

    def tensors_of(self, module: QuantizedModule) -> dict[str, Tensor]:
        codes, scale = (module.get_parameter(name).detach() for name in module.storage_names())
        if isinstance(module, QuantizedConv1DProjection):  # stored [in, out]
            codes = codes.T.contiguous()
        return {
            "weight": codes,
            "SCB": scale.flatten() * 127,
            "weight_format": torch.tensor(ROW_MAJOR, dtype=torch.uint8),
        }

    def settings(self, skeleton: PreTrainedModel, left: list[str]) -> dict[str, Any]:
        return dict(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left).to_dict())
