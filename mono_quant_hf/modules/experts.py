"""Modules that hold the weights of all their experts in 3-D parameters, `[experts, out, in]` or `[experts, in, out]`.

Such as `gate_up_proj` and `down_proj` of the mixture-of-experts models of transformers, but any class will do whose
source multiplies by one expert's weight at a time (see `expert_usage`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant_hf import kernels
from mono_quant_hf.core import quantize_to_codes

from .base import QuantizedModule, _twin
from .expert_usage import usage_of
from .registry import register_quantized_class_finder

Axes = tuple[tuple[str, tuple[int, int]], ...]
"""`(parameter name, (0, axis of the output features))` of each quantized parameter."""


class QuantizedExperts(QuantizedModule):
    """Experts with int8 codes, a scale and zero-point per expert and output feature, or float16 weights.

    The forward is that of the original class, run on a view of this module in which each quantized parameter is an
    `ExpertStack`: the products with one expert's weight go to the kernels, so that only the experts that tokens are
    sent to are expanded, one at a time. transformers' other implementations (batched, grouped) need all experts as
    one float tensor, so whichever is selected, the eager forward is what runs.

    Never made of this class itself but of one that also inherits from the original class, see `quantized_experts`.

    Shapes:
        a weight int8 or float16 `[experts, out, in]` with scale float32 and zero-point int8 `[experts, out, 1]`;
        where the class stores `[experts, in, out]`, `[experts, 1, out]`. Biases stay float `[experts, out]`.
    """

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if not cls.weight_axes:
            reasons = (usage_of(module, name).reason for name in stacked_parameters(module))
            return next(
                filter(None, reasons), "its parameters of three dimensions are not the weights of experts"
            )
        return super().refuses(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        view = _twin(self, self.float_class)
        for name, (_, out_axis) in self.weight_axes.items():  # type: ignore[misc]
            stored = self.get_parameter(name)
            scale, zero_point = self._parameters[f"{name}_scale"], self._parameters[f"{name}_zero_point"]
            view._parameters[name] = ExpertStack(stored, scale, zero_point, out_axis == 2)
        config = view.__dict__.get("config")
        if hasattr(config, "_experts_implementation"):
            view.__dict__["config"] = _EagerExperts(config)
        return self.float_class.forward(view, *args, **kwargs)

    def _quantize(self, weight_name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # One expert at a time: rounding takes a float32 copy, and all experts of a layer are a large part of a model.
        _, out_axis = self.weight_axes[weight_name]  # type: ignore[misc]
        experts = [quantize_to_codes(expert, self.symmetric, out_axis - 1) for expert in weight]
        codes, scales, zero_points = zip(*experts, strict=True)
        return torch.stack(codes), torch.stack(scales), None if self.symmetric else torch.stack(zero_points)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(self.get_parameter(name).shape)}" for name in self.weight_axes)
        return f"{shapes}{super().extra_repr()}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle would not find it by its name.
        return _new_instance, (self.float_class, _axes_as_tuple(self.weight_axes)), self.__dict__.copy()


@register_quantized_class_finder
def experts_class_for(module: nn.Module) -> type[QuantizedModule] | None:
    """The quantized class of a module with stacked parameters; one that refuses where their use is not understood."""
    names = stacked_parameters(module)
    if not names:
        return None
    axes = tuple((name, (0, axis)) for name in names if (axis := usage_of(module, name).out_axis) is not None)
    axes = axes if len(axes) == len(names) else ()
    return quantized_experts(type(module), axes)  # type: ignore[arg-type]  # classes are hashable


def stacked_parameters(module: nn.Module) -> list[str]:
    """Names of the module's own floating-point parameters of three dimensions, none of them of size 1."""
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None
        and parameter.dim() == 3
        and min(parameter.shape) > 1
        and parameter.is_floating_point()
    ]


@functools.lru_cache(maxsize=1024)
def quantized_experts(float_class: type[nn.Module], axes: Axes) -> type[QuantizedExperts]:
    """The quantized form of a class of experts, an instance of both `QuantizedExperts` and that class."""
    attributes = {"weight_axes": dict(axes), "__module__": __name__, "__doc__": QuantizedExperts.__doc__}
    return type(f"Quantized{float_class.__name__}", (QuantizedExperts, float_class), attributes)


