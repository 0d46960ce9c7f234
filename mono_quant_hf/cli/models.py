"""Loading whatever model a command is given, with the class that its config names."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mono_quant_hf.names import DTYPES

from .errors import CommandError

if TYPE_CHECKING:
    from mono_quant_hf import MonoQuantConfig


def folder_of(name: str) -> Path:
    """The folder of a model, downloaded if it is on the Hub.

    Raises:
        CommandError, HubError: there is none.
    """
    from mono_quant_hf.hub import checkpoint

    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not path.is_dir():
        raise CommandError(f"there is no folder {name}; give a model's folder or its name on the Hub.")
    if path.is_file():
        raise CommandError(f"{name} is a file; give the folder of a saved model, or its name on the Hub.")
    return checkpoint.local_folder(path)


def config_of(name: str) -> Any:
    """The config of a model folder or a model on the Hub.

    Raises:
        CommandError, HubError, ValueError: there is none, or it is damaged.
    """
    from mono_quant_hf.hub import checkpoint

    return checkpoint.config_of(folder_of(name))


def add_dtype_argument(command: argparse.ArgumentParser, of_what: str) -> None:
    """Add `--dtype`, which `dtype_of` reads."""
    command.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help=f"dtype {of_what} (auto: that of the checkpoint)",
    )


def dtype_of(name: str) -> Any:
    """The dtype of this name, one of `DTYPES`; "auto" stays as it is."""
    import torch

    return name if name == "auto" else getattr(torch, name)


def is_quantized(config: Any) -> bool:
    """Whether the checkpoint is quantized already."""
    return getattr(config, "quantization_config", None) is not None


def load_model(name: str, quantization: MonoQuantConfig | None = None, dtype: str = "auto") -> Any:
    """The model in evaluation mode, of the class it was saved as.

    Raises:
        CommandError, HubError, ValueError: it cannot be loaded, or is quantized and `quantization` is given.
    """
    from mono_quant_hf.hub import checkpoint

    if quantization is not None and is_quantized(config_of(name)):
        raise CommandError(f"{name} is quantized already; give the float model it was made from.")
    model = checkpoint.model_of(folder_of(name), dtype=dtype_of(dtype), quantization_config=quantization)
    model.config.name_or_path = name
    return model.eval()


def load_processor(name: str, auto_class: Any = None) -> Any:
    """The tokenizer of a model, or what else prepares its inputs.

    Raises:
        CommandError, HubError, ValueError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    from mono_quant_hf.hub import checkpoint

    return checkpoint.processor_of(folder_of(name), auto_class or AutoTokenizer)


def chat_inputs(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    """What a model is given to go on with a chat: input_ids and attention_mask [1, tokens]."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def architecture_of(name: str) -> str:
    """The name of the class that a model was saved as.

    Raises:
        CommandError, HubError, ValueError: the config does not say, or is damaged.
    """
    from mono_quant_hf.hub import checkpoint

    folder = folder_of(name)
    return checkpoint.model_class_of(folder, checkpoint.config_of(folder)).__name__
