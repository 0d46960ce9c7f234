"""Configs, models and tokenizers out of a folder that may be a stranger's: made, or one sentence says why not."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel

from mono_quant_hf.config import QUANT_METHOD, MonoQuantConfig
from mono_quant_hf.integration.checkpoint import StoredTensor, read_headers
from mono_quant_hf.json_files import read_json
from mono_quant_hf.texts import one_line

from .errors import HTTPError, HubError
from .folders import has_safetensors, weight_files

OURS = __name__.partition(".")[0] + "."
LONGEST = 400
"""Characters of what another library says."""


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a model's folder, None for a float model.

    Raises:
        HubError: the folder has no config.json, or one that says nothing that can be understood.
        ValueError: it cannot be read as JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise HubError(f"{folder} has no config.json; name the folder of a saved transformers model.")
    config = read_json(file)
    for key in ("quantization_config", "compression_config"):
        settings = config.get(key)
        if settings is not None:
            if not isinstance(settings, dict) or not isinstance(settings.get("quant_method"), str):
                raise HubError(
                    f"{file} has a {key} that is no object with a quant_method; download or save the model again."
                )
            return settings
    return None


def settings_of(folder: Path, settings: dict[str, Any]) -> MonoQuantConfig:
    """The `quantization_config` of a folder as ours.

    Raises:
        HubError: it cannot be.
    """
    try:
        config: MonoQuantConfig = MonoQuantConfig.from_dict(settings)
        return config
    except (ValueError, TypeError) as problem:
        raise HubError(f"{folder / 'config.json'}: {problem}") from problem


def config_of(folder: Path) -> PreTrainedConfig:
    """The config of a model's folder.

    Raises:
        HubError, ValueError: config.json is damaged or says what cannot be.
    """
    quantization_of(folder)
    with making(folder, "config.json describes no model that transformers knows"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def check_float(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """Refuse int8 codes of which the config.json says nothing: they would be read as weights.

    Raises:
        HubError: names the tensor.
    """
    for name, tensor in stored.items():
        if tensor.dtype == "I8" and name.endswith("_int8"):
            raise HubError(
                f"{folder / 'config.json'} has no quantization_config, but {name} in {tensor.file} holds int8 codes, "
                "which would be read as weights; restore the config.json that was saved with it."
            )


def model_class_of(folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint was saved from.

    Raises:
        HubError: the config.json in `folder` names none, or none of transformers' models.
    """
    listed = config.architectures if isinstance(config.architectures, list) else []
    names = [name for name in listed if isinstance(name, str)]
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            fits: Any = found.config_class
            if isinstance(fits, type) and isinstance(config, fits):
                return found
    named = f"names {one_line(', '.join(names))[:LONGEST]}, no model" if names else "names no class of model"
    raise HubError(
        f"{folder / 'config.json'} {named} of transformers for the model_type {config.model_type!r}; "
        'add what the model is to "architectures".'
    )


def skeleton_of(folder: Path) -> PreTrainedModel:
    """The float model of a folder on the meta device: all modules, no weights.

    Raises:
        HubError, ValueError: as `config_of` and `model_class_of` do, or no such model can be made.
    """
    config = config_of(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model_class = model_class_of(folder, config)
    with making(folder, "config.json describes no model that can be made"), torch.device("meta"):
        return model_class(config)


def model_of(folder: Path, **options: Any) -> PreTrainedModel:
    """The model in a folder, of the class it was saved as.

    Args:
        folder: of a saved model.
        options: of `from_pretrained`.

    Raises:
        HubError, ValueError: as `config_of` and `model_class_of` do, or a file of weights is damaged or does not fit;
            the message names it.
    """
    model_class: Any = model_class_of(folder, config_of(folder))
    settings = quantization_of(folder)
    if settings is not None and settings["quant_method"] == QUANT_METHOD:
        settings_of(folder, settings)
    if has_safetensors(folder):
        stored = read_headers([str(file) for file in weight_files(folder)])
        if settings is None:
            check_float(folder, stored)
    with making(folder, "it cannot be loaded as its config.json says"):
        model: PreTrainedModel
        info: dict[str, Any]
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise HubError(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for, such as {missing[0]}; download or "
            "save the model again."
        )
    return model


def processor_of(folder: Path, auto_class: Any) -> Any:
    """What prepares the inputs of a model in a folder, by its auto class, such as `AutoTokenizer`.

    Raises:
        HubError, ValueError: there is none, or it is damaged.
    """
    with making(folder, f"{auto_class.__name__} finds nothing in it that can be loaded"):
        return auto_class.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def making(folder: Path, what: str) -> Iterator[None]:
    """Whatever another library makes of a stranger's files ends well, or with a sentence that names the file.

    What the machine lacks (memory, room, libraries, the network) is no fault of the files and goes through, as do our
    own sentences.
    """
    try:
        yield
    except (HubError, MemoryError, torch.OutOfMemoryError, ImportError, HTTPError):
        raise
    except Exception as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        *_, (innermost, _) = traceback.walk_tb(problem.__traceback__)
        if isinstance(problem, (ValueError, TypeError)) and innermost.f_globals["__name__"].startswith(OURS):
            raise
        for file in sorted(folder.glob("*.json")):
            if file.name not in ("modules.json", "vocab.json"):  # lists, and keys that are any bytes
                read_json(file)
        said = " ".join(one_line(str(problem).replace("\n", " ")).split())
        if not isinstance(problem, (ValueError, OSError)):
            said = f"{type(problem).__name__}: {said}"
        raise HubError(f"{folder}: {what} ({said[:LONGEST]}); download or save the model again.") from problem


def gguf_model(file: Path) -> PreTrainedModel:
    """The causal language model in a GGUF file, in float32: its numbers are rounded anew in any other dtype too."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
