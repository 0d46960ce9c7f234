"""Quantized modules that run the forward of their original class, with products that go to the kernels."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .base import QuantizedModule, _twin
from .operand import QuantizedOperand

Axes = tuple[tuple[str, int | tuple[int, ...]], ...]
"""`(parameter name, axis or axes of the scales)` of each quantized parameter."""


class OwnForward(QuantizedModule):
    """Runs the original forward on a view of the module in which each quantized parameter is a `QuantizedOperand`.

    Never made of this class itself but of one that also inherits from the original class, see `quantized_form`.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        view = _twin(self, self.quantization.float_class)
        for name in self.weight_axes:
            view._parameters[name] = self._operand(name)
        config = view.__dict__.get("config")
        if hasattr(config, "_experts_implementation"):
            view.__dict__["config"] = _EagerExperts(config)
        return self.quantization.float_class.forward(view, *args, **kwargs)

    def _operand(self, name: str) -> QuantizedOperand:
        stored, axes = self.get_parameter(name), self.weight_axes[name]
        scale, zero_point = self._parameters[f"{name}_scale"], self._parameters[f"{name}_zero_point"]
        out_axis = axes if isinstance(axes, int) else max(axes)
        return QuantizedOperand(
            stored, scale, zero_point, out_axis == stored.dim() - 1, self.quantization.activations
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle would not find it by its name.
        base = next(cls for cls in type(self).__mro__ if cls in _MADE_FROM)
        arguments = (base, self.quantization.float_class, tuple(self.weight_axes.items()))
        return _new_instance, arguments, self.__dict__.copy()


_MADE_FROM: set[type[OwnForward]] = set()


@functools.lru_cache(maxsize=1024)
def quantized_form(base: type[OwnForward], float_class: type[nn.Module], axes: Axes) -> type[OwnForward]:
    """The quantized form of a class, an instance of both `base` and that class."""
    _MADE_FROM.add(base)
    attributes = {"weight_axes": dict(axes), "__module__": base.__module__, "__doc__": base.__doc__}
    return type(f"Quantized{float_class.__name__}", (base, float_class), attributes)


def _new_instance(base: type[OwnForward], float_class: type[nn.Module], axes: Axes) -> OwnForward:
    cls = quantized_form(base, float_class, axes)  # type: ignore[arg-type]  # classes are hashable
    return cls.__new__(cls)


class _EagerExperts:
    """A config in which the eager implementation of experts is selected and all else is as it was."""

    _experts_implementation = "eager"

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
