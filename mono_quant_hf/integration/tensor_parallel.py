"""Splitting a quantized checkpoint over processes as it is loaded, by transformers' own plans (`tp_plan`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch import distributed as dist
from transformers import PreTrainedModel

from mono_quant_hf.modules import QuantizedModule
from mono_quant_hf.modules.base import DTYPE_NAME

try:
    from transformers.distributed.parallel_utils import (
        ALL_PARALLEL_STYLES,
        _get_parameter_plan,
        replace_layer_number_by_wildcard,
    )
    from transformers.distributed.tensor_parallel import EmbeddingParallel
except ImportError:  # transformers < 5.24
    CAN_SPLIT = False
else:
    CAN_SPLIT = True

_EMBEDDING = "mono_quant_embedding_rowwise"
_ROW_OF_TOKENS = "embedding_rowwise"
_LAST_DIM = frozenset(
    ("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise", "embedding_colwise")
)
_FIRST_DIM = frozenset((_ROW_OF_TOKENS, _EMBEDDING, "grouped_gemm"))


def check_can_be_split(config: Any, pre_quantized: bool) -> None:
    """Refuse to split what cannot be.

    Args:
        config: of the model; its `distributed_config` says how it is to be split.

    Raises:
        ValueError: a float checkpoint; a version of transformers that gives no way; something else than tensor
            parallelism.
    """
    distributed = getattr(config, "distributed_config", None)
    if distributed is None:
        return
    if not pre_quantized:
        raise ValueError(
            "Expected a checkpoint that is quantized already to be split by tensor parallelism (tp_plan, "
            "distributed_config), got a float one, of which each process reads a part only; quantize and save it in "
            "one process, then load what was saved."
        )
    for name in ("fsdp_size", "pp_size", "ep_size"):
        if (getattr(distributed, name, None) or 1) > 1:
            raise ValueError(
                f"Expected a quantized checkpoint to be split by tensor parallelism alone (tp_plan), got {name}; leave "
                "it out."
            )
    if not CAN_SPLIT:
        raise ValueError(
            "Expected transformers 5.24 or later for tensor parallelism (tp_plan, distributed_config) of a quantized "
            "model, got an older one; upgrade it, or load the model with a device_map."
        )


def check_in_one_piece(model: nn.Module) -> None:
    """Refuse to save codes that are split over processes.

    Raises:
        RuntimeError: some are.
    """
    for module in model.modules():
        if isinstance(module, QuantizedModule) and any(
            hasattr(module.get_parameter(key), "to_local") for key in module.storage_names()
        ):
            raise RuntimeError(
                "Expected a model in one piece to be saved, got one that is split over processes; copy the "
                "checkpoint that it was loaded from, or save it from one process."
            )


def plan_storage(model: PreTrainedModel, plan: dict[str, str]) -> None:
    """Enter what weights are stored as in a plan of transformers, which names modules and float weights.

    Codes, scales and zero-points are split as the weight is. Where there is one scale for all that the split goes
    through, as in a row-wise split of a Linear, it is replicated.

    Args:
        plan: `{name with * for the number of a layer: style}`, changed in place.
    """
    given = dict(plan)
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        module._hf_quantized_needs_local_tp = True  # the kernels take no DTensor
        if isinstance(module, nn.Embedding) and given.get(_any_layer(name)) == _ROW_OF_TOKENS:
            plan[_any_layer(name)] = _EMBEDDING
        for weight in module.weight_axes:
            style = _get_parameter_plan(f"{name}.{weight}", given)
            if style is None:
                continue
            for key in module._storage_of(weight):
                split = _is_split(module.get_parameter(key), style)
                plan[_any_layer(f"{name}.{key}")] = style if split else "replicate"
        if DTYPE_NAME in module._parameters and _get_parameter_plan(f"{name}.{DTYPE_NAME}", given):
            plan[_any_layer(f"{name}.{DTYPE_NAME}")] = "replicate"
    _untie(model)


def _any_layer(name: str) -> str:
    return str(replace_layer_number_by_wildcard(name))


def _is_split(tensor: Tensor, style: str) -> bool:
    if style in _FIRST_DIM:
        dim = 0
    elif style in _LAST_DIM:
        dim = -1
    else:
        dim = -2
    return tensor.shape[dim] > 1


def _untie(model: PreTrainedModel) -> None:
    """A room of its own for each of the tied weights, which transformers splits apart and ties after loading."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for key in module.storage_names():
                room = module.get_parameter(key)
                if id(room) in seen:
                    module._parameters[key] = nn.Parameter(room.detach().clone(), requires_grad=False)
                seen.add(id(room))


if CAN_SPLIT:

    class SplitEmbedding(EmbeddingParallel):
        """A quantized table whose rows are split: a process gives zeros for the rows of others, and all are summed."""

        def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
            whole = module.forward
            group = mesh.get_group()

            def forward(ids: Tensor) -> Tensor:
                size = int(module.num_embeddings)  # type: ignore[arg-type]
                per_rank = -(-size // mesh.size())
                first = per_rank * mesh.get_local_rank()
                rows = max(0, min(per_rank, size - first))
                here = (ids >= first) & (ids < first + rows)
                with self.context_around_forward(module, mesh):
                    found = whole((ids - first).clamp(0, max(rows - 1, 0)))
                found = found.masked_fill(~here.unsqueeze(-1), 0)
                dist.all_reduce(found, group=group)
                return found

            module.forward = forward
            return module

    ALL_PARALLEL_STYLES.register(_EMBEDDING, SplitEmbedding(shard_dim=0))  # type: ignore[arg-type]
