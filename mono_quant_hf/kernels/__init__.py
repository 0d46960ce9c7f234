"""`y = x Wᵀ + b` for weights kept as int8 codes or as float16: tensors in, tensors out."""

from .choice import KERNELS, Choice, choose, get_kernel, set_kernel, use_kernel
from .codes import expand, look_up, quantize
from .operators import grouped_linear, linear, linear_backward

__all__ = [
    "KERNELS",
    "Choice",
    "choose",
    "expand",
    "get_kernel",
    "grouped_linear",
    "linear",
    "linear_backward",
    "look_up",
    "quantize",
    "set_kernel",
    "use_kernel",
]
