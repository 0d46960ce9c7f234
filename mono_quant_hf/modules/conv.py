"""Convolutions with int8 or float16 weights."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant_hf.kernels.convolution import convolution
from mono_quant_hf.kernels.portable import without_autocast

from .base import QuantizedModule, weights_of_dtype
from .registry import register_quantized_class


class QuantizedConvolution(QuantizedModule, nn.modules.conv._ConvNd):
    """The forward of convolutions of any number of dimensions; stride, padding mode and so on are the original's.

    Shapes:
        weight int8 or float16 `[out, in / groups, *kernel]`, weight_scale float32 `[out, 1, ...]`,
        weight_zero_point int8 as the scale or None, bias float `[out]` or None.
    """

    def forward(self, input: Tensor) -> Tensor:
        self.check_input(input)
        padding = self._zeros_on_both_sides()
        if padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            with without_autocast(input.device):  # which would make float32 of it
                input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(self.kernel_size)
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

    def _zeros_on_both_sides(self) -> tuple[int, ...] | None:
        """The padding as the convolution itself adds it; None where the input is to be padded before."""
        if self.padding_mode != "zeros":
            return None
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "valid":
            return (0,) * len(self.kernel_size)
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


class QuantizedTransposedConvolution(QuantizedModule, nn.modules.conv._ConvTransposeNd):
    """The forward of transposed convolutions of any number of dimensions.

    The weight is `[in, out / groups, *kernel]` and has a scale for each index of its second axis: one per output
    channel, which the groups share where there are several.

    Shapes:
        weight int8 or float16 `[in, out / groups, *kernel]`, weight_scale float32 `[1, out / groups, 1, ...]`,
        weight_zero_point int8 as the scale or None, bias float `[out]` or None.
    """

    weight_axes: ClassVar[dict[str, int | tuple[int, ...]]] = {"weight": 1}

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        self.check_input(input)
        padding = self.padding
        assert not isinstance(padding, str)  # torch refuses it when the module is made
        output_padding = self._output_padding(
            input,
            output_size,
            list(self.stride),
            list(padding),
            list(self.kernel_size),
            len(self.kernel_size),
            list(self.dilation),
        )
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
            transposed=True,
            output_padding=output_padding,
        )


@register_quantized_class(nn.Conv1d)
class QuantizedConv1d(QuantizedConvolution, nn.Conv1d):
    """`nn.Conv1d` with int8 codes (a scale and zero-point per output channel) or a float16 weight.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv1d(4, 8, 3, padding=1)
        >>> quantized = QuantizedConv1d.from_float(conv, "int8", symmetric=False)
        >>> x = torch.randn(1, 4, 10)
        >>> quantized(x).shape, bool((quantized(x) - conv(x)).abs().max() < 0.05)
        (torch.Size([1, 8, 10]), True)
    """


@register_quantized_class(nn.Conv2d)
class QuantizedConv2d(QuantizedConvolution, nn.Conv2d):
    """`nn.Conv2d` with a weight of int8 codes (a scale and zero-point per output channel) or float16.

    Made from a trained module by `quantize_conv2d_module`; stride, padding, dilation, groups, padding mode and bias
    are those of the original. The output has the dtype of the input, with and without autocast.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(4, 8, 3, groups=2)
        >>> quantized = QuantizedConv2d.from_float(conv, "int8", symmetric=False)
        >>> quantized.weight.shape, quantized.weight_scale.shape
        (torch.Size([8, 2, 3, 3]), torch.Size([8, 1, 1, 1]))
        >>> x = torch.randn(1, 4, 6, 6)
        >>> bool((quantized(x) - conv(x)).abs().max() < 0.05)
        True
    """


@register_quantized_class(nn.Conv3d)
class QuantizedConv3d(QuantizedConvolution, nn.Conv3d):
    """`nn.Conv3d` with int8 codes (a scale and zero-point per output channel) or a float16 weight.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv3d(1, 2, 3, stride=2)
        >>> quantized = QuantizedConv3d.from_float(conv, "int8", symmetric=True)
        >>> x = torch.randn(1, 1, 5, 5, 5)
        >>> quantized(x).shape, bool((quantized(x) - conv(x)).abs().max() < 0.05)
        (torch.Size([1, 2, 2, 2, 2]), True)
    """


@register_quantized_class(nn.ConvTranspose1d)
class QuantizedConvTranspose1d(QuantizedTransposedConvolution, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with int8 codes (scales along the second axis) or a float16 weight.

    Example:
        >>> import torch
        >>> conv = torch.nn.ConvTranspose1d(4, 2, 4, stride=2)
        >>> quantized = QuantizedConvTranspose1d.from_float(conv, "int8", symmetric=False)
        >>> quantized.weight_scale.shape
        torch.Size([1, 2, 1])
        >>> x = torch.randn(1, 4, 5)
        >>> quantized(x).shape, bool((quantized(x) - conv(x)).abs().max() < 0.05)
        (torch.Size([1, 2, 12]), True)
    """


@register_quantized_class(nn.ConvTranspose2d)
class QuantizedConvTranspose2d(QuantizedTransposedConvolution, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with int8 codes (scales along the second axis) or a float16 weight.

    Example:
        >>> import torch
        >>> conv = torch.nn.ConvTranspose2d(4, 2, 3, stride=2)
        >>> quantized = QuantizedConvTranspose2d.from_float(conv, "int8", symmetric=False)
        >>> x = torch.randn(1, 4, 5, 5)
        >>> quantized(x, output_size=[12, 12]).shape
        torch.Size([1, 2, 12, 12])
        >>> bool((quantized(x) - conv(x)).abs().max() < 0.05)
        True
    """


@register_quantized_class(nn.ConvTranspose3d)
class QuantizedConvTranspose3d(QuantizedTransposedConvolution, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with int8 codes (scales along the second axis) or a float16 weight.

    Example:
        >>> import torch
        >>> conv = torch.nn.ConvTranspose3d(2, 3, 2)
        >>> quantized = QuantizedConvTranspose3d.from_float(conv, "float16", symmetric=False)
        >>> x = torch.randn(1, 2, 3, 3, 3)
        >>> quantized(x).shape, bool((quantized(x) - conv(x)).abs().max() < 0.01)
        (torch.Size([1, 3, 4, 4, 4]), True)
    """


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
