"""Loading whatever model a command is given, with the class that its config names."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.hub import checkpoint

from .errors import CommandError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def folder_of(name: str) -> Path:
    """The folder of a model, downloaded if it is on the Hub.

    Raises:
        CommandError, HubError: there is none.
    """
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
    return checkpoint.config_of(folder_of(name))


def is_quantized(config: Any) -> bool:
    """Whether the checkpoint is quantized already."""
    return getattr(config, "quantization_config", None) is not None


def load_model(name: str, quantization: MonoQuantConfig | None = None, dtype: str = "auto") -> Any:
    """The model in evaluation mode, of the class it was saved as.

    Raises:
        CommandError, HubError, ValueError: it cannot be loaded, or is quantized and `quantization` is given.
    """
    if quantization is not None and is_quantized(config_of(name)):
        raise CommandError(f"{name} is quantized already; give the float model it was made from.")
    model = checkpoint.model_of(
        folder_of(name), dtype=DTYPES.get(dtype, "auto"), quantization_config=quantization
    )
    model.config.name_or_path = name
    return model.eval()


def load_processor(name: str, auto_class: Any = AutoTokenizer) -> Any:
    """The tokenizer of a model, or what else prepares its inputs.

    Raises:
        CommandError, HubError, ValueError: there is none, or it is damaged.
    """
    return checkpoint.processor_of(folder_of(name), auto_class)


def chat_inputs(tokenizer: Any, prompt: str) -> Any:
    """What a model is given to answer a prompt as in a chat: input_ids and attention_mask [1, tokens]."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def architecture_of(name: str) -> str:
    """The name of the class that a model was saved as.

    Raises:
        CommandError, HubError, ValueError: the config does not say, or is damaged.
    """
    folder = folder_of(name)
    return checkpoint.model_class_of(folder, checkpoint.config_of(folder)).__name__
