"""Loading whatever model a command is given, with the class that its config names."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel

from mono_quant_hf import MonoQuantConfig

from .errors import CommandError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def config_of(name: str) -> Any:
    """The config of a model folder or a model on the Hub.

    Raises:
        CommandError: there is none.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise CommandError(f"there is no folder {name}; give a model's folder or its name on the Hub.")
    if Path(name).is_file():
        raise CommandError(f"{name} is a file; give the folder of a saved model, or its name on the Hub.")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as problem:
        raise CommandError(f"{name} is no model that can be loaded: {_first_line(problem)}") from problem


def is_quantized(config: Any) -> bool:
    """Whether the checkpoint is quantized already."""
    return getattr(config, "quantization_config", None) is not None


def load_model(name: str, quantization: MonoQuantConfig | None = None, dtype: str = "auto") -> Any:
    """The model in evaluation mode, of the class it was saved as.

    Raises:
        CommandError: it cannot be loaded, or is quantized and `quantization` is given.
    """
    config = config_of(name)
    if quantization is not None and is_quantized(config):
        raise CommandError(f"{name} is quantized already; give the float model it was made from.")
    architecture = (getattr(config, "architectures", None) or [""])[0]
    cls = getattr(transformers, architecture, AutoModel)
    try:
        model = cls.from_pretrained(name, dtype=DTYPES.get(dtype, "auto"), quantization_config=quantization)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        raise CommandError(f"{name} cannot be loaded: {_first_line(problem)}") from problem
    return model.eval()


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0]
