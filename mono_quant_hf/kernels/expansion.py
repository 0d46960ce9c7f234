"""Codes to floats, in one pass where the compiled kernels can, else the portable way: the same numbers."""

import torch
from torch import Tensor

from . import cpu, portable
from .plain import is_plain


def expand(
    weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`portable.expand`, quicker for int8 codes on a CPU with one scale for each first index."""
    if dtype == torch.float32 and scale is not None and is_plain(weight, scale):
        fitting = _codes_per_row(weight, scale, zero_point)
        if fitting and cpu.load() is not None:
            return cpu.expand(weight, scale, zero_point, torch.empty_like(weight, dtype=torch.float32))
    return portable.expand(weight, scale, zero_point, dtype)


def expand_into(out: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """The same into `out`, float32 and without gaps."""
    if scale is None:
        return out.copy_(weight)
    if is_plain(weight, scale) and _codes_per_row(weight, scale, zero_point) and cpu.load() is not None:
        return cpu.expand(weight, scale, zero_point, out)
    out.copy_(weight)
    if zero_point is not None:
        out.sub_(zero_point)
    return out.mul_(scale)


def _codes_per_row(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> bool:
    rows = weight.shape[0] if weight.dim() else 0
    return (
        weight.dtype is torch.int8
        and weight.is_cpu
        and weight.numel() > 0
        and weight.is_contiguous()
        and scale.is_cpu
        and scale.dtype is torch.float32
        and scale.is_contiguous()
        and scale.dim() == weight.dim() > 0
        and scale.shape[0] == scale.numel() == rows
        and (
            zero_point is None
            or (
                zero_point.is_cpu
                and zero_point.dtype is torch.int8
                and zero_point.is_contiguous()
                and zero_point.shape == scale.shape
            )
        )
    )
