"""A model's folder, or its name on the Hub, that may be a stranger's: opened, or one sentence says why not."""

from __future__ import annotations

import math
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype
from transformers.models.auto import modeling_auto

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.integration.checkpoint import decide_by_checkpoint, stems_of_codes
from mono_quant_hf.integration.conversions import checkpoint_of
from mono_quant_hf.integration.selection import Decision, decide_recorded
from mono_quant_hf.json_files import read_json
from mono_quant_hf.names import QUANT_METHOD
from mono_quant_hf.texts import one_line
from mono_quant_hf.weight_files import StoredTensor, read_headers, weight_files

from .errors import HTTPError, HubError
from .folders import WEIGHT_PATTERNS, is_inside

OURS = __name__.partition(".")[0] + "."
LONGEST = 400
"""Characters of what another library says."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

AUTO_CLASSES = {
    "AutoModelForCausalLM": ("text-generation", "CAUSAL_LM"),
    "AutoModelForSeq2SeqLM": ("translation", "SEQ_TO_SEQ_CAUSAL_LM"),
    "AutoModelForImageTextToText": ("image-text-to-text", "IMAGE_TEXT_TO_TEXT"),
    "AutoModelForSequenceClassification": ("text-classification", "SEQUENCE_CLASSIFICATION"),
    "AutoModelForTokenClassification": ("token-classification", "TOKEN_CLASSIFICATION"),
    "AutoModelForQuestionAnswering": ("question-answering", "QUESTION_ANSWERING"),
    "AutoModelForMaskedLM": ("fill-mask", "MASKED_LM"),
    "AutoModelForImageClassification": ("image-classification", "IMAGE_CLASSIFICATION"),
    "AutoModelForObjectDetection": ("object-detection", "OBJECT_DETECTION"),
    "AutoModelForSemanticSegmentation": ("image-segmentation", "SEMANTIC_SEGMENTATION"),
    "AutoModelForZeroShotImageClassification": (
        "zero-shot-image-classification",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
    ),
    "AutoModelForSpeechSeq2Seq": ("automatic-speech-recognition", "SPEECH_SEQ_2_SEQ"),
    "AutoModelForCTC": ("automatic-speech-recognition", "CTC"),
    "AutoModelForAudioClassification": ("audio-classification", "AUDIO_CLASSIFICATION"),
    "AutoModel": ("feature-extraction", ""),
}
"""Auto classes, the more telling first, with the Hub's name of the task and transformers' mapping of architectures."""


# Where a model is


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a model on the Hub and is no folder here."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def local_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a model, downloaded into the cache of huggingface_hub if `source` is a name on the Hub.

    Raises:
        HubError: it is neither, or cannot be downloaded; or what becomes part of a model's copy lies elsewhere.
    """
    if (folder := Path(source)).is_dir():
        # Of these transformers saves whatever they hold.
        for file in (folder / "config.json", folder / "generation_config.json"):
            if not is_inside(file, folder):
                raise HubError(f"{file} is a link that leads out of {folder}; put the file itself there.")
        return folder
    name = str(source)
    if not is_hub_id(name):
        raise HubError(f"{name} is neither a folder nor the name of a model on the Hub (owner/name).")
    with hub_errors(name):
        return Path(snapshot_download(name, revision=revision, ignore_patterns=_unused(name, revision)))


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What keeps a model on the Hub from being downloaded is a HubError in one sentence."""
    try:
        yield
    except GatedRepoError as problem:
        said = f"{name} is gated: ask for access on its page on the Hub, and log in (hf auth login)."
        raise HubError(said) from problem
    except RepositoryNotFoundError as problem:
        said = f"{name} is not on the Hub, or private: check the name, and log in (hf auth login)."
        raise HubError(said) from problem
    except (HfHubHTTPError, HTTPError, OSError) as problem:
        raise HubError(f"{name} could not be downloaded ({type(problem).__name__}: {problem}).") from problem


def _unused(name: str, revision: str | None) -> list[str]:
    """Files that are not needed: weights in other formats where safetensors are there."""
    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except (HTTPError, OSError):
        return []  # offline: what is in the cache is what there is
    if not any(file.endswith(".safetensors") for file in files):
        return []
    return [*(pattern for pattern in WEIGHT_PATTERNS if "safetensors" not in pattern), "original/*"]


# What its files say


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


def check_ours(folder: Path, settings: dict[str, Any] | None) -> dict[str, Any]:
    """The `quantization_config` of a folder if it is ours.

    Raises:
        HubError: the model is float, or quantized by others.
    """
    method = (settings or {}).get("quant_method")
    if settings is None or method != QUANT_METHOD:
        found = f"quantized by {method}" if method else "float"
        raise HubError(
            f"The model in {folder} is {found}, not quantized by mono_quant_hf; quantize it first "
            "(mono-quant-hf quantize)."
        )
    return settings


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


# What is made of them


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
        HubError, ValueError, OSError: as `config_of` and `model_class_of` do, or a file of weights is missing, damaged
            or does not fit; the message names it.
    """
    model_class: Any = model_class_of(folder, config_of(folder))
    settings = quantization_of(folder)
    if settings is not None and settings["quant_method"] == QUANT_METHOD:
        settings_of(folder, settings)
    if any(folder.glob("*.safetensors*")):
        stored = read_headers(weight_files(folder))
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


