"""Which of its two neighbouring codes each weight gets, when the nearest is not the best for the layer's output.

The scales and zero-points are given; the format stays that of `quantize_to_codes`. Everything is on plain matrices
`[..., channels, inputs]`, so that the groups of a convolution are just leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mappers import INT8_MAX, INT8_MIN


def round_balanced(weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Round so that the errors of each row sum to almost nothing, without any data.

    Starting from the nearest codes, the `n` weights that came closest to the other neighbour are moved to it, with
    `n` the sum of the row's rounding errors in steps, rounded. An input whose elements share a common mean, such as
    what a ReLU gives, then meets an error of at most half a step instead of one that grows with the root of the row's
    length. This is the channel-wise flip of SQuant (Guo et al. 2022, "SQuant: On-the-Fly Data-Free Quantization via
    Diagonal Hessian Approximation", algorithm 2).

    Args:
        weight: floating-point `[..., channels, inputs]`.
        scale: float32 `[..., channels, 1]`.
        zero_point: int8 as the scale, or None when symmetric.

    Returns:
        int8 codes as the weight.

    Example:
        >>> import torch
        >>> row = torch.tensor([[1.45, 2.4, 3.3, -0.1]])
        >>> round_balanced(row, torch.ones(1, 1)).tolist()  # the nearest are 1, 2, 3, 0, too little by 1.05
        [[2, 2, 3, 0]]
    """
    exact, low, high = _steps(weight, scale, zero_point)
    codes = exact.round().clamp(low, high)
    missing = exact - codes  # of each code, in steps: at most half, but where the code is the first or last
    wanted = missing.sum(-1, keepdim=True).round()
    direction = wanted.sign()
    room = (codes + direction).clamp(low, high) != codes
    # A weight on the other side of its code would be moved by more than a step: it is never a candidate.
    gain = torch.where(room & (missing * direction > 0), missing * direction, -1.0)
    rank = gain.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    codes += torch.where((rank < wanted.abs()) & (gain > 0), direction, torch.zeros_like(direction))
    return codes.to(torch.int8)


