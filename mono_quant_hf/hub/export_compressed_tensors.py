"""The format of compressed-tensors, which vLLM, SGLang and transformers serve.

Symmetric int8 weights are written as `pack-quantized` (W8A16): four codes, each plus 128, in an int32, the first in
the lowest byte. With int8 activations, or with zero-points, they are written as `int-quantized`, whose tensors are
those of mono_quant_hf itself.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mono_quant_hf.modules import QuantizedExperts, QuantizedLinear, QuantizedModule, quantized_class_for

from .errors import HubError
from .exporting import float_linears, load_quantized, notice, rewritten, save_as, skeleton_like
from .folders import check_destination

logger = logging.getLogger("mono_quant_hf")

PACK_QUANTIZED, INT_QUANTIZED = "pack-quantized", "int-quantized"


def export_compressed_tensors(
    model: PreTrainedModel | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    activations: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model quantized by mono_quant_hf in the format of compressed-tensors.

    The codes and scales are the same, so nothing is rounded again. What has no form there (convolutions, embeddings,
    float16 weights) is written in float, with a notice. vLLM and SGLang serve symmetric weights only.

    Args:
        model: the model, or its folder or name on the Hub.
        destination: a folder, written whole or not at all.
        activations: `"int8"` has the engine quantize activations to int8, per token, while it runs; None: what the
            model's config says.
        tokenizer: saved along; a folder brings its own.
        overwrite: replace a checkpoint that this package wrote.
        max_shard_size: where to split the weights.

    Raises:
        HubError: the model is not quantized by mono_quant_hf, has experts in stacked tensors, no Linear of it is
            int8, or the destination is taken.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from transformers import BertConfig, BertModel
        >>> from mono_quant_hf import MonoQuantConfig, quantize_model
        >>> config = BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=32)
        >>> model = quantize_model(BertModel(config), MonoQuantConfig(symmetric=True))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_compressed_tensors(model, f"{folder}/exported", activations="int8")
        ...     written = json.loads(Path(folder, "exported", "config.json").read_text())
        >>> written["quantization_config"]["format"]
        'int-quantized'
    """
    check_destination(destination, overwrite, model)
    source: Path | None = None
    if not isinstance(model, PreTrainedModel):
        model, source = load_quantized(model)
    config: Any = model.config.quantization_config
    activations = activations or getattr(config, "activations", None)
    if activations not in (None, "int8"):
        raise HubError(f"activations={activations!r} cannot be exported; choose None or 'int8'.")
    experts = [name for name, module in model.named_modules() if _holds_experts(module)]
    if experts:
        raise HubError(
            f"{experts[0]} holds the weights of several experts in one tensor, which this export cannot write in a "
            "form that other engines load; serve the model with transformers and mono_quant_hf."
        )
    linears = [module for _, module in model.named_modules() if _is_target(module)]
    if not linears:
        raise HubError(
            "No Linear of the model is int8, so there is nothing to export; float16 needs no export."
        )
    symmetric = all(module.quantization.symmetric for module in linears)
    format = PACK_QUANTIZED if symmetric and activations is None else INT_QUANTIZED
    if not symmetric:
        logger.warning(
            "The weights have zero-points: transformers reads this export, vLLM and SGLang serve symmetric weights "
            "only (MonoQuantConfig(symmetric=True))."
        )

    def rewrite(name: str, module: QuantizedModule) -> dict[str, Tensor] | None:
        if not _is_target(module):
            return None
        codes, scale = module.get_parameter("weight").detach(), module.get_parameter("weight_scale").detach()
        if format == PACK_QUANTIZED:
            shape = torch.tensor(codes.shape, dtype=torch.int64)
            return {"weight_packed": pack(codes), "weight_scale": scale, "weight_shape": shape}
        tensors = {"weight": codes, "weight_scale": scale}
        if not symmetric:
            zero_point = module.weight_zero_point
            tensors["weight_zero_point"] = (
                torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point.detach()
            )
        return tensors

    result = rewritten(model, rewrite)
    notice(result, "compressed-tensors")
    left = float_linears(model, result.quantized, (nn.Linear,))
    save_as(
        model,
        result,
        quantization_config(format, symmetric, activations, _with_checkpoint_names(model, left)),
        destination,
        source=source,
        tokenizer=tokenizer,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )


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


def _is_target(module: nn.Module) -> bool:
    return (
        isinstance(module, QuantizedLinear)
        and module.quantization.weights == "int8"
        and module.quantization.float_class is nn.Linear
    )


def _holds_experts(module: nn.Module) -> bool:
    quantized_class = quantized_class_for(module)
    return isinstance(module, QuantizedExperts) or (
        quantized_class is not None and issubclass(quantized_class, QuantizedExperts)
    )


def _with_checkpoint_names(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The names as the checkpoint has them, which other engines go by, and as the model has them."""
    skeleton = skeleton_like(model)
    all_names: list[str] = []
    for name in names:
        saved = revert_weight_conversion(skeleton, {f"{name}.weight": torch.zeros(1)})
        all_names += [key.removesuffix(".weight") for key in saved]
        all_names.append(name)
    return list(dict.fromkeys(all_names))
