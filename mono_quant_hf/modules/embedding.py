"""Embedding tables with int8 or float16 rows."""

from typing import ClassVar

from torch import Tensor, nn

from mono_quant_hf import kernels

from .base import Axes, QuantizedModule
from .registry import MIXINS


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """`nn.Embedding` whose rows are int8 codes (a scale and zero-point each) or float16.

    Only the rows that are looked up are expanded, in a compiled graph too. There is no gradient to the table.

    Shapes:
        weight_int8 (or weight_float16) `[rows, dim]`, weight_scale float32 `[rows, 1]`, weight_zero_point int8
        `[rows, 1]` where asymmetric. Input integer `[...]`, output `[..., dim]` in the dtype that `weight` shows.

    Example:
        >>> import torch
        >>> table = torch.nn.Embedding(100, 64)
        >>> quantized = QuantizedEmbedding.from_float(table, "int8", symmetric=False)
        >>> ids = torch.tensor([[3, 7, 99]])
        >>> quantized(ids).shape, bool((quantized(ids) - table(ids)).abs().max() < 0.02)
        (torch.Size([1, 3, 64]), True)
    """

    weight_axes: ClassVar[dict[str, Axes]] = {"weight": 0}

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if getattr(module, "max_norm", None) is not None:
            return "its max_norm renormalizes the rows in place"
        return super().refuses(module)

    def forward(self, input: Tensor) -> Tensor:
        return kernels.look_up(input, *self.stored(), self.quantization.dtype)


MIXINS[nn.Embedding] = QuantizedEmbedding
