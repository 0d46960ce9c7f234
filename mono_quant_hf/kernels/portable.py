"""The portable way, in torch's own operations: right on every device and dtype torch knows, `meta` included.

On a CPU it expands the codes to floats and multiplies: the reference that the faster ways are tested against, and what
they fall back to. Elsewhere it is the one of `rows`. A compiler fuses both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import rows
from .operands import check_memory
from .plain import is_plain
from .rows import without_autocast


def expand(
    weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`(weight - zero_point) * scale`, computed in float32 (float64 when that is asked for), then cast.

    Code and zero-point are subtracted before anything is rounded, and the scale is applied before any matmul:
    a half-precision result can only overflow where the true weight does.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if scale is None:
        return weight.to(dtype)
    full = weight.to(work)
    if zero_point is not None:
        full = full - zero_point.to(work)
    return (full * scale.to(work)).to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype the matmul runs in: float32 for half precision on a CPU, whose half matmuls are slow."""
    if x.device.type == "cpu" and x.dtype != torch.float64:
        return torch.float32
    return x.dtype


def forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x Wᵀ + b` in x's dtype. No gradient: see `backward`."""
    if not x.is_cpu and x.dtype in rows.DTYPES:
        return rows.linear(x, weight, scale, zero_point, bias)
    dtype = compute_dtype(x)
    with without_autocast(x.device):
        full = expand(weight, scale, zero_point, dtype)
        return functional.linear(x.to(dtype), full, None if bias is None else bias.to(dtype)).to(x.dtype)


def backward(grad: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """The gradient to x, `grad W`, from a fresh expansion: nothing expanded was kept since the forward."""
    if not grad.is_cpu and grad.dtype in rows.DTYPES:
        return rows.backward(grad, weight, scale, zero_point)
    dtype = compute_dtype(grad)
    with without_autocast(grad.device):
        return (grad.to(dtype) @ expand(weight, scale, zero_point, dtype)).to(grad.dtype)


def keep(
    ctx: Any, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, bias: Tensor | None
) -> None:
    """What the backward of a product needs: the codes, and the dtype that the gradient of the bias is to have."""
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.bias_dtype = None if bias is None else bias.dtype


class PortableLinear(torch.autograd.Function):
    """Keeps the codes, not the expanded weight, from forward to backward."""

    @staticmethod
    def forward(ctx, x, weight, scale, zero_point, bias):  # type: ignore[no-untyped-def]
        keep(ctx, weight, scale, zero_point, bias)
        return forward(x, weight, scale, zero_point, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        weight, scale, zero_point = ctx.saved_tensors
        if is_plain(grad, weight, scale, zero_point):
            check_memory(weight=weight, scale=scale, zero_point=zero_point)
        to_x = backward(grad, weight, scale, zero_point) if ctx.needs_input_grad[0] else None
        to_bias = None
        if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return to_x, None, None, None, to_bias


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The portable way with its gradient to x and to the bias."""
    return PortableLinear.apply(x, weight, scale, zero_point, bias)
