"""The `Conv1D` of transformers, a linear layer whose weight is stored as `[in, out]` (GPT-2 and its relatives)."""

from typing import ClassVar

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mono_quant_hf import kernels

from .base import QuantizedModule
from .registry import register_quantized_class


@register_quantized_class(Conv1D)
class QuantizedConv1DProjection(QuantizedModule, Conv1D):
    """`y = x W + b` with a weight of int8 codes (a scale and zero-point per output feature) or float16.

    Shapes:
        weight int8 or float16 `[in, out]`, weight_scale float32 `[1, out]`, weight_zero_point int8 `[1, out]` or None,
        bias float `[out]`. The kernels work on the transposed view.

    Example:
        >>> import torch
        >>> projection = Conv1D(nf=4, nx=16)
        >>> quantized = QuantizedConv1DProjection.from_float(projection, "int8", symmetric=False)
        >>> quantized
        QuantizedConv1DProjection(nf=4, nx=16, weights=int8, asymmetric)
        >>> x = torch.randn(3, 16)
        >>> bool((quantized(x) - projection(x)).abs().max() < 0.01)
        True
    """

    weight_axes: ClassVar[dict[str, int | tuple[int, ...]]] = {"weight": 1}
    quantizes_activations = True

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        scale, zero_point = self.weight_scale, self.weight_zero_point
        return kernels.linear(
            x,
            self.weight.t(),
            None if scale is None else scale.t(),
            None if zero_point is None else zero_point.t(),
            self.bias,
            self.quantization.activations,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}{super().extra_repr()}"
