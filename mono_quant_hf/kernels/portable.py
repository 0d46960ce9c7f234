"""The portable way, in torch's own operations: right on every device and dtype torch knows, `meta` included.

On a CPU it expands the codes to floats and multiplies: the reference that the faster ways are tested against, and what
they fall back to. Elsewhere some rows at a time are turned into x's dtype, exactly: torch's matmul, the scales on its
result. A difference code - zero_point lies in [-255, 255], which bfloat16 and float16 hold exactly; so nothing of the
weight is rounded, and a weight costs 5 bytes of traffic (1 read, 2 written, 2 read by the matmul) where a float16 one
costs 2. Memory is bounded by `BLOCK_BYTES`, not by the layer. A compiler fuses both.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from .operands import Column

BLOCK_BYTES = 64 << 20
_BY_ROWS = (torch.float32, torch.bfloat16, torch.float16)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast changes nothing on `device` (free when it is off already)."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def expand(weight: Tensor, scale: Column, zero_point: Column, dtype: torch.dtype = torch.float32) -> Tensor:
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


def linear(x: Tensor, weight: Tensor, scale: Column, zero_point: Column, bias: Column) -> Tensor:
    """`x Wᵀ + b` in x's dtype. No gradient: see `backward`."""
    dtype = compute_dtype(x)
    with without_autocast(x.device):
        if not x.is_cpu and x.dtype in _BY_ROWS:
            return linear_by_rows(x, weight, scale, zero_point, bias)
        full = expand(weight, scale, zero_point, dtype)
        return functional.linear(x.to(dtype), full, None if bias is None else bias.to(dtype)).to(x.dtype)


def backward(grad: Tensor, weight: Tensor, scale: Column, zero_point: Column) -> Tensor:
    """The gradient to x, `grad W`, from a fresh expansion: nothing expanded was kept since the forward."""
    dtype = compute_dtype(grad)
    with without_autocast(grad.device):
        if not grad.is_cpu and grad.dtype in _BY_ROWS:
            return backward_by_rows(grad, weight, scale, zero_point)
        return (grad.to(dtype) @ expand(weight, scale, zero_point, dtype)).to(grad.dtype)


def linear_by_rows(x: Tensor, weight: Tensor, scale: Column, zero_point: Column, bias: Column) -> Tensor:
    """`linear` by some rows of the weight at a time; x is float32, bfloat16 or float16."""
    n, k = weight.shape
    flat = x.reshape(-1, k)
    blocks = row_blocks(n, k, x.dtype)
    out = None if len(blocks) == 1 else x.new_empty(flat.shape[0], n)
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


def backward_by_rows(grad: Tensor, weight: Tensor, scale: Column, zero_point: Column) -> Tensor:
    """`backward` by some rows of the weight at a time."""
    n, k = weight.shape
    flat = grad.reshape(-1, n)
    total: Column = None
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


def part_of(column: Column, rows: slice) -> Column:
    """Those rows of a scale or zero-point, if there is one."""
    return None if column is None else column[rows]


def _exact(weight: Tensor, scale: Column, zero_point: Column, dtype: torch.dtype) -> tuple[Tensor, Column]:
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
