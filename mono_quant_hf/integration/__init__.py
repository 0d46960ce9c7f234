"""Where the package meets transformers: loading, saving, and the choice of modules."""

from . import adapters  # noqa: F401  sees PEFT adapt a quantized module
from .in_memory import quantize_model
from .quantizer import MonoQuantHfQuantizer
from .selection import Decision, quantized_share

__all__ = ["Decision", "MonoQuantHfQuantizer", "quantize_model", "quantized_share"]
