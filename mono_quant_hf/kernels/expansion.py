"""Codes to floats, in one pass where the compiled kernels can, else the portable way: the same numbers."""

import torch
from torch import Tensor
from torch.nn import functional

from . import cpu, gpu, portable
from .operands import check_codes, check_memory
from .plain import is_plain


def expand(
    weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`portable.expand`, quicker for int8 codes on a CPU with one scale for each first index."""
    check_codes(weight, scale, zero_point)
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and not _broadcasts(tensor, weight):
            raise RuntimeError(
                f"The {name} {list(tensor.shape)} does not fit the weight {list(weight.shape)}: "
                f"each of its dimensions must be that of the weight, or 1."
            )
    if not dtype.is_floating_point:
        raise TypeError(
            f"Expected a floating dtype, got {dtype}; choose float32, bfloat16, float16 or float64."
        )
    if is_plain(weight, scale, zero_point):
        check_memory(weight=weight, scale=scale, zero_point=zero_point)
        if (
            dtype == torch.float32
            and scale is not None
            and _codes_per_row(weight, scale, zero_point)
            and cpu.load() is not None
        ):
            return cpu.expand(weight, scale, zero_point, torch.empty_like(weight, dtype=torch.float32))
        if scale is not None and _takes_triton(weight, scale, dtype):
            flat = weight.reshape(scale.numel(), -1)
            return gpu.expand(flat, scale, zero_point, dtype).view(weight.shape)
    return portable.expand(weight, scale, zero_point, dtype)


def look_up(
    indices: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The rows of a quantized table at integer `indices` [...], expanded to `dtype`; no other row is expanded.

    Args:
        weight: int8 or float16 [rows, dim]; scale float32 and zero_point int8 [rows, 1] or [1, dim], or None.

    Example:
        >>> codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        >>> look_up(torch.tensor([1]), codes, torch.tensor([[1.0], [0.5]]), None, torch.float32)
        tensor([[1.5000, 2.0000]])
    """
    if (
        scale is not None
        and len(scale) == len(weight)
        and indices.numel()
        and is_plain(indices, weight, scale, zero_point)
        and _takes_triton(weight, scale, dtype)
    ):
        return gpu.expand(weight, scale, zero_point, dtype, indices)

    def rows(table: Tensor | None) -> Tensor | None:
        return table if table is None or len(table) != len(weight) else functional.embedding(indices, table)

    return expand(functional.embedding(indices, weight), rows(scale), rows(zero_point), dtype)


def expand_into(out: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """The same into `out`, float32 and without gaps."""
    if scale is None:
        return out.copy_(weight)
    if (
        is_plain(weight, scale, zero_point)
        and _codes_per_row(weight, scale, zero_point)
        and cpu.load() is not None
    ):
        return cpu.expand(weight, scale, zero_point, out)
    out.copy_(weight)
    if zero_point is not None:
        out.sub_(zero_point)
    return out.mul_(scale)


def _takes_triton(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """On a device with Triton, and a scale for each of the leading indices of the weight."""
    leading = [size for size in scale.shape if size > 1]
    return (
        not weight.is_cpu
        and dtype != torch.float64
        and weight.numel() > 0
        and weight.is_contiguous()
        and list(weight.shape[: len(leading)]) == leading
        and not gpu.why_missing(weight.device)
    )


def _broadcasts(tensor: Tensor, weight: Tensor) -> bool:
    sizes = zip(reversed(tensor.shape), reversed(weight.shape), strict=False)
    return tensor.dim() <= weight.dim() and all(size in (1, whole) for size, whole in sizes)


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
