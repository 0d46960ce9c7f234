"""Expand a block of rows to float32, multiply by torch's float matmul, go on with the next block.

Never more than a block is expanded at a time, forward and backward. Needs nothing but torch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .codes import expand_into
from .operands import Column
from .portable import part_of, slices, without_autocast

BLOCK_BYTES = 32 << 20  # of expanded weight; less starts more parallel loops, and a narrow matmul is slower


def linear(x: Tensor, weight: Tensor, scale: Column, zero_point: Column, bias: Column) -> Tensor:
    """`x Wᵀ + b` in float32, in x's dtype at the end. No gradient; on the CPU."""
    n, k = weight.shape
    flat = x.reshape(-1, k).float()
    out = torch.empty(flat.shape[0], n, dtype=torch.float32, device=x.device)
    cast_bias = None if bias is None else bias.float()
    with without_autocast(x.device):
        for rows, part in _expanded(weight, scale, zero_point):
            if cast_bias is None:
                torch.mm(flat, part.t(), out=out[:, rows])
            else:
                torch.addmm(cast_bias[rows], flat, part.t(), out=out[:, rows])
    return out.to(x.dtype).reshape(*x.shape[:-1], n)


def backward(grad: Tensor, weight: Tensor, scale: Column, zero_point: Column) -> Tensor:
    """`grad W` in float32, in grad's dtype at the end."""
    n, k = weight.shape
    flat = grad.reshape(-1, n).float()
    to_x = torch.zeros(flat.shape[0], k, dtype=torch.float32, device=grad.device)
    with without_autocast(grad.device):
        for rows, part in _expanded(weight, scale, zero_point):
            to_x.addmm_(flat[:, rows], part)
    return to_x.to(grad.dtype).reshape(*grad.shape[:-1], k)


def _expanded(weight: Tensor, scale: Column, zero_point: Column) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of the weight after the other, all in the same memory."""
    n, k = weight.shape
    most = min(n, max(BLOCK_BYTES // (4 * max(k, 1)), 32))
    block = torch.empty(most, k, dtype=torch.float32, device=weight.device)
    for rows in slices(n, most):
        part = block[: rows.stop - rows.start]
        yield rows, expand_into(part, weight[rows], part_of(scale, rows), part_of(zero_point, rows))
