"""A quantized weight to look at as the float weight that it stands for: `module.weight` of a quantized module.

No analysis of source can foresee every reader of a weight. So whoever reads it gets a tensor of the float weight's
shape, dtype and device. Products, look-ups and convolutions by it go to the kernels; what only looks at it from another
side (a transposition, a slice, one expert of many, a cast) gives another such view; anything else works on the
dequantized weight, which lives as long as the operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from mono_quant_hf import kernels
from mono_quant_hf.kernels.convolution import convolution
from mono_quant_hf.kernels.operands import is_plain

_ATEN = torch.ops.aten


def float_weight(
    stored: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    dtype: torch.dtype,
    activations: str | None = None,
) -> Tensor:
    """The float weight that stored tensors stand for, in `dtype`: a `FloatView`.

    While a graph is captured (torch.compile, export, tracing, function transforms), the dequantizing expression itself,
    which a compiler fuses with what is done with it.

    Args:
        stored: int8 codes or a float16 weight, of any shape.
        scale: float32 that broadcasts against `stored`; None for a float16 weight.
        zero_point: int8 as the scale; None for symmetric codes.
        dtype: floating.
        activations: as for `kernels.linear`.
    """
    if not is_plain(stored, stored if scale is None else scale):
        return kernels.expand(stored.detach(), scale, zero_point, dtype)
    view = FloatView(stored.detach(), scale, zero_point, dtype, activations)
    view.whole = True
    return view


class FloatView(Tensor):
    """What `float_weight` gives in eager mode. It has no gradient, and cannot be changed in place.

    Save that the weight as a whole can be multiplied or divided by a positive number, which its scales are then: RWKV
    does so as it starts to infer.

    Example:
        >>> from mono_quant_hf.modules import quantize_linear_module
        >>> weight = quantize_linear_module(torch.nn.Linear(4, 2)).weight
        >>> weight.shape, weight.dtype, type(weight.T).__name__, type(weight + 1).__name__
        (torch.Size([2, 4]), torch.float32, 'FloatView', 'Tensor')
        >>> weight.zero_()
        Traceback (most recent call last):
            ...
        RuntimeError: Expected no change of a quantized weight in place, got aten::zero_; dequantize() the model \
