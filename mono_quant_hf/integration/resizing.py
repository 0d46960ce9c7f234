"""`resize_token_embeddings` for models whose embeddings are quantized."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mono_quant_hf.modules import QuantizedModule, quantized_class_for

from .replacement import replace_modules
from .tying import (
    declare_tied_companions,
    input_embeddings_and_heads,
    share_storage,
    tied_modules,
    withdraw_tied_companions,
)


def make_resizable(model: PreTrainedModel) -> None:
    """Let a model with quantized embeddings resize them.

    transformers would make a new table of the dtype of the old one, which holds codes, and has no hook to do it
    otherwise; so the method of this one model is replaced.
    """
    if quantized_tables(model):
        vars(model)["resize_token_embeddings"] = functools.partial(resize_token_embeddings, model)


def undo_resizable(model: PreTrainedModel) -> None:
    """Give a model that is float again the method of its class."""
    vars(model).pop("resize_token_embeddings", None)


def quantized_tables(model: PreTrainedModel) -> dict[str, QuantizedModule]:
    """The quantized input embeddings and output heads by name, if the embeddings are among them."""
    named = {name: model.get_submodule(name) for name in sorted(input_embeddings_and_heads(model))}
    quantized = {name: module for name, module in named.items() if isinstance(module, QuantizedModule)}
    has_table = any(isinstance(module, nn.Embedding) for module in quantized.values())
    return quantized if has_table else {}


def resize_token_embeddings(model: PreTrainedModel, *args: Any, **kwargs: Any) -> nn.Module:
    """`PreTrainedModel.resize_token_embeddings` on the float tables, which are quantized again.

    The rows that were there keep their codes, scales and zero-points to the bit.

    Args:
        model: with quantized embeddings, not offloaded.
        args, kwargs: as for the method; so is the result.

    Raises:
        ValueError: the embeddings are offloaded.
    """
    old = quantized_tables(model)
    for name, module in old.items():
        if hasattr(module, "_hf_hook") or module.get_parameter("weight").is_meta:
            raise ValueError(
                f"{name} is offloaded or its model spread over devices; load the model without a device_map to "
                "resize its embeddings."
            )
    dtype = next(m.get_parameter("vector_dtype").dtype for m in old.values() if isinstance(m, nn.Embedding))
    groups = [group for group in tied_modules(model) if set(group).intersection(old)]
    replace_modules(model, {name: functools.partial(_float_of, old[name], dtype) for name in old})
    withdraw_tied_companions(model)
    type(model).resize_token_embeddings(model, *args, **kwargs)

    def quantize_again(name: str) -> Any:
        def make(module: nn.Module) -> nn.Module:
            before, settings = old[name], old[name].quantization
            quantized_class = quantized_class_for(module)
            assert quantized_class is not None
            twin = quantized_class.from_float(
                module, settings.weights, settings.symmetric, name, activations=settings.activations
            )
            with torch.no_grad():
                for key in before.storage_names():
                    new, kept = twin.get_parameter(key), before.get_parameter(key)
                    rows = min(len(new), len(kept))
                    new[:rows] = kept[:rows]
            return twin

        return make

    replace_modules(model, {name: quantize_again(name) for name in old})
    share_storage(model, groups)
    declare_tied_companions(model)
    return model.get_input_embeddings()


def _float_of(quantized: QuantizedModule, dtype: torch.dtype, _: nn.Module) -> nn.Module:
    return quantized.to_float(dtype)
