"""What the family matrix and its table measure on a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mono_quant_hf.core import dequantize_codes, quantize_to_codes
from mono_quant_hf.integration import Decision
from mono_quant_hf.modules import quantized_class_for


def outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Every floating-point tensor that a forward returns."""
    torch.manual_seed(0)
    with torch.no_grad():
        return list(_tensors(model(**inputs, return_dict=True)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def relative_error(reference: list[Tensor], found: list[Tensor]) -> float:
    """The largest `|found - reference| / |reference|` (2-norms) over pairs of tensors."""
    assert [t.shape for t in reference] == [t.shape for t in found]
    pairs = zip(reference, found, strict=True)
    return max(float((b.double() - a.double()).norm() / a.double().norm().clamp(min=1e-9)) for a, b in pairs)


def dequantized_by_hand(model: PreTrainedModel, decisions: list[Decision]) -> PreTrainedModel:
    """A copy of a float model with the weights that core's codes stand for, and no quantized module in it."""
    twin = copy.deepcopy(model)
    for decision in decisions:
        if not decision.quantized:
            continue
        module = twin.get_submodule(decision.module)
        quantized_class = quantized_class_for(module)
        assert quantized_class is not None
        for name, axis in quantized_class.weight_axes.items():
            weight = module.get_parameter(name)
            if decision.weights == "float16":
                weight.data = weight.detach().half().float()
            else:
                weight.data = dequantize_codes(*quantize_to_codes(weight, bool(decision.symmetric), axis))
    return twin


def share_outside_embeddings(model: PreTrainedModel, decisions: list[Decision]) -> float:
    """Share of the parameters outside of `nn.Embedding`s and the output head that is quantized.

    Args:
        model: the float model.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    head = model.get_output_embeddings()
    embeddings |= {id(p) for p in head.parameters()} if head is not None else set()
    total = {id(p): p.numel() for p in model.parameters() if id(p) not in embeddings}
    quantized = 0
    for decision in decisions:
        if decision.quantized:
            module = model.get_submodule(decision.module)
            quantized_class = quantized_class_for(module)
            assert quantized_class is not None
            quantized += sum(
                total.get(id(module.get_parameter(name)), 0) for name in quantized_class.weight_axes
            )
    return quantized / sum(total.values())
