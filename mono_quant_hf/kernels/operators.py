"""The product with a quantized weight, as torch operators with gradients, which `linear` passes by where it can.

`mono_quant::linear` and `mono_quant::linear_backward` are registered by hand rather than as a `custom_op`, whose
wrappers cost more than the product of a small layer. The backward is an operator too, so that a compiled backward
expands nothing whole, and the gradient of the gradient is defined.
"""

from typing import Any

import torch
from torch import Tensor

from . import blocks, cpu, gpu, portable
from .choice import decide, decide_for, decide_int8_for, get_kernel
from .operands import Column, check, check_kinds, check_memory, is_plain

_library = torch.library.Library("mono_quant", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? zero_point, Tensor? bias, str? activations=None) -> Tensor"
)
_library.define("linear_backward(Tensor grad, Tensor weight, Tensor? scale, Tensor? zero_point) -> Tensor")
_ops = torch.ops.mono_quant


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
        activations: `"int8"` rounds x to int8 with a scale for each token, where there are int8 codes and a device
            that gains by it; see `choose`. On a CPU tokens whose values are far apart keep 16 bits.

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
    plain = is_plain(x, weight, scale, zero_point, bias)
    if plain and not _wants_grad(x, bias):
        return _compute(x, weight, scale, zero_point, bias, activations)
    # In plain operations, which a compiler may fuse. Where Triton is, a kernel of ours that reads codes does better
    # than what Inductor makes of them, which is a half-precision weight in memory.
    if get_kernel() == "portable" or not (x.is_cpu or x.is_meta or not gpu.why_missing(x.device)):
        (check if plain else check_kinds)(x, weight, scale, zero_point, bias)
        return _Product.apply(False, None, x, weight, scale, zero_point, bias)
    return _ops.linear.default(x, weight, scale, zero_point, bias, activations)


