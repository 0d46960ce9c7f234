"""Embedding tables with int8 or float16 rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant_hf import kernels

from .base import Quantization, QuantizedModule
from .operand import QuantizedOperand
from .own_forward import OwnForward, quantized_form
from .registry import register_quantized_class, register_quantized_class_finder
from .usage import other_use_of_table


class _Table(QuantizedModule):
    """Storage of a table: the weight with a scale and zero-point per row, and what says the dtype of the vectors.

    `vector_dtype` is one element whose dtype is that of the vectors looked up: unlike a Linear, a table has no
    floating input to take it from. It follows `.to(dtype)`. As the first parameter of most models it is also where
    transformers reads `model.dtype` from, which must not be that of the scales.
    """

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if getattr(module, "max_norm", None) is not None:
            return "its max_norm renormalizes the rows in place"
        return super().refuses(module)

    @classmethod
    def companions(cls, weight_name: str) -> list[str]:
        return [*super().companions(weight_name), "vector_dtype"]

    def _set_up_storage(self, quantization: Quantization) -> None:
        weight = self.get_parameter("weight")
        like = torch.ones(1, dtype=weight.dtype, device=weight.device)
        # First, for the sake of PreTrainedModel.dtype.
        self._parameters = {"vector_dtype": nn.Parameter(like, requires_grad=False), **self._parameters}
        super()._set_up_storage(quantization)

    def quantized_tensors(self, weight_name: str, weight: Tensor) -> dict[str, Tensor]:
        like = torch.ones(1, dtype=self.get_parameter("vector_dtype").dtype, device=weight.device)
        return {**super().quantized_tensors(weight_name, weight), "vector_dtype": like}


@register_quantized_class(nn.Embedding)
class QuantizedEmbedding(_Table, nn.Embedding):
    """`nn.Embedding` whose rows are int8 codes (a scale and zero-point each) or float16.

    Only the rows that are looked up are expanded. There is no gradient to the table.

    Shapes:
        weight int8 or float16 `[rows, dim]`, weight_scale float32 `[rows, 1]`, weight_zero_point int8 `[rows, 1]` or
        None, vector_dtype `[1]` in the dtype of the vectors. Input integer `[...]`, output `[..., dim]`.

    Example:
        >>> import torch
        >>> table = torch.nn.Embedding(100, 64)
        >>> quantized = QuantizedEmbedding.from_float(table, "int8", symmetric=False)
        >>> ids = torch.tensor([[3, 7, 99]])
        >>> quantized(ids).shape, bool((quantized(ids) - table(ids)).abs().max() < 0.02)
        (torch.Size([1, 3, 64]), True)
    """

    def forward(self, input: Tensor) -> Tensor:
        return look_up(
            input,
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.get_parameter("vector_dtype").dtype,
        )


class QuantizedEmbeddingVariant(_Table, OwnForward):
    """A subclass of `nn.Embedding` with a forward of its own, such as one that scales the vectors.

    Shapes: as `QuantizedEmbedding`.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import quantized_class_for
        >>> from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
        >>> table = Gemma3TextScaledWordEmbedding(100, 64, padding_idx=0, embed_scale=8.0)
        >>> quantized = quantized_class_for(table).from_float(table, "int8", symmetric=False)
        >>> isinstance(quantized, QuantizedEmbeddingVariant), isinstance(quantized, Gemma3TextScaledWordEmbedding)
        (True, True)
        >>> ids = torch.tensor([[3, 7, 99]])
        >>> bool((quantized(ids) - table(ids)).abs().max() < 8 * 0.02)
        True
    """

    def _operand(self, name: str) -> QuantizedOperand:
        weight, scale, zero_point = self.get_parameter(name), self.weight_scale, self.weight_zero_point
        return _Rows(weight, scale, zero_point, self.get_parameter("vector_dtype").dtype)


class _Rows(QuantizedOperand):
    """Stands in for the float table in `nn.functional.embedding`, and says its dtype."""

    def __init__(self, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype):
        super().__init__(weight, scale, zero_point, out_last=False)
        self.dtype = dtype

    def _each(self, change: Callable[[Tensor], Tensor], out_last: bool) -> QuantizedOperand:
        raise NotImplementedError("A quantized embedding table can only be looked up.")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "embedding" and isinstance(args[1], cls):
            table = args[1]
            return look_up(args[0], table.weight, table.scale, table.zero_point, table.dtype)
        return NotImplemented


def look_up(
    input: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The rows of a quantized table, expanded to `dtype`.

    Args:
        input: integer `[...]`.
        weight: int8 or float16 `[rows, dim]`; `scale` float32 and `zero_point` int8 `[rows, 1]`, or None.
    """
    rows = (None if table is None else F.embedding(input, table) for table in (weight, scale, zero_point))
    codes, scales, zero_points = rows
    assert codes is not None
    return kernels.expand(codes, scales, zero_points, dtype)


@register_quantized_class_finder
def embedding_variant_for(module: nn.Module) -> type[QuantizedModule] | None:
    """The quantized class of a table whose source shows that its forward does nothing but look its rows up."""
    own_forward = isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward
    if not own_forward or other_use_of_table(type(module)) is not None:  # type: ignore[arg-type]
        return None
    return quantized_form(QuantizedEmbeddingVariant, type(module), (("weight", 0),))  # type: ignore[arg-type]
