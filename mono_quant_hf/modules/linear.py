"""`nn.Linear` with int8 or float16 weights."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mono_quant_hf import kernels

from .base import Axes, MatrixProduct, check_input, weights_of_dtype
from .registry import MIXINS, quantized_twin


class QuantizedLinear(MatrixProduct, nn.Linear):
    """`y = x Wᵀ + b` with a weight of int8 codes (a scale and zero-point per output feature) or float16.

    Made directly, it draws a weight as `nn.Linear` does and quantizes it; `quantize_linear_module` quantizes a
    trained module. The output has the dtype of the input, with and without autocast.

    Args:
        in_features, out_features, bias: as for `nn.Linear`.
        dtype: `torch.qint8` (codes) or `torch.float16`.
        symmetric: int8 only: no zero-points, codes in [-127, 127].

    Shapes:
        weight_int8 (or weight_float16) `[out, in]`, weight_scale float32 `[out, 1]`, weight_zero_point int8 `[out, 1]`
        where asymmetric, bias float `[out]` or None; `weight` shows the float weight `[out, in]`.

    Example:
        >>> import torch
        >>> layer = QuantizedLinear(10, 5)
        >>> layer
        QuantizedLinear(in_features=10, out_features=5, bias=True, weights=int8, asymmetric)
        >>> layer(torch.ones(2, 10)).shape, layer.weight_int8.dtype, layer.weight.dtype
        (torch.Size([2, 5]), torch.int8, torch.float32)
    """

    weight_axes: ClassVar[dict[str, Axes]] = {"weight": 0}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.qint8,
        symmetric: bool = False,
    ):
        module = nn.Linear(in_features, out_features, bias)
        make = type(self).make_room if module.weight.is_meta else type(self).quantize
        self.__dict__.update(make(module, weights_of_dtype(dtype), symmetric).__dict__)

    def forward(self, input: Tensor) -> Tensor:
        check_input(self, input)
        return kernels.linear(input, *self.stored(), self.bias, self.quantization.activations)


MIXINS[nn.Linear] = QuantizedLinear


def quantize_linear_module(
    module: nn.Linear, dtype: torch.dtype = torch.qint8, symmetric: bool = False
) -> QuantizedLinear:
    """A quantized twin of a Linear; the module itself is left as it is, the bias is shared.

    Args:
        module: float weight `[out, in]`, any floating dtype and device.
        dtype: `torch.qint8` or `torch.float16`.
        symmetric: int8 only: no zero-points, codes in [-127, 127].

    Raises:
        TypeError: `module` is no `nn.Linear`.
        ValueError: another dtype; a weight with NaN or infinite values, without elements, or (float16) past 65504.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 8)
        >>> x = torch.randn(4, 64)
        >>> bool((quantize_linear_module(layer)(x) - layer(x)).abs().max() < 0.01)
        True
    """
    if not isinstance(module, nn.Linear):
        raise TypeError(f"Expected an nn.Linear, got {type(module).__name__}.")
    twin = quantized_twin(module, dtype, symmetric)
    assert isinstance(twin, QuantizedLinear)
    return twin