def quantized_model_of(source: str | os.PathLike[str]) -> tuple[PreTrainedModel, Path]:
    """A model quantized by mono_quant_hf, from a folder or the Hub, and its folder.

    Raises:
        HubError, ValueError, OSError: it is not one, or a file of it is missing or damaged.
    """
    folder = local_folder(source)
    check_ours(folder, quantization_of(folder))
    return model_of(folder), folder


def processor_of(folder: Path, auto_class: Any) -> Any:
    """What prepares the inputs of a model in a folder, by its auto class, such as `AutoTokenizer`.

    Raises:
        HubError, ValueError: there is none, or it is damaged.
    """
    with making(folder, f"{auto_class.__name__} finds nothing in it that can be loaded"):
        return auto_class.from_pretrained(folder, trust_remote_code=False)


def gguf_model(file: Path) -> PreTrainedModel:
    """The causal language model in a GGUF file, in float32: its numbers are rounded anew in any other dtype too."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )


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


# What became of each module


@dataclass(frozen=True)
class CheckpointFacts:
    """What is in a folder that `save_pretrained` wrote for a quantized model.

    Attributes:
        architecture: class of the model, such as `"LlamaForCausalLM"`.
        auto_class: the Auto class that loads it.
        task: the Hub's name of its task.
        config: how it was quantized.
        decisions: what became of every module that holds weights; a tied weight counts in the first module only.
        bytes_on_disk: of the tensors.
        bytes_as_float: of the same model in float32, codes and float16 weights counted as float32 and without
            scales and zero-points.
    """

    architecture: str
    auto_class: str
    task: str
    config: MonoQuantConfig
    decisions: list[Decision]
    bytes_on_disk: int
    bytes_as_float: int


def read_facts(folder: str | os.PathLike[str]) -> CheckpointFacts:
    """The facts of a folder that holds a model quantized by mono_quant_hf, without loading the weights.

    Raises:
        HubError, ValueError, OSError: it does not, or a file is damaged; the message says what is missing or names it.
    """
    folder = Path(folder)
    settings = check_ours(folder, quantization_of(folder))
    stored = read_headers(weight_files(folder))
    config = settings_of(folder, settings)
    skeleton = skeleton_of(folder)
    planned = decide_recorded(skeleton, config)
    decisions = decide_by_checkpoint(skeleton, planned, config, checkpoint_of(skeleton, stored))
    companions = {f"{stem}_{suffix}" for stem in stems_of_codes(stored) for suffix in ("scale", "zero_point")}
    architecture = type(skeleton).__name__
    auto_class = auto_class_of(architecture)
    return CheckpointFacts(
        architecture=architecture,
        auto_class=auto_class,
        task=AUTO_CLASSES[auto_class][0],
        config=config,
        decisions=_counted_once(skeleton, decisions),
        bytes_on_disk=bytes_of(stored),
        bytes_as_float=sum(4 * math.prod(t.shape) for name, t in stored.items() if name not in companions),
    )


def auto_class_of(architecture: str) -> str:
    """The Auto class that loads an architecture, `"AutoModel"` where none is more telling."""
    for auto_class, (_, mapping) in AUTO_CLASSES.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values():
            if architecture == names or (isinstance(names, (tuple, list)) and architecture in names):
                return auto_class
    return "AutoModel"


def _counted_once(model: PreTrainedModel, decisions: list[Decision]) -> list[Decision]:
    seen: set[int] = set()
    counted = []
    for decision in decisions:
        own = {id(p): p.numel() for p in model.get_submodule(decision.module).parameters(recurse=False)}
        counted.append(replace(decision, parameters=sum(n for key, n in own.items() if key not in seen)))
        seen |= own.keys()
    return counted


def bytes_of(stored: dict[str, StoredTensor]) -> int:
    """Bytes of tensors on disk."""
    dtypes = ((tensor, str_to_torch_dtype.get(tensor.dtype, torch.uint8)) for tensor in stored.values())
    return sum(dtype.itemsize * math.prod(tensor.shape) for tensor, dtype in dtypes)
