"""int8 and float16 weights for Hugging Face transformers: quantize, load, save and run.

Importing the package registers `quant_method="mono_quant"` with transformers, so that `from_pretrained` can quantize
a float checkpoint and load a quantized one.
"""

import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

# What loads this package without its import (autoload.py) makes room before the package registers itself.
if (_autoload := sys.modules.get("mono_quant_hf_autoload")) is not None:
    _autoload.disarm()

from .versions import check_versions

check_versions()  # before what would fail on another version

from .config import MonoQuantConfig  # noqa: E402
from .integration import MonoQuantHfQuantizer, load_quantized, quantize_model, save_quantized  # noqa: E402
from .texts import log_in_one_line  # noqa: E402

logging.getLogger(__name__).addFilter(log_in_one_line)

if TYPE_CHECKING:
    from .hub import push_to_hub

try:
    __version__ = version("mono-quant-hf")
except PackageNotFoundError:  # used from a source folder that was not installed
    __version__ = "0+unknown"

__all__ = [
    "MonoQuantConfig",
    "MonoQuantHfQuantizer",
    "__version__",
    "load_quantized",
    "push_to_hub",
    "quantize_model",
    "save_quantized",
]


def __getattr__(name: str) -> Any:
    # Who only loads a model need not wait for what is imported to push one.
    if name == "push_to_hub":
        from .hub import push_to_hub

        return push_to_hub
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
