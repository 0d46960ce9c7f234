"""The layers of vLLM's models whose weights are int8 codes or float16, computed by our kernels.

Parameters have the names and shapes that they have on disk, and vLLM's attributes `output_dim` and `input_dim`: its own
loaders then shard them for tensor parallelism, and join q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from mono_quant_hf import kernels

ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
}


@dataclass(frozen=True)
class Part:
    """How rows of a layer's weight are stored.

    Attributes:
        weights: "int8", "float16" or "float".
        zero_points: whether codes have zero-points.
        activations: as in the config.
    """

    weights: str
    zero_points: bool = False
    activations: str | None = None

    def room(self, rows: tuple[int, ...], columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """`{suffix of a parameter: an empty tensor}`, weight first, for a weight `[*rows, columns]`."""
        if self.weights != "int8":
            stored = torch.float16 if self.weights == "float16" else dtype
            return {
                "_float16" if self.weights == "float16" else "": torch.empty(*rows, columns, dtype=stored)
            }
        room = {"_int8": torch.empty(*rows, columns, dtype=torch.int8), "_scale": torch.ones(*rows, 1)}
        if self.zero_points:
            room["_zero_point"] = torch.zeros(*rows, 1, dtype=torch.int8)
        return room


class CodesMethod(LinearMethodBase):
    """A linear layer, a table or an output head, all of it or parts of its rows quantized.

    Args:
        prefix: name of the layer, for messages.
        parts: for each module that the layer stands for; none for a head that has only what it is tied to.
    """

    def __init__(self, prefix: str, parts: Sequence[Part]):
        self.prefix, self.parts = prefix, list(parts)
        self.spans: list[tuple[Part, int]] = []

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        rows, parts = list(output_partition_sizes), self.parts
        if len(set(parts)) == 1:  # also where the parts are joined on disk
            rows, parts = [sum(rows)], parts[:1]
        if parts and len(rows) != len(parts):
            raise ValueError(
                f"Expected {len(rows)} parts of {self.prefix} for vLLM, got {len(parts)} that are quantized "
                "differently; quantize them alike."
            )
        joined = groupby(zip(parts, rows, strict=bool(parts)), key=lambda pair: pair[0])
        self.spans = [(part, sum(n for _, n in pairs)) for part, pairs in joined]
        for part in dict.fromkeys(part for part, _ in self.spans):
            for suffix, tensor in part.room((sum(rows),), input_size_per_partition, params_dtype).items():
                if hasattr(layer, f"weight{suffix}"):
                    continue
                parameter = nn.Parameter(tensor, requires_grad=False)
                whole = suffix not in ("_scale", "_zero_point")
                set_weight_attrs(parameter, {"output_dim": 0, **({"input_dim": 1} if whole else {})})
                set_weight_attrs(parameter, attributes)
                layer.register_parameter(f"weight{suffix}", parameter)
        layer.shown_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Give LoRA and others the `weight` whose device they ask for."""
        if not hasattr(layer, "weight") and self.spans:
            layer.weight = getattr(layer, "weight_" + self.spans[0][0].weights)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        products, start = [], 0
        for part, rows in self.spans:
            end = start + rows
            some = None if bias is None else bias[start:end]
            if part.weights == "float":
                products.append(F.linear(x, layer.weight[start:end], some))
            else:
                products.append(
                    kernels.linear(x, *_stored(layer, part, slice(start, end)), some, part.activations)
                )
            start = end
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        part, rows = self.spans[0]
        return kernels.look_up(input_, *_stored(layer, part, slice(rows)), layer.shown_dtype)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Have a head use the table, quantized or not."""
        for name in list(layer._parameters):
            if name != "bias":
                del layer._parameters[name]
        for name, parameter in embed_tokens.named_parameters(recurse=False):
            layer.register_parameter(name, parameter)
        layer.quant_method = embed_tokens.quant_method
        return layer


def _stored(layer: Any, part: Part, place: slice, name: str = "weight") -> tuple[Any, Any, Any]:
    """Weight, scale and zero-point of some rows; None for what there is not."""
    scale = getattr(layer, f"{name}_scale")[place] if part.weights == "int8" else None
    zero_point = getattr(layer, f"{name}_zero_point")[place] if part.zero_points else None
    return getattr(layer, f"{name}_{part.weights}")[place], scale, zero_point


class ExpertsMethod(FusedMoEMethodBase):
    """Experts that are stored stacked, `[experts, out, in]`, one product each.

    Args:
        moe: vLLM's config of the layer.
        prefix: name of the layer, for messages.
        part: how all their weights are stored.
    """

    def __init__(self, moe: Any, prefix: str, part: Part):
        super().__init__(moe)
        self.prefix, self.part = prefix, part
        if moe.activation not in ACTIVATIONS or not moe.is_act_and_mul:
            raise ValueError(
                f"Expected experts gated by {' or '.join(a.value for a in ACTIVATIONS)}, got {moe.activation.value} "
                f"in {prefix}; serve the model with transformers."
            )

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        inner = intermediate_size_per_partition
        for name, rows, columns in (("w13", 2 * inner, hidden_size), ("w2", hidden_size, inner)):
            for suffix, tensor in self.part.room((num_experts, rows), columns, params_dtype).items():
                parameter = nn.Parameter(tensor, requires_grad=False)
                set_weight_attrs(parameter, attributes | {"weight_loader": _ExpertLoader(layer, inner)})
                layer.register_parameter(f"{name}_weight{suffix}", parameter)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids]
        gate_up, down = (
            [t for t in _stored(layer, self.part, slice(None), f"{name}_weight") if t is not None]
            for name in ("w13", "w2")
        )
        share_first = bool(layer.apply_router_weight_on_input)
        return torch.ops.mono_quant.experts(
            x, topk_weights, ids, gate_up, down, layer.activation.value, self.part.activations, share_first
        )


@torch.library.custom_op("mono_quant::experts", mutates_args=())
def experts(
    x: Tensor,
    shares: Tensor,
    ids: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
    activations: str | None,
    share_first: bool,
) -> Tensor:
    """The sum of what the chosen experts make of each token. An operator, as a compiler can't follow who is chosen.

    Args:
        x: [tokens, K].
        shares, ids: [tokens, chosen]; experts of other ranks are -1.
        gate_up, down: weight [experts, out, in], for codes also the scale, perhaps the zero-point.
        activation: by vLLM's name; `activations` as in `kernels.linear`.
        share_first: whether the share is of the input, not of the output.
    """
    act, output = ACTIVATIONS[MoEActivation(activation)], torch.zeros_like(x)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        share, rows = shares[tokens, places, None], x[tokens]
        rows = (rows * share).to(x.dtype) if share_first else rows
        gate, up = _by_expert(rows, gate_up, expert, activations).chunk(2, dim=-1)
        rows = _by_expert(act(gate) * up, down, expert, activations)
        output.index_add_(0, tokens, rows if share_first else (rows * share).to(x.dtype))
    return output


@experts.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _by_expert(x: Tensor, stored: Sequence[Tensor], expert: int, activations: str | None) -> Tensor:
    weight, *rest = (tensor[expert] for tensor in stored)
    scale, zero_point = (*rest, None, None)[:2]
    return kernels.linear(x, weight, scale, zero_point, None, activations)


class _ExpertLoader:
    """Puts one expert's weight, scales or zero-points into its place; `supports_moe_loading` is vLLM's."""

    supports_moe_loading = True

    def __init__(self, layer: Any, inner: int):
        self.layer, self.inner = layer, inner

    def __call__(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        layer, inner = self.layer, self.inner
        local = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local >= 0:
            rank = layer.moe_config.tp_rank
            place = param.data[local]
            if shard_id != "w2":  # rows of the gate, then those of up
                place = place.narrow(0, inner if shard_id == "w3" else 0, inner)
                loaded_weight = loaded_weight.narrow(0, rank * inner, inner)
            elif loaded_weight.shape[1] > 1:
                loaded_weight = loaded_weight.narrow(1, rank * inner, inner)
            place.copy_(loaded_weight)
        return local >= 0 if return_success else None
