"""Loading whatever model a command is given, with the class that its config names."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel

from mono_quant_hf import MonoQuantConfig

from .errors import CommandError
from .output import STDOUT

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


def check_output_files(*files: Path | None) -> None:
    """Refuse, before the work and not after it, a file that cannot be written; None and `-` are fine."""
    for file in files:
        if file is None or file == STDOUT:
            continue
        if file.is_dir() and any(file.iterdir()):
            raise CommandError(
                f"{file} is a folder with files in it; name a new one after the option, or a file."
            )
        if not file.expanduser().resolve().parent.is_dir():
            raise CommandError(f"the folder of {file} does not exist; make it first, or name another file.")


def check_png(file: Path | None) -> None:
    """Refuse, before the work and not after it, a picture where nothing can draw it."""
    if file is not None and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--png needs matplotlib: pip install 'mono-quant-hf[plots]'.")


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0]
