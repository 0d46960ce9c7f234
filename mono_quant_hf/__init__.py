"""int8 and float16 weights for Hugging Face transformers: quantize, load, save and run.

Importing the package has transformers know `quant_method="mono_quant"`, so that `from_pretrained` can quantize a float
checkpoint and load a quantized one. What that takes is imported when it is first used.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from .autoload import arm
from .texts import log_in_one_line
from .versions import OWN as __version__

if TYPE_CHECKING:
    from .config import MonoQuantConfig
    from .hub import push_to_hub
    from .integration import MonoQuantHfQuantizer, load_quantized, quantize_model, save_quantized

logging.getLogger(__name__).addFilter(log_in_one_line)
arm(asked=True)

__all__ = [
    "MonoQuantConfig",
    "MonoQuantHfQuantizer",
    "__version__",
    "load_quantized",
    "push_to_hub",
    "quantize_model",
    "save_quantized",
]
_PARTS = ("calibration", "config", "core", "evaluation", "hub", "integration", "kernels", "modules")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        part = importlib.import_module(".hub" if name == "push_to_hub" else ".integration", __name__)
        return getattr(part, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
