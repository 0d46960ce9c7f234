"""`nn.LSTM`, `nn.GRU` and `nn.RNN` with int8 or float16 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from .base import Axes, QuantizedModule
from .registry import FINDERS, MIXINS


class QuantizedRecurrent(QuantizedModule):
    """Mixin of recurrent layers: torch's own loops run on weights that are dequantized once for all steps.

    Shapes:
        every weight as in the float module, with a scale for each row: float32 `[rows, 1]`.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import quantized_class_for
        >>> layer = torch.nn.LSTM(8, 16, num_layers=2, bidirectional=True)
        >>> quantized = quantized_class_for(layer).from_float(layer, "int8", symmetric=False)
        >>> x = torch.randn(5, 1, 8)
        >>> bool((quantized(x)[0] - layer(x)[0]).abs().max() < 0.05)
        True
    """

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        names: list[str] = self._flat_weights_names  # type: ignore[assignment]
        dtype = self.quantization.dtype
        return [
            self.dequantized(name, dtype) if name in self.weight_axes else getattr(self, name, None)
            for name in names
        ]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        self._init_flat_weights()

    def _init_flat_weights(self) -> None:
        """What torch gathers anew whenever parameters change; here they are gathered when they are used."""

    _update_flat_weights = flatten_parameters = _init_flat_weights

    @classmethod
    def make_room(cls, *args: Any, **kwargs: Any) -> Self:
        return super().make_room(*args, **kwargs)._without_float_weights()

    def lend_to(self, module: nn.Module) -> Self:
        return super().lend_to(module)._without_float_weights()

    def _without_float_weights(self) -> Self:
        """Let go of the float weights, which torch keeps in a list too."""
        self.__dict__.pop("_flat_weights", None)
        self._flat_weight_refs: list[Any] = []
        return self

    def dequantize(self, *args: Any, **kwargs: Any) -> nn.Module:
        module = super().dequantize(*args, **kwargs)
        module._init_flat_weights()  # type: ignore[operator]
        return module


MIXINS[nn.RNNBase] = QuantizedRecurrent


def recurrent_weights(module: nn.Module) -> Mapping[str, Axes]:
    """The weights of a recurrent layer, which are named by layer and direction."""
    names: Any = module._flat_weights_names if isinstance(module, nn.RNNBase) else ()
    return {name: 0 for name in names if name.startswith("weight")}


FINDERS.append(recurrent_weights)