def linear_backward(
    grad: Tensor, weight: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """The gradient of `linear` to its input: `grad W`, `[..., N]` by `[N, K]`, in the dtype of `grad`.

    Example:
        >>> codes = torch.tensor([[10, -20], [0, 127]], dtype=torch.int8)
        >>> linear_backward(torch.ones(1, 2), codes, scale=torch.tensor([[0.5], [1.0]]))
        tensor([[  5., 117.]])
    """
    return _ops.linear_backward.default(grad, weight, scale, zero_point)


def grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, ends: Tensor
) -> Tensor | None:
    """Rows of x, sorted by expert, by each one's weight, in one launch; None where no device or kernel can.

    Args:
        x: [M, K].
        weight: int8 or float16 [experts, N, K]; scale float32 and zero_point int8 [experts, N, 1], or None.
        ends: integer [experts]: where the rows of each expert end, in rising order.

    Example:
        >>> codes, ends = torch.ones(2, 4, 8, dtype=torch.int8), torch.tensor([1, 3], dtype=torch.int32)
        >>> grouped_linear(torch.ones(3, 8), codes, torch.ones(2, 4, 1), None, ends) is None  # on a CPU
        True
    """
    tokens = max(x.shape[0] // max(len(ends), 1), min(x.shape[0], 1))
    per_row = scale is None or scale.shape[1] == weight.shape[1]
    if x.is_cpu or not per_row or tokens >= gpu.MANY_TOKENS:
        return None
    contiguous = weight.is_contiguous()
    if decide(str(x.device), x.dtype, weight.dtype, tokens, contiguous, False, get_kernel()).name != "triton":
        return None
    return gpu.grouped_linear(x, weight, scale, zero_point, ends)


# ---------------------------------------------------------------- on every device, and as fakes


def _compute(
    x: Tensor, weight: Tensor, scale: Column, zero_point: Column, bias: Column, activations: str | None = None
) -> Tensor:
    """The product by the way chosen, without gradient."""
    usual = check(x, weight, scale, zero_point, bias)
    if activations is not None and scale is not None and decide_int8_for(x, weight).name:
        if x.is_cpu:
            return cpu.linear("int8", x, weight.contiguous(), scale, zero_point, bias, usual)
        return gpu.linear_int8(x, weight.contiguous(), scale, zero_point, bias)
    name = decide_for(x, weight, usual).name
    if name == "portable":
        return portable.linear(x, weight, scale, zero_point, bias)
    if name == "blocks":
        return blocks.linear(x, weight, scale, zero_point, bias)
    if name == "triton":
        return gpu.linear(x, weight, scale, zero_point, bias)
    return cpu.linear(name, x, weight, scale, zero_point, bias, usual)


def _compute_backward(grad: Tensor, weight: Tensor, scale: Column, zero_point: Column) -> Tensor:
    check(grad, weight, scale, zero_point, None, inner=0)
    if grad.is_cpu and grad.dtype != torch.float64 and get_kernel() != "portable":
        return blocks.backward(grad, weight, scale, zero_point)
    return portable.backward(grad, weight, scale, zero_point)


@torch.library.register_fake("mono_quant::linear", lib=_library)
def _(
    x: Tensor, weight: Tensor, scale: Column, zero_point: Column, bias: Column, activations: str | None = None
) -> Tensor:
    check_kinds(x, weight, scale, zero_point, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("mono_quant::linear_backward", lib=_library)
def _(grad: Tensor, weight: Tensor, scale: Column, zero_point: Column) -> Tensor:
    check_kinds(grad, weight, scale, zero_point, None, inner=0)
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


# ---------------------------------------------------------------- autograd


def _wants_grad(x: Tensor, bias: Column = None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


class _Product(torch.autograd.Function):
    """By our operators or by operations of torch's. Keeps the codes, not the expanded weight, from forward to backward.

    The gradient is that of the dequantized weight, also where x is rounded: it passes the rounding as if that were not
    there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        by_operator: bool,
        activations: str | None,
        x: Tensor,
        weight: Tensor,
        scale: Column,
        zero_point: Column,
        bias: Column,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        ctx.by_operator, ctx.bias_dtype = by_operator, None if bias is None else bias.dtype
        if by_operator:
            with torch._C._AutoDispatchBelowAutograd():
                return _ops.linear.default(x, weight, scale, zero_point, bias, activations)
        return portable.linear(x, weight, scale, zero_point, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors
        to_x = to_bias = None
        if ctx.needs_input_grad[2]:
            if not ctx.by_operator and is_plain(grad, weight, scale, zero_point):
                check_memory(weight=weight, scale=scale, zero_point=zero_point)
            backward = linear_backward if ctx.by_operator else portable.backward
            to_x = backward(grad, weight, scale, zero_point)
        if ctx.needs_input_grad[6]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return None, None, to_x, None, None, None, to_bias


class _Gradient(torch.autograd.Function):
    """`grad W` is a product too: its gradient to `grad` is the forward without the bias."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, scale: Column, zero_point: Column) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        with torch._C._AutoDispatchBelowAutograd():
            return linear_backward(grad, weight, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors
        return _ops.linear.default(grad, weight, scale, zero_point, None), None, None, None


def _autograd(
    x: Tensor, weight: Tensor, scale: Column, zero_point: Column, bias: Column, activations: str | None = None
) -> Tensor:
    if _wants_grad(x, bias):
        return _Product.apply(True, activations, x, weight, scale, zero_point, bias)
    # As in compiled code under no_grad: spare the way through the dispatcher.
    if x.is_cpu and is_plain(x, weight, scale, zero_point, bias):
        return _compute(x, weight, scale, zero_point, bias, activations)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.linear.default(x, weight, scale, zero_point, bias, activations)


def _autograd_backward(grad: Tensor, weight: Tensor, scale: Column, zero_point: Column) -> Tensor:
    if _wants_grad(grad):
        return _Gradient.apply(grad, weight, scale, zero_point)
    with torch._C._AutoDispatchBelowAutograd():
        return linear_backward(grad, weight, scale, zero_point)


for _name, _kernel, _above in (
    ("linear", _compute, _autograd),
    ("linear_backward", _compute_backward, _autograd_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _above, "Autograd")
