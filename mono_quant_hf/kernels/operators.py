"""The torch operators `mono_quant::linear_int8`, `linear_fp16` and `linear_int8_activations`, with fake, backward
and autograd.

Registered by hand rather than as a `custom_op`, whose wrappers cost more than the product of a small layer.
The backward is an operator too, so that a compiled backward expands nothing whole, and the gradient of the
gradient is defined.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import blocks, cpu, gpu, int8_activations, portable
from .choice import decide, decide_int8, get_kernel, is_small
from .operands import check, check_kinds
from .plain import is_plain

_library = torch.library.Library("mono_quant", "DEF")
_library.define(
    "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias) -> Tensor"
)
_library.define(
    "linear_int8_activations(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias) -> Tensor"
)
_library.define("linear_fp16(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define(
    "linear_int8_backward(Tensor grad, Tensor weight, Tensor scale, Tensor? zero_point) -> Tensor"
)
_library.define("linear_fp16_backward(Tensor grad, Tensor weight) -> Tensor")
_ops = torch.ops.mono_quant


def compute(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The product by the way chosen, without gradient."""
    return _compute(check(x, weight, scale, zero_point, bias), x, weight, scale, zero_point, bias)


def _compute(
    usual: bool,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`compute` of operands that were checked: `usual` is what `check` gave."""
    n, k = weight.shape
    tokens = x.numel() // k if k else 0
    device = "cpu" if usual or x.is_cpu else str(x.device)
    contiguous = usual or weight.is_contiguous()
    name = decide(device, x.dtype, weight.dtype, tokens, contiguous, is_small(n, k), get_kernel()).name
    if name == "portable":
        return portable.forward(x, weight, scale, zero_point, bias)
    if name == "blocks":
        return blocks.linear(x, weight, scale, zero_point, bias)
    if name == "triton":
        return gpu.linear(x, weight, scale, zero_point, bias)
    return cpu.linear(name, x, weight, scale, zero_point, bias, usual)


# ---------------------------------------------------------------- on the CPU, elsewhere, and as fakes


def _compute_backward(
    grad: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None
) -> Tensor:
    check(grad, weight, scale, zero_point, None, inner=0)
    if grad.is_cpu and grad.dtype != torch.float64 and get_kernel() != "portable":
        return blocks.backward(grad, weight, scale, zero_point)
    return portable.backward(grad, weight, scale, zero_point)


_library.impl("linear_int8", compute, "CompositeExplicitAutograd")
_library.impl("linear_int8_backward", _compute_backward, "CompositeExplicitAutograd")


def _takes_int8(x: Tensor, weight: Tensor) -> bool:
    n, k = weight.shape
    tokens = x.numel() // k if k else 0
    device = "cpu" if x.is_cpu else x.device.type
    choice = decide_int8(device, x.dtype, weight.dtype, tokens, n, k, is_small(n, k), get_kernel())
    return choice.name == "int8"


def _compute_int8_activations(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    usual = check(x, weight, scale, zero_point, bias)
    if not _takes_int8(x, weight):
        return _compute(usual, x, weight, scale, zero_point, bias)
    return int8_activations.forward(x, weight, scale, zero_point, bias)


_library.impl("linear_int8_activations", _compute_int8_activations, "CompositeExplicitAutograd")


def _linear_fp16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return compute(x, weight, None, None, bias)


def _linear_fp16_backward(grad: Tensor, weight: Tensor) -> Tensor:
    return _compute_backward(grad, weight, None, None)


_library.impl("linear_fp16", _linear_fp16, "CompositeExplicitAutograd")
_library.impl("linear_fp16_backward", _linear_fp16_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("mono_quant::linear_int8", lib=_library)
@torch.library.register_fake("mono_quant::linear_int8_activations", lib=_library)
def _(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    return _fake_product(x, weight, scale, zero_point, bias)


@torch.library.register_fake("mono_quant::linear_fp16", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _fake_product(x, weight, None, None, bias)


@torch.library.register_fake("mono_quant::linear_int8_backward", lib=_library)
def _(grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return _fake_product(grad, weight, scale, zero_point, None, inner=0)


@torch.library.register_fake("mono_quant::linear_fp16_backward", lib=_library)
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return _fake_product(grad, weight, None, None, None, inner=0)


def _fake_product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    inner: int = 1,
) -> Tensor:
    check_kinds(x, weight, scale, zero_point, bias, inner)
    return x.new_empty((*x.shape[:-1], weight.shape[1 - inner]))


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


# ---------------------------------------------------------------- autograd


class _Linear(torch.autograd.Function):
    """Keeps the codes, not the expanded weight, from forward to backward. The gradient is that of the dequantized
    weight, also where the operator rounds x: it passes the rounding as if that were not there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operator: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        portable.keep(ctx, weight, scale, zero_point, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, weight, scale, zero_point, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors
        to_x = call_backward(grad, weight, scale, zero_point) if ctx.needs_input_grad[1] else None
        to_bias = None
        if ctx.needs_input_grad[5]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return None, to_x, None, None, None, to_bias


class _LinearBackward(torch.autograd.Function):
    """`grad W` is a product too: its gradient to `grad` is the forward without the bias."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        with torch._C._AutoDispatchBelowAutograd():
            return call_backward(grad, weight, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors
        return call(grad, weight, scale, zero_point, None), None, None, None


def call(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The operator for this weight."""
    if scale is None:
        return _ops.linear_fp16.default(x, weight, bias)
    return _ops.linear_int8.default(x, weight, scale, zero_point, bias)


def call_int8_activations(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """The product with int8 activations; None where the device has none and the layer computes as without."""
    plain = is_plain(x, weight, scale, zero_point, bias)
    if x.is_cpu:
        if plain and not _wants_grad(x, bias):
            return _compute_int8_activations(x, weight, scale, zero_point, bias)
        return _ops.linear_int8_activations.default(x, weight, scale, zero_point, bias)
    (check if plain else check_kinds)(x, weight, scale, zero_point, bias)
    if x.is_meta or not _takes_int8(x, weight):
        return None
    return int8_activations.Int8Activations.apply(x, weight, scale, zero_point, bias)


def call_backward(grad: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """The operator of the gradient to x."""
    if scale is None:
        return _ops.linear_fp16_backward.default(grad, weight)
    return _ops.linear_int8_backward.default(grad, weight, scale, zero_point)


def _wants_grad(x: Tensor, bias: Tensor | None = None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _autograd_int8(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    if _wants_grad(x, bias):
        return _Linear.apply(call, x, weight, scale, zero_point, bias)
    # As in compiled code under no_grad: spare the way through the dispatcher.
    if x.is_cpu and is_plain(x, weight, scale, zero_point, bias):
        return compute(x, weight, scale, zero_point, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return call(x, weight, scale, zero_point, bias)


def _autograd_int8_activations(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    if _wants_grad(x, bias):
        return _Linear.apply(_ops.linear_int8_activations.default, x, weight, scale, zero_point, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.linear_int8_activations.default(x, weight, scale, zero_point, bias)


def _autograd_fp16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _wants_grad(x, bias):
        return _Linear.apply(call, x, weight, None, None, bias)
    if x.is_cpu and is_plain(x, weight, bias=bias):
        return compute(x, weight, None, None, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return call(x, weight, None, None, bias)


def _autograd_int8_backward(grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if _wants_grad(grad):
        return _LinearBackward.apply(grad, weight, scale, zero_point)
    with torch._C._AutoDispatchBelowAutograd():
        return call_backward(grad, weight, scale, zero_point)


def _autograd_fp16_backward(grad: Tensor, weight: Tensor) -> Tensor:
    if _wants_grad(grad):
        return _LinearBackward.apply(grad, weight, None, None)
    with torch._C._AutoDispatchBelowAutograd():
        return call_backward(grad, weight, None, None)


_library.impl("linear_int8", _autograd_int8, "Autograd")
_library.impl("linear_int8_activations", _autograd_int8_activations, "Autograd")
_library.impl("linear_fp16", _autograd_fp16, "Autograd")
_library.impl("linear_int8_backward", _autograd_int8_backward, "Autograd")
_library.impl("linear_fp16_backward", _autograd_fp16_backward, "Autograd")
