"""The table {source class: quantized class}, and the finders for classes that no table can list."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .base import QuantizedModule

Q = TypeVar("Q", bound=QuantizedModule)
Finder = Callable[[nn.Module], type[QuantizedModule] | None]

QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedModule]] = {}
QUANTIZED_CLASS_FINDERS: list[Finder] = []


def register_quantized_class(source: type[nn.Module]) -> Callable[[type[Q]], type[Q]]:
    """Decorator that makes a `QuantizedModule` subclass the quantized form of `source` and its subclasses.

    A subclass of `source` is replaced only if its forward is that of `source`; register the subclass itself if its
    forward is its own. A later registration replaces an earlier one.

    Example:
        >>> import torch
        >>> from mono_quant_hf import kernels, quantize_model
        >>> from mono_quant_hf.modules import QuantizedModule, register_quantized_class
        >>> class Doubled(torch.nn.Linear):
        ...     def forward(self, input):
        ...         return 2 * super().forward(input)
        >>> @register_quantized_class(Doubled)
        ... class QuantizedDoubled(QuantizedModule, Doubled):
        ...     def forward(self, input):
        ...         return 2 * kernels.linear(
        ...             input, self.weight, self.weight_scale, self.weight_zero_point, self.bias
        ...         )
        >>> quantize_model(torch.nn.Sequential(Doubled(8, 2)))
        Sequential(
          (0): QuantizedDoubled(in_features=8, out_features=2, bias=True, weights=int8, asymmetric)
        )
    """

    def register(quantized: type[Q]) -> type[Q]:
        QUANTIZED_CLASSES[source] = quantized
        return quantized

    return register


def register_quantized_class_finder(finder: Finder) -> Finder:
    """Decorator for a function that names the quantized class of a module that the table does not know how to replace.

    It is given the module (perhaps on the meta device) and answers with a class, made for the purpose if need be, or
    None. Finders are asked in the order of their registration.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import QuantizedLinear, quantized_class_for
        >>> class Plain(torch.nn.Linear):
        ...     def forward(self, input):     # not nn.Linear's own, but the same
        ...         return torch.nn.functional.linear(input, self.weight, self.bias)
        >>> class QuantizedPlain(QuantizedLinear, Plain):
        ...     pass
        >>> @register_quantized_class_finder
        ... def plain_class_for(module):
        ...     return QuantizedPlain if isinstance(module, Plain) else None
        >>> quantized_class_for(Plain(8, 2)) is QuantizedPlain
        True
    """
    QUANTIZED_CLASS_FINDERS.append(finder)
    return finder


def quantized_class_for(module: nn.Module) -> type[QuantizedModule] | None:
    """The quantized class for a module, perhaps one that refuses it; None if there is none.

    It is that of the module's class or of its nearest registered base. Where that base is not one whose forward the
    module runs, a finder may know better.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import quantized_class_for
        >>> quantized_class_for(torch.nn.Linear(8, 2)).__name__
        'QuantizedLinear'
        >>> quantized_class_for(torch.nn.LayerNorm(8)) is None
        True
    """
    if isinstance(module, QuantizedModule):
        return None
    base = next((base for base in type(module).__mro__ if base in QUANTIZED_CLASSES), None)
    if base is not None and type(module).forward is base.forward:
        return QUANTIZED_CLASSES[base]
    found = (finder(module) for finder in QUANTIZED_CLASS_FINDERS)
    by_finder = next((quantized for quantized in found if quantized is not None), None)
    return by_finder or (None if base is None else QUANTIZED_CLASSES[base])
