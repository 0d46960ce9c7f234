"""`resize_token_embeddings` for models whose embeddings are quantized."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mono_quant_hf.modules import QuantizedModule, quantized_class_for
from mono_quant_hf.modules.base import DTYPE_NAME, twin_of

from .tying import (
    declare_tied_storage,
    input_embeddings_and_heads,
    share_storage,
    tied_modules,
    withdraw_tied_storage,
)


def make_resizable(model: PreTrainedModel) -> None:
    """Let a model with quantized embeddings resize them.

    transformers would copy rows into the table that it makes, and has no hook to do it otherwise; so the method of this
    one model is replaced.
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
    old = {name: twin_of(module) for name, module in quantized_tables(model).items()}
    for name, module in old.items():
        if hasattr(module, "_hf_hook") or module.stored()[0].is_meta:
            raise ValueError(
                f"{name} is offloaded or its model spread over devices; load the model without a device_map to "
                "resize its embeddings."
            )
    groups = [group for group in tied_modules(model) if set(group).intersection(old)]
    for module in quantized_tables(model).values():
        module.dequantize()
    withdraw_tied_storage(model)
    type(model).resize_token_embeddings(model, *args, **kwargs)
    for name, before in old.items():
        _quantize_again(model.get_submodule(name), name, before)
    share_storage(model, groups)
    declare_tied_storage(model)
    return model.get_input_embeddings()


def _quantize_again(module: nn.Module, name: str, before: QuantizedModule) -> None:
    settings, quantized_class = before.quantization, quantized_class_for(module)
    assert quantized_class is not None
    table = quantized_class.quantize(
        module, settings.weights, settings.symmetric, name, activations=settings.activations
    )
    for key in before.storage_names():
        new, kept = table.get_parameter(key), before.get_parameter(key)
        rows = min(len(new), len(kept))
        with torch.no_grad():
            new[:rows] = kept[:rows]
    table.note_versions()
    if DTYPE_NAME in before._parameters:
        table.say_dtype()
