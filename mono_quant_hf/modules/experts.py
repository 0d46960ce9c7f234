"""Modules that hold the weights of all their experts in one parameter, such as `gate_up_proj` `[experts, out, in]`.

No class is needed for them: whichever implementation the model selects (eager, batched, grouped, one of its own) meets
the float view of the weights, which multiplies by the codes of those experts that tokens are sent to.

Example:
    >>> import torch
    >>> from mono_quant_hf.modules import quantized_class_for
    >>> from transformers import MixtralConfig
    >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    >>> experts = MixtralExperts(MixtralConfig(hidden_size=16, intermediate_size=32, num_local_experts=4))
    >>> for weight in experts.parameters():
    ...     _ = torch.nn.init.normal_(weight, std=0.1)
    >>> quantized = quantized_class_for(experts).from_float(experts, "int8", symmetric=False)
    >>> quantized.gate_up_proj_int8.dtype, quantized.gate_up_proj_scale.shape
    (torch.int8, torch.Size([4, 64, 1]))
    >>> x, chosen = torch.randn(5, 16), torch.tensor([[0, 3]] * 5)
    >>> y = quantized(x, chosen, torch.full((5, 2), 0.5))
    >>> bool((y - experts(x, chosen, torch.full((5, 2), 0.5))).abs().max() < 0.05)
    True
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .base import Axes
from .registry import FINDERS

# Of [experts, in, out] without the flag `is_transposed` that says so. A scale along the other axis would be right too,
# but products would expand the weight.
_OUT_LAST = frozenset(
    (
        "CsmCodebooksHead",
        "EsmFold2ConfidenceHead",
        "GroupedLinearLayer",
        "Llama4TextExperts",
        "RecurrentGemmaRglru",
    )
)
_NO_WEIGHT = re.compile(
    r"(^|_)(pos|embed|embeddings?|position|positions|rpb|table|tokens?|quer(y|ies)|bias)(_|$)"
)


def expert_weights(module: nn.Module) -> Mapping[str, Axes]:
    """The stacked weights of a module: a scale for each expert and output feature."""
    if type(module).__module__.partition(".")[0] == "torch":
        return {}
    out_last = getattr(module, "is_transposed", type(module).__name__ in _OUT_LAST)
    stacked: Mapping[str, Axes] = {
        name: (0, 2 if out_last is True else 1) for name in _weights(module, dim=3)
    }
    if stacked or "expert" not in type(module).__name__.lower():
        return stacked
    return {name: 0 for name in _weights(module, dim=2)}  # [experts * out, in]


def _weights(module: nn.Module, dim: int) -> list[str]:
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None
        and parameter.dim() == dim
        and min(parameter.shape) > 1
        and parameter.is_floating_point()
        and not _NO_WEIGHT.search(name)
    ]


FINDERS.append(expert_weights)
