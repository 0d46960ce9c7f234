"""Convolutions with int8 or float16 weights: their own forward meets the float view of the weight."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mono_quant_hf.kernels.portable import without_autocast

from .base import QuantizedModule, check_input
from .registry import MIXINS, quantized_twin


class QuantizedConvolution(QuantizedModule):
    """Mixin of convolutions, transposed ones too: the output has the dtype of the input, with and without autocast."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_input(self, input)
        with without_autocast(input.device):
            output: Tensor = super().forward(input.to(self.quantization.dtype), *args, **kwargs)
            return output.to(input.dtype)


MIXINS[_ConvNd] = QuantizedConvolution


def quantize_conv2d_module(
    module: nn.Conv2d, dtype: torch.dtype = torch.qint8, symmetric: bool = False
) -> Any:
    """A quantized twin of a Conv2d; the module itself is left as it is, the bias is shared.

    Args:
        module: float weight `[out, in / groups, height, width]`, any floating dtype and device.
        dtype: `torch.qint8` or `torch.float16`.
        symmetric: int8 only: no zero-points, codes in [-127, 127].

    Returns:
        An `nn.Conv2d` and `QuantizedModule` with every argument of the original: weight_int8 (or weight_float16) as the
        weight, weight_scale float32 and, where asymmetric, weight_zero_point int8 `[out, 1, 1, 1]`. Its output has the
        dtype of its input, with and without autocast.

    Raises:
        TypeError: `module` is no `nn.Conv2d`.
        ValueError: another dtype; a weight with NaN or infinite values, without elements, or (float16) past 65504.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")
        >>> quantized = quantize_conv2d_module(conv, symmetric=True)
        >>> x = torch.randn(1, 3, 16, 16)
        >>> isinstance(quantized, torch.nn.Conv2d), bool((quantized(x) - conv(x)).abs().max() < 0.05)
        (True, True)
    """
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"Expected an nn.Conv2d, got {type(module).__name__}.")
    return quantized_twin(module, dtype, symmetric)
