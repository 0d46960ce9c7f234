"""Modules that hold int8 codes or float16 weights, usable in any `nn.Module`."""

from .base import QuantizedModule
from .conv import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
    quantize_conv2d_module,
)
from .conv1d_projection import QuantizedConv1DProjection
from .embedding import QuantizedEmbedding, QuantizedEmbeddingVariant
from .experts import QuantizedExperts
from .linear import QuantizedLinear, quantize_linear_module
from .linear_variant import QuantizedLinearVariant
from .registry import (
    QUANTIZED_CLASSES,
    quantized_class_for,
    register_quantized_class,
    register_quantized_class_finder,
)

__all__ = [
    "QUANTIZED_CLASSES",
    "QuantizedConv1DProjection",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedEmbedding",
    "QuantizedEmbeddingVariant",
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedLinearVariant",
    "QuantizedModule",
    "quantize_conv2d_module",
    "quantize_linear_module",
    "quantized_class_for",
    "register_quantized_class",
    "register_quantized_class_finder",
]
