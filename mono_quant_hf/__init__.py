"""int8 and float16 weights for Hugging Face transformers: quantize, load, save and run.

Importing the package registers `quant_method="mono_quant"` with transformers, so that `from_pretrained` can quantize
a float checkpoint and load a quantized one.
"""

from importlib.metadata import PackageNotFoundError, version

from .config import MonoQuantConfig
from .integration import MonoQuantHfQuantizer, quantize_model

try:
    __version__ = version("mono-quant-hf")
except PackageNotFoundError:  # used from a source folder that was not installed
    __version__ = "0+unknown"

__all__ = ["MonoQuantConfig", "MonoQuantHfQuantizer", "__version__", "quantize_model"]
