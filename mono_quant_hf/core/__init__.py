"""Scales, codes and error metrics of per-channel weight quantization. Knows torch alone."""

from .mappers import calculate_scale_zp_per_channel
from .metrics import sqnr
from .quantizers import (
    dequantize_codes,
    dequantize_weight,
    quantize_to_codes,
    quantize_weight_fp16,
    quantize_weight_int8,
)

__all__ = [
    "calculate_scale_zp_per_channel",
    "dequantize_codes",
    "dequantize_weight",
    "quantize_to_codes",
    "quantize_weight_fp16",
    "quantize_weight_int8",
    "sqnr",
]
