"""Convolutions with int8 or float16 weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant_hf.kernels.convolution import convolution

from .base import QuantizedModule, weights_of_dtype
from .registry import register_quantized_class


@register_quantized_class(nn.Conv2d)
class QuantizedConv2d(QuantizedModule, nn.Conv2d):
    """`nn.Conv2d` with a weight of int8 codes (a scale and zero-point per output channel) or float16.

    Made from a trained module by `quantize_conv2d_module`; stride, padding, dilation, groups, padding mode and bias
    are those of the original. The output has the dtype of the input, with and without autocast.

    Shapes:
        weight int8 or float16 `[out, in / groups, height, width]`, weight_scale float32 `[out, 1, 1, 1]`,
        weight_zero_point int8 as the scale or None, bias float `[out]` or None.
    """

    def forward(self, input: Tensor) -> Tensor:
        self.check_input(input)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        return convolution(
            input,
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )


def quantize_conv2d_module(
    module: nn.Conv2d, dtype: torch.dtype = torch.qint8, symmetric: bool = False
) -> QuantizedConv2d:
    """A quantized twin of a Conv2d; the module itself is left as it is, the bias is shared.

    Args:
        module: float weight `[out, in / groups, height, width]`, any floating dtype and device.
        dtype: `torch.qint8` or `torch.float16`.
        symmetric: int8 only: no zero-points, codes in [-127, 127].

    Raises:
        TypeError: `module` is no `nn.Conv2d`.
        ValueError: another dtype; a weight with NaN or infinite values, without elements, or (float16) past 65504;
            a subclass whose forward is its own.

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
    return QuantizedConv2d.from_float(module, weights_of_dtype(dtype), symmetric)
