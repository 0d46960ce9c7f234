"""Where the package meets transformers: loading, saving, and the choice of modules."""

from . import adapters  # noqa: F401  sees PEFT adapt a quantized module
from .in_memory import quantize_model
from .quantizer import MonoQuantHfQuantizer
from .saving import load_quantized, save_quantized
from .selection import Decision, quantized_share

__all__ = [
    "Decision",
    "MonoQuantHfQuantizer",
    "load_quantized",
    "quantize_model",
    "quantized_share",
    "save_quantized",
]
