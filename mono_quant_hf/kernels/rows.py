"""The plain way off the CPU: some rows at a time in x's dtype, exactly, torch's matmul, the scales on its result.

A difference code - zero_point lies in [-255, 255], which bfloat16 and float16 hold exactly; so nothing of the weight is
rounded, and a weight costs 5 bytes of traffic (1 read, 2 written, 2 read by the matmul) where a float16 one costs 2.
Memory is bounded by `BLOCK_BYTES`, not by the layer. In operations of torch's alone: a compiler fuses them.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of x: what it computes in."""


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast changes nothing on `device` (free when it is off already)."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x Wᵀ + b` in x's dtype: float32, bfloat16 or float16. No gradient; operands as for `kernels.linear`."""
    n, k = weight.shape
    flat = x.reshape(-1, k)
    blocks = row_blocks(n, k, x.dtype)
    out = None if len(blocks) == 1 else x.new_empty(flat.shape[0], n)
    with without_autocast(x.device):
        for rows in blocks:
            exact, rest = _exact(weight[rows], part_of(scale, rows), part_of(zero_point, rows), x.dtype)
            part = _matmul(flat, exact.t())
            if rest is not None:
                part = part * rest.t()
            if bias is not None:
                part = part + bias[rows].to(part.dtype)
            if out is None:
                return part.to(x.dtype).reshape(*x.shape[:-1], n)
            out[:, rows] = part
    assert out is not None
    return out.reshape(*x.shape[:-1], n)


def backward(grad: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """`grad W`, the gradient to x, in grad's dtype."""
    n, k = weight.shape
    flat = grad.reshape(-1, n)
    total: Tensor | None = None
    with without_autocast(grad.device):
        for rows in row_blocks(n, k, grad.dtype):
            exact, rest = _exact(weight[rows], part_of(scale, rows), part_of(zero_point, rows), grad.dtype)
            scaled = flat[:, rows] if rest is None else (flat[:, rows] * rest.t()).to(grad.dtype)
            part = _matmul(scaled, exact)
            total = part if total is None else total + part
    assert total is not None
    return total.to(grad.dtype).reshape(*grad.shape[:-1], k)


def row_blocks(n: int, k: int, dtype: torch.dtype) -> list[slice]:
    """The rows of a weight [n, k], cut so that no block takes more than `BLOCK_BYTES` in `dtype`."""
    rows = BLOCK_BYTES // (dtype.itemsize * max(k, 1))
    return slices(n, max(rows // 128 * 128, 32))  # at odd places a GPU's matmul takes three times as long


def slices(n: int, rows: int) -> list[slice]:
    """`n` rows in blocks of `rows`, the last perhaps shorter."""
    return [slice(start, min(start + rows, n)) for start in range(0, n, max(rows, 1))]


def part_of(column: Tensor | None, rows: slice) -> Tensor | None:
    """Those rows of a scale or zero-point, if there is one."""
    return None if column is None else column[rows]


def _exact(
    weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A weight in `dtype`, and the float32 [rows, 1] that is still to be multiplied with its products.

    In float16 products could leave the range that the true ones keep. There the codes take the power of two in their
    scale, which is exact too, and what is left of it lies in [1, 2).
    """
    if scale is None:
        return weight.to(dtype), None
    if dtype != torch.float16:
        return (weight.to(dtype) if zero_point is None else weight - zero_point.to(dtype)), scale
    power = torch.exp2(scale.log2().floor().clamp(-16, 8))
    half = power.to(dtype)
    exact = weight * half if zero_point is None else torch.addcmul(-(zero_point * half), weight, half)
    return exact, scale / power


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product with float32 sums: kept as float32 where torch gives them out (CUDA), else in the operands' dtype."""
    if left.is_cuda and left.dtype != torch.float32 and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
