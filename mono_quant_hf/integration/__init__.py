"""Where the package meets transformers: loading, saving, and the choice of modules."""

from mono_quant_hf.autoload import fill_once_imported, make_room
from mono_quant_hf.versions import check_versions

check_versions()  # before what would fail on another version
make_room()

from mono_quant_hf.config import MonoQuantConfig  # noqa: E402

from . import adapters  # noqa: E402, F401  sees PEFT adapt a quantized module
from .in_memory import quantize_model  # noqa: E402
from .quantizer import MonoQuantHfQuantizer  # noqa: E402
from .saving import load_quantized, save_quantized  # noqa: E402
from .selection import Decision, quantized_share  # noqa: E402

fill_once_imported("diffusers.quantizers.auto")

__all__ = [
    "Decision",
    "MonoQuantConfig",
    "MonoQuantHfQuantizer",
    "load_quantized",
    "quantize_model",
    "quantized_share",
    "save_quantized",
]
