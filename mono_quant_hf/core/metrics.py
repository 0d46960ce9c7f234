"""How far an approximation is from what it stands for."""

import math

import torch
from torch import Tensor


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: `10 log10(sum(reference²) / sum((reference - approximation)²))`.

    Args:
        reference: floating-point, any shape.
        approximation: of the same shape.

    Returns:
        dB, computed in float64; `inf` where both are equal, `-inf` for a zero reference that is not met.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> round(sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])), 6)
        20.0
    """
    if reference.shape != approximation.shape:
        raise ValueError(
            f"The reference has shape {tuple(reference.shape)} and the approximation {tuple(approximation.shape)}; "
            "SQNR compares tensors of one shape."
        )
    exact = reference.detach().to(torch.float64)
    noise = float((exact - approximation.detach().to(torch.float64)).square().sum())
    signal = float(exact.square().sum())
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """`10 log10(signal / noise)`: `inf` without noise, `-inf` with noise alone.

    Args:
        signal, noise: sums of squares, such as those of the parts of a tensor added up.

    Example:
        >>> decibels(100.0, 1.0), decibels(0.0, 0.0)
        (20.0, inf)
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
