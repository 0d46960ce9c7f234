"""Codes to floats and back, in one pass where the compiled kernels can, else the portable way: to the bit the same."""

import torch
from torch import Tensor
from torch.nn import functional

from mono_quant_hf.core import quantize_to_codes

from . import cpu, gpu, portable
from .operands import Column, check_codes, check_memory, is_plain

LARGE = 2**18
"""Elements: smaller weights are not worth loading the kernels to quantize them."""


def quantize(
    weight: Tensor, symmetric: bool = False, axis: int | tuple[int, ...] = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`core.quantize_to_codes`, quicker for large float32 weights on a CPU with a scale for each first index.

    Example:
        >>> codes, scale, zero_point = quantize(torch.tensor([[-1.0, 0.5], [0.0, 254.0]]), symmetric=True)
        >>> codes
        tensor([[-127,   64],
                [   0,  127]], dtype=torch.int8)
        >>> scale.flatten(), zero_point
        (tensor([0.0079, 2.0000]), None)
    """
    plain = is_plain(weight)
    if plain:
        check_memory(weight=weight)
    if not plain or not _rows_of_floats(weight, axis) or not cpu.ready("encode"):
        return quantize_to_codes(weight, symmetric, axis)
    shape = [len(weight)] + [1] * (weight.dim() - 1)
    codes = weight.new_empty(weight.shape, dtype=torch.int8)  # on its device, whatever the default one is
    scale = weight.new_empty(shape)
    zero_point = None if symmetric else weight.new_empty(shape, dtype=torch.int8)
    cpu.encode(weight, codes, scale, zero_point)
    if not bool(torch.isfinite(scale).all()):
        return quantize_to_codes(weight, symmetric, axis)  # which says what is wrong
    return codes, scale, zero_point


def expand(
    weight: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The float weight `(weight - zero_point) * scale` in `dtype`, of any number of dimensions.

    Args:
        weight: int8 codes, or floating.
        scale: floating, broadcast against the codes; None for a floating weight.
        zero_point: int8, broadcast as the scale, or None for symmetric codes.
        dtype: floating.

    Raises:
        TypeError: another dtype.
        RuntimeError: a shape or a device that does not fit; memory that was freed.

    Example:
        >>> codes = torch.tensor([[-128, 127]], dtype=torch.int8)
        >>> expand(codes, torch.tensor([[0.1]]), torch.tensor([[-128]], dtype=torch.int8))
        tensor([[ 0.0000, 25.5000]])
    """
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
        if scale is not None and dtype == torch.float32 and _by_cpu_kernel(weight, scale, zero_point):
            return cpu.expand(weight, scale, zero_point, torch.empty_like(weight, dtype=torch.float32))
        if _by_gpu_kernel(weight, scale, zero_point, dtype):
            return gpu.expand(weight.flatten(1), scale, zero_point, dtype).view(weight.shape)
    return portable.expand(weight, scale, zero_point, dtype)


def look_up(indices: Tensor, weight: Tensor, scale: Column, zero_point: Column, dtype: torch.dtype) -> Tensor:
    """The rows of a quantized table at integer `indices` [...], expanded to `dtype`; no other row is expanded.

    Args:
        weight: int8 or float16 [rows, dim]; scale float32 and zero_point int8 [rows, 1] or [1, dim], or None.

    Example:
        >>> codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        >>> look_up(torch.tensor([1]), codes, torch.tensor([[1.0], [0.5]]), None, torch.float32)
        tensor([[1.5000, 2.0000]])
    """
    plain = is_plain(indices, weight, scale, zero_point)
    if plain and indices.numel() and _by_gpu_kernel(weight, scale, zero_point, dtype):
        check_memory(weight=weight, scale=scale, zero_point=zero_point)
        return gpu.expand(weight, scale, zero_point, dtype, indices)

    def rows(table: Column) -> Column:
        return table if table is None or len(table) != len(weight) else functional.embedding(indices, table)

    return expand(functional.embedding(indices, weight), rows(scale), rows(zero_point), dtype)


def expand_into(out: Tensor, weight: Tensor, scale: Column, zero_point: Column) -> Tensor:
    """The same into `out`, float32 and without gaps."""
    if scale is None:
        return out.copy_(weight)
    if is_plain(weight, scale, zero_point) and _by_cpu_kernel(weight, scale, zero_point):
        return cpu.expand(weight, scale, zero_point, out)
    out.copy_(weight)
    if zero_point is not None:
        out.sub_(zero_point)
    return out.mul_(scale)


def _by_cpu_kernel(weight: Tensor, scale: Column, zero_point: Column) -> bool:
    return weight.is_cpu and _codes_per_row(weight, scale, zero_point) and cpu.ready("expand")


def _by_gpu_kernel(weight: Tensor, scale: Column, zero_point: Column, dtype: torch.dtype) -> bool:
    return (
        not weight.is_cpu
        and dtype != torch.float64
        and weight.dim() > 1
        and _codes_per_row(weight, scale, zero_point)
        and not gpu.why_missing(weight.device)
    )


def _broadcasts(tensor: Tensor, weight: Tensor) -> bool:
    sizes = zip(reversed(tensor.shape), reversed(weight.shape), strict=False)
    return tensor.dim() <= weight.dim() and all(size in (1, whole) for size, whole in sizes)


def _codes_per_row(weight: Tensor, scale: Column, zero_point: Column) -> bool:
    """Whether these are codes with one scale for each first index, all on one device and without gaps."""
    rows = weight.shape[0] if weight.dim() else 0
    return (
        scale is not None
        and weight.dtype is torch.int8
        and weight.numel() > 0
        and weight.is_contiguous()
        and scale.device == weight.device
        and scale.dtype is torch.float32
        and scale.is_contiguous()
        and scale.dim() == weight.dim() > 0
        and scale.shape[0] == scale.numel() == rows
        and (
            zero_point is None
            or (
                zero_point.device == weight.device
                and zero_point.dtype is torch.int8
                and zero_point.is_contiguous()
                and zero_point.shape == scale.shape
            )
        )
    )


def _rows_of_floats(weight: Tensor, axis: int | tuple[int, ...]) -> bool:
    return (
        axis in (0, (0,))
        and weight.dim() > 1
        and weight.is_cpu
        and weight.dtype is torch.float32
        and weight.numel() >= LARGE
        and weight.is_contiguous()
    )
