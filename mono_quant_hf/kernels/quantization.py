"""Floats to codes, in one pass where the compiled kernels can, else core's way: the same numbers."""

import torch
from torch import Tensor

from mono_quant_hf.core import quantize_to_codes

from . import cpu
from .operands import check_memory
from .plain import is_plain

LARGE = 2**18  # elements; smaller weights are not worth loading the kernels for


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
    if not plain or not _rows_of_floats(weight, axis) or cpu.load() is None:
        return quantize_to_codes(weight, symmetric, axis)
    shape = [len(weight)] + [1] * (weight.dim() - 1)
    codes = weight.new_empty(weight.shape, dtype=torch.int8)  # on its device, whatever the default one is
    scale = weight.new_empty(shape)
    zero_point = None if symmetric else weight.new_empty(shape, dtype=torch.int8)
    cpu.encode(weight, codes, scale, zero_point)
    if not bool(torch.isfinite(scale).all()):
        return quantize_to_codes(weight, symmetric, axis)  # which says what is wrong
    return codes, scale, zero_point


def _rows_of_floats(weight: Tensor, axis: int | tuple[int, ...]) -> bool:
    return (
        axis in (0, (0,))
        and weight.dim() > 1
        and weight.is_cpu
        and weight.dtype is torch.float32
        and weight.numel() >= LARGE
        and weight.is_contiguous()
    )
