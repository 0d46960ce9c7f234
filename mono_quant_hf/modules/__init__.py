"""Modules that hold int8 codes or float16 weights, usable in any `nn.Module`."""

from . import experts, recurrent  # noqa: F401  they enter what they know into the registry
from .base import Quantization, QuantizedModule
from .conv import quantize_conv2d_module
from .conv1d_projection import QuantizedConv1DProjection
from .embedding import QuantizedEmbedding
from .float_view import FloatView
from .linear import QuantizedLinear, quantize_linear_module
from .registry import quantized_class_for, register_weights

__all__ = [
    "FloatView",
    "Quantization",
    "QuantizedConv1DProjection",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModule",
    "quantize_conv2d_module",
    "quantize_linear_module",
    "quantized_class_for",
    "register_weights",
]
