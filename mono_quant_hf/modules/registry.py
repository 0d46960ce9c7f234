"""The table {source class: quantized class}."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .base import QuantizedModule

Q = TypeVar("Q", bound=QuantizedModule)

QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedModule]] = {}


def register_quantized_class(source: type[nn.Module]) -> Callable[[type[Q]], type[Q]]:
    """Decorator that makes a `QuantizedModule` subclass the quantized form of `source`."""

    def register(quantized: type[Q]) -> type[Q]:
        QUANTIZED_CLASSES[source] = quantized
        return quantized

    return register


def quantized_class_for(module: nn.Module) -> type[QuantizedModule] | None:
    """The quantized class of the module's class or of its nearest registered base; None if there is none."""
    if isinstance(module, QuantizedModule):
        return None
    return next((QUANTIZED_CLASSES[base] for base in type(module).__mro__ if base in QUANTIZED_CLASSES), None)