first, or work on a copy (weight.clone()).
    """

    stored: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    activations: str | None
    whole: bool = False  # not a part, or another side, of the weight of a module

    _is_hf_initialized = True  # transformers draws no random numbers into a tensor that says so

    @staticmethod
    def __new__(
        cls,
        stored: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        dtype: torch.dtype,
        activations: str | None = None,
    ) -> FloatView:
        view: FloatView = Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=dtype, device=stored.device
        )
        view.stored, view.scale, view.zero_point, view.activations = stored, scale, zero_point, activations
        return view

    def expanded(self) -> Tensor:
        """The dequantized weight, an ordinary tensor."""
        return kernels.expand(self.stored, self.scale, self.zero_point, self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FloatView({self.expanded()!r})"

    def _each(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scale, zero_point = (None if t is None else change(t) for t in (self.scale, self.zero_point))
        return change(self.stored), scale, zero_point

    def _like(
        self,
        tensors: tuple[Tensor, Tensor | None, Tensor | None],
        dtype: torch.dtype | None = None,
    ) -> FloatView:
        return FloatView(*tensors, dtype or self.dtype, self.activations)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and _is_weight(args, kwargs):
            return _linear(*args, **kwargs)
        if func is Tensor.contiguous:
            return args[0]
        if func in _OF_MEMORY:
            return func(args[0].stored, *args[1:], **kwargs)
        if func in _OF_VALUES:
            args, kwargs = _expanded((args, kwargs))
            return func(*args, **kwargs)
        if func in _SETTERS and not any(argument is None or argument is False for argument in args[1:]):
            raise _unchangeable(_SETTERS[func])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RESCALING and _rescale(func, *args, **kwargs):
            return args[0]
        if func._schema.is_mutable:
            _refuse_change(func, args, kwargs)
        handler: Any = _HANDLERS.get(func) or _HANDLERS_BY_NAME.get(func._schema.name)
        if handler is None and func.is_view and func not in _VIEWS_OF_BYTES:
            handler = _view
        if handler is not None:
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = _expanded((args, kwargs))
        return func(*args, **kwargs)


def _expanded(tree: Any) -> Any:
    return tree_map(lambda value: value.expanded() if isinstance(value, FloatView) else value, tree)


def _unchangeable(how: str) -> RuntimeError:
    return RuntimeError(
        f"Expected no change of a quantized weight in place, got {how}; dequantize() the model first, or work on a "
        "copy (weight.clone())."
    )


def _rescale(func: Any, view: Any, factor: Any, **options: Any) -> bool:
    """Multiply or divide the weight that a view shows, if it can be done."""
    if not isinstance(view, FloatView) or not view.whole or isinstance(factor, Tensor) or options:
        return False
    if not 0 < factor < math.inf:
        return False
    func(view.stored if view.scale is None else view.scale, factor)
    return True


def _refuse_change(func: Any, args: Any, kwargs: Any) -> None:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written = value if isinstance(value, (list, tuple)) else (value,)
            if any(isinstance(tensor, FloatView) for tensor in written):
                raise _unchangeable(func._schema.name)


_RESCALING = (_ATEN.mul_.Tensor, _ATEN.div_.Tensor)
# What asks for the memory of a tensor gets that of the codes; so it can be told which weights are one.
_OF_MEMORY = frozenset((Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.is_shared))
# What reads values without an operation that could be dispatched.
_OF_VALUES = frozenset(
    (
        Tensor.numpy,
        Tensor.tolist,
        Tensor.__array__,
        Tensor.__deepcopy__,
        Tensor.__reduce_ex__,
        Tensor.__dlpack__,
        Tensor.__format__,
    )
)
_ATTRIBUTES: Any = Tensor
_SETTERS = {
    Tensor.requires_grad_: "requires_grad_()",
    _ATTRIBUTES.requires_grad.__set__: "requires_grad = True",
    _ATTRIBUTES.grad.__set__: "a gradient",
    _ATTRIBUTES.data.__set__: "other data",
    Tensor.share_memory_: "share_memory_()",
    Tensor.set_: "set_()",
    Tensor.apply_: "apply_()",
    Tensor.map_: "map_()",
}


# ---------------------------------------------------------------- products


def _is_weight(args: Any, kwargs: Any) -> bool:
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    return isinstance(weight, FloatView) and not isinstance(args[0] if args else kwargs["input"], FloatView)


def _linear(input: Tensor, weight: FloatView, bias: Tensor | None = None) -> Tensor:
    bias = _expanded(bias)
    product = _product(input, weight.t(), bias) if weight.dim() == 2 else NotImplemented
    return F.linear(input, weight.expanded(), bias) if product is NotImplemented else product


def _product(x: Any, right: Any, bias: Tensor | None = None) -> Any:
    """`x @ right + bias` for a view `[K, N]`, `x` `[..., K]`, by a kernel; NotImplemented where none can."""
    if not isinstance(right, FloatView) or isinstance(x, FloatView):
        return NotImplemented
    scale = right.scale
    if scale is None or scale.shape[0] == 1:  # the scales are those of the output features
        return kernels.linear(x, *right._each(Tensor.t), bias, right.activations)
    if scale.shape[1] == 1 and bias is None:
        return kernels.linear_backward(x, right.stored, scale, right.zero_point)
    return NotImplemented


def _mm(func: Any, left: Any, right: Any) -> Any:
    if isinstance(left, FloatView) and not isinstance(right, FloatView):
        product = _product(right.t(), left.t())
        return NotImplemented if product is NotImplemented else product.t()
    return _product(left, right)


def _addmm(func: Any, bias: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or isinstance(bias, FloatView) or bias.dim() != 1:
        return NotImplemented
    if isinstance(left, FloatView):
        product = _mm(_ATEN.mm.default, left, right)
        return NotImplemented if product is NotImplemented else product + bias
    return _product(left, right, bias)


def _bmm(func: Any, left: Any, right: Any) -> Any:
    products = [_mm(_ATEN.mm.default, *pair) for pair in zip(left, right, strict=True)]
    if not products or any(product is NotImplemented for product in products):
        return NotImplemented
    return torch.stack(products)


def _grouped_mm(func: Any, input: Any, weight: Any, offs: Any = None, *rest: Any, **options: Any) -> Any:
    """Rows of the input, sorted by expert, by each one's weight: `offs` are the ends of the experts' rows."""
    if isinstance(input, FloatView) or input.dim() != 2 or weight.dim() != 3 or offs is None:
        return NotImplemented
    if isinstance(weight, FloatView) and weight.activations is None:
        product = kernels.grouped_linear(input, *weight._each(lambda tensor: tensor.mT), offs)
        if product is not None:
            return product
    output = input.new_zeros(input.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            output[start:end] = input[start:end] @ weight[expert]
        start = end
    return output


def _convolution(func: Any, x: Any, weight: Any, bias: Any, *geometry: Any) -> Any:
    if not isinstance(weight, FloatView) or isinstance(x, FloatView):
        return NotImplemented
    return convolution(x, weight.stored, weight.scale, weight.zero_point, _expanded(bias), geometry)


# ---------------------------------------------------------------- other sides of the same weight


def _embedding(func: Any, weight: Any, indices: Tensor, *options: Any) -> Any:
    if not isinstance(weight, FloatView) or weight.dim() != 2:
        return NotImplemented
    return kernels.look_up(indices, weight.stored, weight.scale, weight.zero_point, weight.dtype)


def _view(func: Any, view: FloatView, *args: Any, **kwargs: Any) -> Any:
    """Any operation that gives a view: applied to the codes, and to scales and zero-points as if each code had one."""

    def of_each(tensor: Tensor | None) -> Any:
        try:
            return None if tensor is None else func(tensor.expand(view.shape), *args, **kwargs)
        except RuntimeError:  # rows are joined, which have a scale each
            return None if tensor is None else func(tensor.expand(view.shape).contiguous(), *args, **kwargs)

    tensors = [func(view.stored, *args, **kwargs), of_each(view.scale), of_each(view.zero_point)]
    if isinstance(tensors[0], Tensor):
        return view._like(_without_repeats(tensors))
    parts = [[None] * len(tensors[0]) if part is None else part for part in tensors]
    return [view._like(_without_repeats(list(part))) for part in zip(*parts, strict=True)]


def _without_repeats(tensors: list[Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """With one scale where the same is repeated over a dimension."""
    stored, *companions = tensors
    for place, tensor in enumerate(companions):
        for dim in range(0 if tensor is None else tensor.dim()):
            if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
        companions[place] = tensor
    return stored, companions[0], companions[1]


def _index(func: Any, view: Any, indices: Any) -> Any:
    if not isinstance(view, FloatView) or len(indices) != 1 or indices[0] is None or indices[0].dim() != 1:
        return NotImplemented
    rows, index = len(view), indices[0]
    return view._like(view._each(lambda tensor: tensor[index] if len(tensor) == rows else tensor))


def _index_select(func: Any, view: Any, dim: int, index: Tensor) -> Any:
    if not isinstance(view, FloatView) or view.dim() == 0:
        return NotImplemented
    size = view.shape[dim]
    return view._like(
        view._each(lambda tensor: tensor.index_select(dim, index) if tensor.shape[dim] == size else tensor)
    )


def _to_copy(func: Any, view: FloatView, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    device = options.get("device")
    moved = view._each(
        lambda t: t if device is None else t.to(device, non_blocking=bool(options.get("non_blocking")))
    )
    return view._like(moved, dtype)


_VIEWS_OF_BYTES = frozenset((_ATEN.as_strided.default, _ATEN.view.dtype))
_HANDLERS: dict[Any, Callable[..., Any]] = {
    _ATEN._to_copy.default: _to_copy,
    _ATEN._unsafe_view.default: _view,
    _ATEN.addmm.default: _addmm,
    _ATEN.bmm.default: _bmm,
    _ATEN.convolution.default: _convolution,
    _ATEN.embedding.default: _embedding,
    _ATEN.index.Tensor: _index,
    _ATEN.index_select.default: _index_select,
    _ATEN.mm.default: _mm,
}
# The second is the one of transformers, which is registered when transformers is imported.
_HANDLERS_BY_NAME = {"aten::_grouped_mm": _grouped_mm, "transformers::grouped_mm_fallback": _grouped_mm}
