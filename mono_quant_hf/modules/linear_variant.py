"""Subclasses of `nn.Linear` with a forward of their own, such as Falcon's."""

from __future__ import annotations

from torch import nn

from .base import QuantizedModule
from .own_forward import OwnForward, quantized_form
from .registry import register_quantized_class_finder
from .usage import usage_of


class QuantizedLinearVariant(OwnForward):
    """A subclass of `nn.Linear` whose forward is its own, with int8 codes or a float16 weight.

    Shapes: as `QuantizedLinear`.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import quantized_class_for
        >>> from transformers.models.falcon.modeling_falcon import FalconLinear
        >>> layer = FalconLinear(64, 8)
        >>> quantized = quantized_class_for(layer).from_float(layer, "int8", symmetric=False)
        >>> isinstance(quantized, QuantizedLinearVariant), isinstance(quantized, FalconLinear)
        (True, True)
        >>> x = torch.randn(4, 64)
        >>> bool((quantized(x) - layer(x)).abs().max() < 0.01)
        True
    """

    quantizes_activations = True


@register_quantized_class_finder
def linear_variant_for(module: nn.Module) -> type[QuantizedModule] | None:
    """The quantized class of a Linear whose source shows that its forward does nothing but multiply by the weight."""
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if (
        not own_forward
        or module._parameters.get("weight") is None
        or usage_of(module, "weight").out_last is not False
    ):
        return None
    return quantized_form(QuantizedLinearVariant, type(module), (("weight", 0),))  # type: ignore[arg-type]
