"""Convolutions whose weight is kept as int8 codes or as float16, of one to three dimensions, transposed or not."""

from typing import Any

import torch
from torch import Tensor

from .codes import expand
from .operands import Column
from .portable import compute_dtype, without_autocast


def convolution(
    x: Tensor, weight: Tensor, scale: Column, zero_point: Column, bias: Column, geometry: tuple[Any, ...]
) -> Tensor:
    """`torch.convolution` with the weight `(weight - zero_point) * scale`, or a float16 weight.

    Args:
        x: floating, `[batch, in, *spatial]`.
        weight: int8 codes or float16, `[out, in / groups, *kernel]`; transposed `[in, out / groups, *kernel]`.
        scale: float32 that broadcasts against the weight; None for float16.
        zero_point: int8 as the scale, or None for symmetric codes.
        bias: `[out]` floating, or None.
        geometry: what `torch.convolution` takes after the bias: stride, padding, dilation, transposed, output_padding,
            groups.

    Returns:
        The convolution in the dtype of `x`, with and without autocast. Gradients flow to `x` and to `bias`; the
        expanded weight is not kept between forward and backward.
    """
    wants_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    compute = _Convolution.apply if wants_grad and torch.is_grad_enabled() else _forward
    return compute(x, weight, scale, zero_point, bias, geometry)


def _forward(
    x: Tensor, weight: Tensor, scale: Column, zero_point: Column, bias: Column, geometry: tuple[Any, ...]
) -> Tensor:
    dtype = compute_dtype(x)
    with without_autocast(x.device):
        full = expand(weight, scale, zero_point, dtype)
        cast_bias = None if bias is None else bias.to(dtype)
        return torch.convolution(x.to(dtype), full, cast_bias, *geometry).to(x.dtype)


class _Convolution(torch.autograd.Function):
    """Keeps the codes, not the expanded weight, from forward to backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Column,
        zero_point: Column,
        bias: Column,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        ctx.geometry, ctx.bias_dtype = geometry, None if bias is None else bias.dtype
        ctx.input_like = (x.shape, x.dtype)
        return _forward(x, weight, scale, zero_point, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            dtype = compute_dtype(grad)
            shape, input_dtype = ctx.input_like
            with without_autocast(grad.device):
                full = expand(weight, scale, zero_point, dtype)
                # Only the shape of the input matters for its own gradient.
                like = torch.empty(1, dtype=dtype, device=grad.device).expand(shape)
                to_x = torch.ops.aten.convolution_backward(
                    grad.to(dtype), like, full, None, *ctx.geometry, [True, False, False]
                )[0].to(input_dtype)
        if ctx.needs_input_grad[4]:
            to_bias = grad.sum([dim for dim in range(grad.dim()) if dim != 1]).to(ctx.bias_dtype)
        return to_x, None, None, None, to_bias, None
