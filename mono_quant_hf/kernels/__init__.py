"""`y = x Wᵀ + b` for weights kept as int8 codes or as float16: tensors in, tensors out."""

import torch
from torch import Tensor

from . import expansion, gpu, operators, portable
from .choice import KERNELS, Choice, choose, get_kernel, set_kernel, use_kernel
from .expansion import look_up
from .operands import check, check_kinds
from .operators import grouped_linear
from .plain import is_plain
from .quantization import quantize

__all__ = [
    "KERNELS",
    "Choice",
    "choose",
    "expand",
    "get_kernel",
    "grouped_linear",
    "linear",
    "linear_backward",
    "look_up",
    "quantize",
    "set_kernel",
    "use_kernel",
]


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activations: str | None = None,
) -> Tensor:
    """`x Wᵀ + b` with `W = (weight - zero_point) * scale`, or `W = weight` for a float16 weight.

    Args:
        x: [..., K], any floating dtype.
        weight: [N, K], int8 codes, or float16.
        scale: [N, 1] float32 for int8 codes; None for float16.
        zero_point: [N, 1] int8, or None for symmetric codes.
        bias: [N] floating, or None.
        activations: `"int8"` rounds x to int8 with a scale for each token, but for its outlier columns, where
            there are int8 codes, 17 tokens or more and a device that gains by it; see `choose`.

    Returns:
        [..., N] in the dtype of `x`, with and without autocast.

    Raises:
        TypeError: `x` is not floating; `weight`, `scale` and `zero_point` are neither of the two kinds.
        RuntimeError: a shape or a device that does not fit; memory that was freed.

    Weight, scale and zero-point are constants: gradients flow to `x` and to `bias`, exactly those of the
    dequantized weight, which is not kept between forward and backward.

    Example:
        >>> codes = torch.tensor([[10, -20], [0, 127]], dtype=torch.int8)
        >>> linear(torch.ones(1, 2), codes, scale=torch.tensor([[0.5], [1.0]]))
        tensor([[ -5., 127.]])
    """
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if activations is not None and scale is not None:
        result = operators.call_int8_activations(x, weight, scale, zero_point, bias)
        if result is not None:
            return result
    plain = is_plain(x, weight, scale, zero_point, bias)
    if plain and not wants_grad:
        return operators.compute(x, weight, scale, zero_point, bias)
    if get_kernel() == "portable" or not (x.is_cpu or x.is_meta or not gpu.why_missing(x.device)):
        # In plain operations, which a compiler may fuse. Where Triton is, a kernel of ours that reads codes does better
        # than what Inductor makes of them, which is a half-precision weight in memory.
        (check if plain else check_kinds)(x, weight, scale, zero_point, bias)
        return portable.linear(x, weight, scale, zero_point, bias)
    return operators.call(x, weight, scale, zero_point, bias)


def linear_backward(
    grad: Tensor, weight: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """The gradient of `linear` to its input: `grad W`, `[..., N]` by `[N, K]`, in the dtype of `grad`.

    Example:
        >>> codes = torch.tensor([[10, -20], [0, 127]], dtype=torch.int8)
        >>> linear_backward(torch.ones(1, 2), codes, scale=torch.tensor([[0.5], [1.0]]))
        tensor([[  5., 117.]])
    """
    return operators.call_backward(grad, weight, scale, zero_point)


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
    return expansion.expand(weight, scale, zero_point, dtype)
