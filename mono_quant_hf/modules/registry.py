"""Which weights of which modules are quantized, and along which axis each has its scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from .base import Axes, MatrixProduct, QuantizedModule, quantized_form, weights_of_dtype

Finder = Callable[[nn.Module], Mapping[str, Axes]]

WEIGHT_AXES: dict[type[nn.Module], Mapping[str, Axes]] = {
    nn.Linear: {"weight": 0},
    _ConvNd: {"weight": 0},
    _ConvTransposeNd: {"weight": 1},  # [in, out / groups, *kernel]: the groups share the scales
    nn.Embedding: {"weight": 0},
    nn.Bilinear: {"weight": 0},
    nn.MultiheadAttention: dict.fromkeys(
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), 0
    ),
    nn.RNNCellBase: {"weight_ih": 0, "weight_hh": 0},
    # The direction of a weight norm, whose magnitude stays float; what other parametrizations make a weight of.
    ParametrizationList: {"original": 0, "original1": 0},
}
"""`{class: {name of a weight: axis or axes of its scales}}`; subclasses included."""

MIXINS: dict[type[nn.Module], type[QuantizedModule]] = {}
"""`{class: mixin of its quantized form}`, where that has more than `QuantizedModule`."""

FINDERS: list[Finder] = []
"""Functions that find the weights of modules that no table can list."""


def register_weights(source: type[nn.Module], axes: Mapping[str, Axes]) -> None:
    """Have weights of a class of your own, and of its subclasses, quantized.

    Args:
        axes: `{name of a parameter: the axis, or axes, along which it has a scale each}`.

    Example:
        >>> import torch
        >>> from mono_quant_hf import quantize_model
        >>> from mono_quant_hf.modules import register_weights
        >>> class Doubled(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = torch.nn.Parameter(torch.randn(8, 2))
        ...     def forward(self, input):
        ...         return 2 * input @ self.kernel
        >>> register_weights(Doubled, {"kernel": 1})  # [in, out]: a scale for each output feature
        >>> quantize_model(torch.nn.Sequential(Doubled()))
        Sequential(
          (0): QuantizedDoubled(weights=int8, asymmetric)
        )
    """
    WEIGHT_AXES[source] = dict(axes)


def quantized_class_for(module: nn.Module) -> type[QuantizedModule] | None:
    """The class of `module` when it is quantized, perhaps one that refuses it; None where it holds no such weights.

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
    source = next((base for base in type(module).__mro__ if base in WEIGHT_AXES), None)
    named = WEIGHT_AXES[source] if source is not None else _found(module)
    axes = tuple((name, axis) for name, axis in named.items() if module._parameters.get(name) is not None)
    if not axes and source is not None and module._parameters.get("weight_v") is not None:
        # torch.nn.utils.weight_norm, in its form of old, makes the weight of this direction
        return quantized_form(QuantizedModule, type(module), (("weight_v", next(iter(named.values()))),))
    if not axes:
        return None
    mixins = (MIXINS[base] for base in type(module).__mro__ if base in MIXINS)
    default = MatrixProduct if source is None else QuantizedModule
    return quantized_form(next(mixins, default), type(module), axes)


def quantized_twin(module: nn.Module, dtype: torch.dtype, symmetric: bool) -> QuantizedModule:
    """A quantized twin of a module, which is left as it is.

    Args:
        dtype: `torch.qint8` or `torch.float16`.

    Raises:
        ValueError: another dtype, or the module cannot be quantized.
    """
    weights = weights_of_dtype(dtype)
    quantized_class = quantized_class_for(module)
    if quantized_class is None:
        raise ValueError(
            f"Expected a module with a float weight of its own, got {type(module).__name__} without."
        )
    return quantized_class.from_float(module, weights, symmetric)


def _found(module: nn.Module) -> Mapping[str, Axes]:
    return next((axes for axes in (finder(module) for finder in FINDERS) if axes), {})