def round_compensated(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    hessian: Tensor,
    *,
    damping: float = 0.1,
    sweeps: int = 0,
    block_size: int = 128,
) -> Tensor:
    """Round a layer's weights one input after the other, each making up for the errors of those before.

    Minimizes `trace((Q - W) H (Q - W)ᵀ)`, the squared error of the layer's output for inputs with the second moments
    `H = E[x xᵀ]`, in the way of GPTQ (Frantar et al. 2022, algorithm 1), inputs with the largest `H[j, j]` first.
    A channel that the nearest codes serve better keeps them.
    Each sweep afterwards goes through all inputs once more and moves every code to the best one given all others.

    Args:
        weight: floating-point `[..., channels, inputs]`.
        scale: float32 `[..., channels, 1]`.
        zero_point: int8 as the scale, or None when symmetric.
        hessian: float32 `[..., inputs, inputs]`, symmetric, positive semidefinite.
        damping: added to the diagonal, as a share of its mean: how much the inputs are mistrusted.
        sweeps: of coordinate descent after the first pass.
        block_size: inputs whose errors are passed on together, for speed; no influence on the result but rounding.

    Returns:
        int8 codes as the weight.

    Raises:
        ValueError: the shapes do not fit, or the Hessian holds NaN or infinite values.

    Example:
        >>> import torch
        >>> weight, scale = torch.tensor([[0.4, 0.4, 0.4]]), torch.ones(1, 1)
        >>> round_compensated(weight, scale, None, torch.ones(3, 3)).sum().item()  # inputs that are always equal
        1
        >>> round_compensated(weight, scale, None, torch.eye(3)).sum().item()  # inputs that have nothing in common
        0
    """
    inputs = weight.shape[-1]
    if hessian.shape != (*weight.shape[:-2], inputs, inputs):
        raise ValueError(
            f"The Hessian has shape {tuple(hessian.shape)} where a weight of shape {tuple(weight.shape)} needs "
            f"{(*weight.shape[:-2], inputs, inputs)}."
        )
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("The Hessian holds NaN or infinite values; the calibration inputs overflow.")
    exact, low, high = _steps(weight, scale, zero_point)
    hessian = damped(hessian, damping)
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
    columns = order.unsqueeze(-2).expand_as(exact)
    exact = exact.gather(-1, columns)
    hessian = hessian.gather(-2, order.unsqueeze(-1).expand_as(hessian))
    hessian = hessian.gather(-1, order.unsqueeze(-2).expand_as(hessian))

    codes = _pass_errors_on(exact.clone(), hessian, low, high, block_size)
    for _ in range(sweeps):
        _descend(codes, exact, hessian, low, high, block_size)
    # A greedy search has no promise to keep: where the nearest codes are better after all, they are taken.
    nearest = exact.round().clamp_(low, high)
    codes = torch.where(_loss(nearest - exact, hessian) < _loss(codes - exact, hessian), nearest, codes)
    return torch.empty_like(codes).scatter_(-1, columns, codes).to(torch.int8)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian with `damping` times the mean of its diagonal added to it; inputs that are always 0 get 1.

    Args:
        hessian: float32 `[..., inputs, inputs]`.
        damping: a share, from 0.

    Returns:
        a new tensor of the same shape.
    """
    result = hessian.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    added = damping * diagonal.mean(dim=-1, keepdim=True)
    dead = diagonal <= 0
    diagonal += added
    diagonal[dead] = 1.0
    return result


def factorized(hessian: Tensor) -> Tensor:
    """The lower Cholesky factor; a Hessian too close to singular is damped, ten times more until it works."""
    for extra in (0.0, 1e-4, 1e-3, 1e-2, 1e-1):
        factor, info = torch.linalg.cholesky_ex(damped(hessian, extra) if extra else hessian)
        if not bool(info.any()):
            return factor
    raise ValueError("The Hessian is not positive semidefinite; the calibration inputs overflow.")


def _steps(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, int, int]:
    """The weight in steps of the grid, float32, with the zero-point added, and the lowest and highest code."""
    steps = weight.detach().float() * (1.0 / scale)
    if zero_point is None:
        return steps, -INT8_MAX, INT8_MAX
    return steps + zero_point, INT8_MIN, INT8_MAX


def _pass_errors_on(exact: Tensor, hessian: Tensor, low: float, high: float, block_size: int) -> Tensor:
    """GPTQ proper; `exact` is consumed."""
    inverse = torch.cholesky_inverse(factorized(hessian))
    upper = factorized(inverse).mT
    codes = torch.empty_like(exact)
    inputs = exact.shape[-1]
    for begin in range(0, inputs, block_size):
        end = min(begin + block_size, inputs)
        block = exact[..., begin:end]
        errors = torch.empty_like(block)
        for j in range(end - begin):
            row = upper[..., begin + j, begin + j : end]
            value = block[..., j]
            code = value.round().clamp_(low, high)
            error = (value - code) / row[..., :1]
            block[..., j:] -= error.unsqueeze(-1) * row.unsqueeze(-2)
            errors[..., j] = error
            codes[..., begin + j] = code
        exact[..., end:] -= errors @ upper[..., begin:end, end:]
    return codes


def _loss(error: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each channel's output, `[..., channels, 1]`."""
    return ((error @ hessian) * error).sum(-1, keepdim=True)


def _descend(codes: Tensor, exact: Tensor, hessian: Tensor, low: float, high: float, block_size: int) -> None:
    """One sweep of coordinate descent, in place: each code becomes the best given all the others."""
    gradient = (codes - exact) @ hessian
    inputs = exact.shape[-1]
    for begin in range(0, inputs, block_size):
        end = min(begin + block_size, inputs)
        block = gradient[..., begin:end].clone()
        moves = torch.zeros_like(block)
        for j in range(end - begin):
            row = hessian[..., begin + j, begin:end]
            old = codes[..., begin + j]
            new = (old - block[..., j] / row[..., j : j + 1]).round().clamp_(low, high)
            move = new - old
            block += move.unsqueeze(-1) * row.unsqueeze(-2)
            moves[..., j] = move
            codes[..., begin + j] = new
        gradient += moves @ hessian[..., begin:end, :]
