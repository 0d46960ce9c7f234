"""`nn.Linear` with int8 or float16 weights."""

import torch
from torch import Tensor, nn

from mono_quant_hf import kernels

from .base import Quantization, QuantizedModule, weights_of_dtype
from .registry import register_quantized_class


@register_quantized_class(nn.Linear)
class QuantizedLinear(QuantizedModule, nn.Linear):
    """`y = x Wᵀ + b` with a weight of int8 codes (a scale and zero-point per output feature) or float16.

    Made directly, it draws a weight as `nn.Linear` does and quantizes it; `quantize_linear_module` quantizes a
    trained module. The output has the dtype of the input, with and without autocast.

    Args:
        in_features, out_features, bias: as for `nn.Linear`.
        dtype: `torch.qint8` (codes) or `torch.float16`.
        symmetric: int8 only: no zero-points, codes in [-127, 127].

    Shapes:
        weight int8 or float16 `[out, in]`, weight_scale float32 `[out, 1]`, weight_zero_point int8 `[out, 1]` or None,
        bias float `[out]` or None.

    Example:
        >>> import torch
        >>> layer = QuantizedLinear(10, 5)
        >>> layer
        QuantizedLinear(in_features=10, out_features=5, bias=True, weights=int8, asymmetric)
        >>> layer(torch.ones(2, 10)).shape, layer.weight.dtype
        (torch.Size([2, 5]), torch.int8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.qint8,
        symmetric: bool = False,
    ):
        weights = weights_of_dtype(dtype)
        nn.Linear.__init__(self, in_features, out_features, bias)
        weight = self._parameters["weight"]
        assert weight is not None
        self._set_up_storage(Quantization(weights, symmetric or weights != "int8", None, nn.Linear))
        if weight.device.type != "meta":
            for name, tensor in self.quantized_tensors("weight", weight).items():
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    quantizes_activations = True

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        # nn.MultiheadAttention computes with the weight of its out_proj itself and never calls it.
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight directly"
        return super().refuses(module)

    def forward(self, input: Tensor) -> Tensor:
        self.check_input(input)
        return kernels.linear(
            input,
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            self.quantization.activations,
        )


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
        ValueError: another dtype; a weight with NaN or infinite values, without elements, or (float16) past 65504;
            a subclass whose forward is its own.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 8)
        >>> x = torch.randn(4, 64)
        >>> bool((quantize_linear_module(layer)(x) - layer(x)).abs().max() < 0.01)
        True
    """
    if not isinstance(module, nn.Linear):
        raise TypeError(f"Expected an nn.Linear, got {type(module).__name__}.")
    return QuantizedLinear.from_float(module, weights_of_dtype(dtype), symmetric)