def _axes_as_tuple(weight_axes: dict[str, Any]) -> Axes:
    return tuple(weight_axes.items())


def _new_instance(float_class: type[nn.Module], axes: Axes) -> QuantizedExperts:
    cls = quantized_experts(float_class, axes)  # type: ignore[arg-type]
    return cls.__new__(cls)


class _EagerExperts:
    """A config in which the eager implementation of experts is selected and all else is as it was."""

    _experts_implementation = "eager"

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class ExpertStack:
    """Stands in for a float parameter of three dimensions, or for one expert of it, in products from the right.

    It knows what `expert_usage` lets through: an index, transpositions, casts (which change nothing, as the product
    has the dtype of its input), shape and device, `linear`, `matmul`, `mm`, `bmm` and `@`.

    Args:
        weight: int8 or float16, `[experts, out, in]` or `[out, in]`; the last two swapped where `transposed`.
        scale, zero_point: as the weight, with size 1 instead of `in`; None as in the kernels.
        transposed: whether the output features are on the last axis.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, transposed: bool):
        self.weight, self.scale, self.zero_point, self.transposed = weight, scale, zero_point, transposed

    shape = property(lambda self: self.weight.shape)
    device = property(lambda self: self.weight.device)
    ndim = property(lambda self: self.weight.ndim)
    requires_grad = False

    def size(self, dim: int | None = None) -> Any:
        return self.weight.size() if dim is None else self.weight.size(dim)

    def dim(self) -> int:
        return self.weight.dim()

    def _each(self, change: Callable[[Tensor], Tensor], transposed: bool) -> ExpertStack:
        tensors = (None if t is None else change(t) for t in (self.weight, self.scale, self.zero_point))
        weight, scale, zero_point = tensors
        assert weight is not None
        return ExpertStack(weight, scale, zero_point, transposed)

    def __getitem__(self, index: Any) -> ExpertStack:
        return self._each(lambda tensor: tensor[index], self.transposed)

    def transpose(self, dim0: int, dim1: int) -> ExpertStack:
        if {dim0 % self.dim(), dim1 % self.dim()} != {self.dim() - 2, self.dim() - 1}:
            raise NotImplementedError(
                f"Quantized experts can only have their last two dimensions swapped, not {dim0} and {dim1}; "
                "keep the module in float with modules_to_not_convert."
            )
        return self.mT

    @property
    def mT(self) -> ExpertStack:
        return self._each(lambda tensor: tensor.mT, not self.transposed)

    @property
    def T(self) -> ExpertStack:
        return self.transpose(0, 1)

    def t(self) -> ExpertStack:
        return self.transpose(0, 1)

    def float(self) -> ExpertStack:
        return self

    def to(self, *args: Any, **kwargs: Any) -> ExpertStack:
        return self

    def contiguous(self) -> ExpertStack:
        return self

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x Wᵀ + b` where W has the output features first: for one expert, or for `x` `[experts, tokens, in]`."""
        rows = self.mT if self.transposed else self
        if self.dim() == 2:
            return kernels.linear(x, rows.weight, rows.scale, rows.zero_point, bias)
        if x.dim() != 3 or x.shape[0] != self.shape[0]:
            raise NotImplementedError(
                f"Quantized experts of shape {tuple(self.shape)} cannot be multiplied with an input of shape "
                f"{tuple(x.shape)}; keep the module in float with modules_to_not_convert."
            )
        return torch.stack([rows[i].product(tokens) for i, tokens in enumerate(x)])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear":
            return _linear(*args, **kwargs)
        if name in ("matmul", "bmm", "mm", "__matmul__") and isinstance(args[1], cls) and not kwargs:
            x, weight = args
            if not weight.transposed:
                raise NotImplementedError(
                    f"torch.{name} with experts stored as [out, in]; transpose them first."
                )
            return weight.product(x)
        return NotImplemented


def _linear(input: Tensor, weight: ExpertStack, bias: Tensor | None = None) -> Tensor:
    if weight.transposed:
        raise NotImplementedError("linear with experts stored as [in, out]; transpose them first.")
    return weight.product(input, bias)
