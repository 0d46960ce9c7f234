"""Modules that hold int8 codes or float16 weights, usable in any `nn.Module`."""

from .base import QuantizedModule
from .conv import QuantizedConv2d, quantize_conv2d_module
from .linear import QuantizedLinear, quantize_linear_module
from .registry import QUANTIZED_CLASSES, quantized_class_for, register_quantized_class

__all__ = [
    "QUANTIZED_CLASSES",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizedModule",
    "quantize_conv2d_module",
    "quantize_linear_module",
    "quantized_class_for",
    "register_quantized_class",
]
