"""The int8 format of bitsandbytes (LLM.int8): `weight` int8, `SCB` = absmax of every row, `weight_format` 0."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mono_quant_hf.modules import QuantizedConv1DProjection, QuantizedLinear, QuantizedModule

from .errors import HubError
from .exporting import float_linears, load_quantized, notice, rewritten, save_as
from .folders import check_destination

ROW_MAJOR = 0
"""The only `weight_format` that bitsandbytes still writes."""


def export_bitsandbytes(
    model: PreTrainedModel | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model quantized by mono_quant_hf, symmetric, as transformers loads it with bitsandbytes.

    The weights are the same, so nothing is rounded again. bitsandbytes also rounds activations to int8 while it runs
    (Dettmers et al. 2022, "LLM.int8()"), which mono_quant_hf does not: its logits differ by that.

    Args:
        model: the model, or its folder or name on the Hub.
        destination: a folder, written whole or not at all.
        tokenizer: saved along; a folder brings its own.
        overwrite: replace a checkpoint that this package wrote.
        max_shard_size: where to split the weights.

    Raises:
        HubError: the model is not quantized by mono_quant_hf, weights have zero-points, no Linear is int8, or the
            destination is taken.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from transformers import BertConfig, BertModel
        >>> from mono_quant_hf import MonoQuantConfig, quantize_model
        >>> config = BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=32)
        >>> model = quantize_model(BertModel(config), MonoQuantConfig(symmetric=True))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_bitsandbytes(model, f"{folder}/exported")
        ...     written = json.loads(Path(folder, "exported", "config.json").read_text())
        >>> written["quantization_config"]["load_in_8bit"]
        True
    """
    check_destination(destination, overwrite, model)
    source: Path | None = None
    if not isinstance(model, PreTrainedModel):
        model, source = load_quantized(model)
    targets = {name: module for name, module in model.named_modules() if _is_target(module)}
    asymmetric = [name for name, module in targets.items() if not module.quantization.symmetric]
    if asymmetric:
        raise HubError(
            f"{asymmetric[0]} and {len(asymmetric) - 1} other modules have zero-points, for which bitsandbytes has no "
            "place; quantize the float model with MonoQuantConfig(symmetric=True)."
        )
    if not targets:
        raise HubError(
            "No Linear of the model is int8, so there is nothing to export; float16 needs no export."
        )

    def rewrite(name: str, module: QuantizedModule) -> dict[str, Tensor] | None:
        if not _is_target(module):
            return None
        codes, scale = module.get_parameter("weight").detach(), module.get_parameter("weight_scale").detach()
        if isinstance(module, QuantizedConv1DProjection):  # stored [in, out]
            codes = codes.T.contiguous()
        return {
            "weight": codes,
            "SCB": scale.flatten() * 127,
            "weight_format": torch.tensor(ROW_MAJOR, dtype=torch.uint8),
        }

    result = rewritten(model, rewrite)
    notice(result, "bitsandbytes")
    skip = float_linears(model, result.quantized, (nn.Linear, Conv1D))
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip).to_dict()
    save_as(
        model,
        result,
        settings,
        destination,
        source=source,
        tokenizer=tokenizer,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )


def _is_target(module: nn.Module) -> bool:
    if not isinstance(module, (QuantizedLinear, QuantizedConv1DProjection)):
        return False
    known = module.quantization.float_class is nn.Linear or isinstance(module, QuantizedConv1DProjection)
    return known and module.quantization.weights == "int8"
