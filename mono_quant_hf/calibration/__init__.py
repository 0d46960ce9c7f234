"""Rounding that knows what the layers are fed: same format, smaller error of the output.

A floor between `modules` and `integration`: it works on any `nn.Module` and fills quantized modules with codes, and
`integration.quantize_model` calls it. It imports `core` (the rounding itself), `modules` and the
plain reader of texts.
"""

from .calibrate import Compensation, balance, calibrate, rounds_with_moments
from .samples import Sampling, calibration_batches, write_text

__all__ = [
    "Compensation",
    "Sampling",
    "balance",
    "calibrate",
    "calibration_batches",
    "rounds_with_moments",
    "write_text",
]
