"""`save_quantized` and `load_quantized`: for models that are no transformers models (diffusers, timm, your own)."""

from __future__ import annotations

import copy
import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.files import folder_written_aside
from mono_quant_hf.json_files import read_json
from mono_quant_hf.modules import QuantizedModule, quantized_class_for
from mono_quant_hf.names import QUANT_METHOD
from mono_quant_hf.weight_files import StoredTensor, read_headers, weight_files

from .apply import change_modules, make_room
from .checkpoint import (
    Checkpoint,
    check_stored_tensors,
    decide_by_checkpoint,
    groups_of_one_tensor,
    modules_saying_dtype,
)
from .fingerprints import check_fingerprints, checksums_of_tensors
from .selection import Decision, settings_of

logger = logging.getLogger("mono_quant_hf")

CONFIG_FILE = "config.json"
WEIGHTS_PATTERN = "model{suffix}.safetensors"
DIFFUSERS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
"""The names by which diffusers finds the weights of its own models."""
ALIGNMENT = 64
"""In bytes, of what torch allocates. A tensor in the memory map of a file starts at any multiple of 8, and the last
bits of a float product depend on that."""


def config_of_modules(model: nn.Module) -> MonoQuantConfig:
    """The config that says how each module of a model is quantized, whichever way it came to be.

    The fields are those of most quantized modules; the others, and those in float, are overrides by their full name, or
    by a pattern that matches nothing else.

    Raises:
        ValueError: no module is quantized.
    """
    kinds = {name: kind for name, module in model.named_modules() if (kind := _kind_of(module)) is not None}
    quantized = [name for name, kind in kinds.items() if kind["weights"] != "float"]
    if not quantized:
        raise ValueError(
            f"{type(model).__name__} holds no quantized module; quantize it first (quantize_model)."
        )
    # Only of what is a product, and so can round its inputs, do the activations say anything.
    counts = Counter(json.dumps(kinds[name]) for name in quantized)
    usual = json.loads(counts.most_common(1)[0][0])
    rounds = next((k["activations"] for k in kinds.values() if k.get("activations")), None)
    usual["activations"] = rounds if usual["weights"] == "int8" else None
    overrides = {}
    for name, kind in kinds.items():
        if kind["weights"] == "float":
            overrides[_pattern_apart_from(quantized, name)] = kind
        elif kind != {key: usual.get(key) for key in kind}:
            overrides[name] = kind
    tables = any(isinstance(model.get_submodule(name), nn.Embedding) for name in quantized)
    return MonoQuantConfig(**usual, module_overrides=overrides or None, quantize_embeddings=tables)


def config_as_saved(
    model: nn.Module, config: MonoQuantConfig, planned: Sequence[Decision]
) -> MonoQuantConfig | None:
    """The config that a model is saved with: that which it was quantized by, and what is otherwise, by its full name.

    Args:
        model: as it is now; its modules may have been replaced since.
        config, planned: what it was quantized by, and what was decided then.

    Returns:
        None where nothing in it is quantized.
    """
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        return None
    if not planned:
        return config_of_modules(model)
    decided = {d.module: d for d in planned}
    overrides = config.module_overrides or {}
    usual = {"weights": config.weights, "symmetric": config.symmetric, "activations": config.activations}
    facts: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        kind, decision = _kind_of(module), decided.get(name)
        if kind is None or (decision is None and kind["weights"] == "float"):
            continue
        said = [{**usual, **overrides[name]}] if name in overrides else []
        said += [] if decision is None else [decision.to_dict()]
        if decision is None or any(kind[key] != wish[key] for wish in said for key in kind):
            facts[name] = kind
    saved = copy.deepcopy(config)
    saved.module_overrides = {**facts, **{k: o for k, o in overrides.items() if k not in facts}} or None
    return saved


def _kind_of(module: nn.Module) -> dict[str, Any] | None:
    """A module as an override says it; None where the config has no say."""
    if isinstance(module, QuantizedModule):
        settings = module.quantization
        kind: dict[str, Any] = {"weights": settings.weights}
        if settings.weights == "int8":
            kind["symmetric"] = settings.symmetric
            if module.quantizes_activations:
                kind["activations"] = settings.activations
        return kind
    return None if quantized_class_for(module) is None else {"weights": "float"}


def _pattern_apart_from(quantized: Sequence[str], name: str) -> str:
    """For a module in float: of the largest part of the model around it that holds nothing quantized, all modules."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        part = ".".join(parts[:end])
        if not any(other == part or other.startswith(f"{part}.") for other in quantized):
            return f"{glob.escape(part)}.*"
    return name


def save_quantized(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Save any quantized module: safetensors, in shards where large, and a config.json with a checksum of each tensor.

    A transformers model has `save_pretrained` for that. The config of a diffusers model is saved too, so that
    `load_quantized` needs its class alone.

    Args:
        model: with quantized modules, not offloaded.
        folder: to write into; made if it is not there, and must hold nothing. It is there whole or not at all.
        max_shard_size: the largest file, in bytes or as `"5GB"`.

    Raises:
        TypeError: `model` is a transformers model, or no module.
        ValueError: nothing in it is quantized, or it is offloaded.
        FileExistsError: `folder` holds files already.

    Example:
        >>> import tempfile, torch
        >>> from mono_quant_hf import load_quantized, quantize_model, save_quantized
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> model = quantize_model(make()).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_quantized(model, folder)
        ...     again = load_quantized(make, folder)
        >>> x = torch.randn(1, 3, 3, 3)
        >>> torch.equal(model(x), again(x))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_quantized saves an nn.Module, not a {type(model).__name__}.")
    if isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is a transformers model; save it with model.save_pretrained(...)."
        )
    config = config_of_modules(model)
    tensors = model.state_dict()
    offloaded = next((name for name, tensor in tensors.items() if _is_meta(tensor)), None)
    if offloaded is not None:
        raise ValueError(f"{offloaded} is offloaded; save the model from one device.")
    extra = next((name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)), None)
    if extra is not None:
        raise ValueError(f"{extra} is extra state, no tensor, and cannot be saved as safetensors.")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; name a new folder.")
    with folder_written_aside(target) as new:
        pattern = DIFFUSERS_PATTERN if hasattr(model, "register_to_config") else WEIGHTS_PATTERN
        save_torch_state_dict(tensors, new, filename_pattern=pattern, max_shard_size=max_shard_size)
        written = read_headers(sorted(new.glob("*.safetensors")))
        config.checksums = checksums_of_tensors(((name, tensors[name]) for name in written), config)
        content = _own_config(model) | {"quantization_config": config.to_dict()}
        (new / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_quantized(
    model: nn.Module | Callable[[], nn.Module],
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
) -> Any:
    """Load what `save_quantized` saved, in evaluation mode: the same outputs, bit for bit.

    What no checkpoint holds (non-persistent buffers, such as positions) is as the class makes it; after a model was
    saved in half precision, `.to(dtype)` casts that too, and leaves codes and scales as they are.

    Args:
        model: a diffusers class, made with the config in the folder; or a function without arguments that makes the
            float model (called such that its parameters take no memory, and where it needs them a second time, with
            memory for the float model); or a float model, which is changed in place, its weights given up.
        folder: on this machine; `huggingface_hub.snapshot_download` brings one from the Hub.
        device: where the tensors go.

    Returns:
        The model.

    Raises:
        TypeError: `model` is none of these.
        FileNotFoundError: the folder lacks its config or a file of weights.
        ValueError: the folder holds no model quantized by mono_quant_hf, a file is damaged, or the tensors are not
            those of this model; the message names them.

    Example:
        >>> import tempfile, torch
        >>> from mono_quant_hf import load_quantized, quantize_model, save_quantized
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_quantized(quantize_model(make()), folder)
        ...     load_quantized(make, folder)
        Sequential(
          (0): QuantizedLinear(in_features=8, out_features=8, bias=True, weights=int8, asymmetric)
          (1): ReLU()
          (2): QuantizedLinear(in_features=8, out_features=2, bias=True, weights=int8, asymmetric)
        )
    """
    source = Path(folder)
    content = _read_config(source)
    config = MonoQuantConfig.from_dict(content["quantization_config"])
    files = [str(file) for file in weight_files(source)]
    stored = read_headers(files)
    skeleton = _skeleton(model, source)
    if any(isinstance(module, QuantizedModule) for module in skeleton.modules()):
        raise ValueError(
            f"{type(skeleton).__name__} is quantized already; give load_quantized the float model."
        )
    aliases = {alias: written for alias, written in _left_out(files).items() if written in stored}
    checkpoint = Checkpoint.as_named(stored, aliases)
    decisions = decide_by_checkpoint(skeleton, _decisions(skeleton, config), config, checkpoint)
    change_modules(skeleton, decisions, make_room, modules_saying_dtype(checkpoint))
    names = _names_of_tensors(skeleton, files)
    check_stored_tensors(skeleton, checkpoint, exact=config.checksums is None)
    _check_names(skeleton, names, stored)
    if config.checksums is not None:
        check_fingerprints(files, config, names)
    _fill(skeleton, names, stored, device)
    waiting = next((name for name, tensor in skeleton.named_buffers() if tensor.is_meta), None)
    if waiting is not None:
        raise ValueError(
            f"{waiting} is on the meta device and in no checkpoint; give load_quantized a function that makes the "
            "model, or a model that was made on a real device."
        )
    return skeleton.to(device).eval()


def _own_config(model: nn.Module) -> dict[str, Any]:
    """The config of a diffusers model as it would save it; empty for a model without one."""
    to_json_string = getattr(model, "to_json_string", None)
    return dict(json.loads(to_json_string())) if callable(to_json_string) else {}


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; name a folder that save_quantized wrote.")
    content: dict[str, Any] = read_json(file)
    quantization = content.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{file} is not of a model that mono_quant_hf quantized; load it as a float model.")
    return content


def _skeleton(model: Any, folder: Path) -> nn.Module:
    if isinstance(model, nn.Module):
        made = model
    elif callable(model):
        if hasattr(model, "load_config") and hasattr(model, "from_config"):  # a class of diffusers
            made = _made(lambda: model.from_config(model.load_config(folder)))
        else:
            made = _made(model)
    else:
        made = None
    if not isinstance(made, nn.Module):
        raise TypeError(
            "load_quantized needs a float model, a function without arguments that makes one, or a diffusers class, "
            f"not {model!r}."
        )
    if isinstance(made, PreTrainedModel):
        raise TypeError(f"{type(made).__name__} is a transformers model; load it with from_pretrained.")
    return made


def _made(make: Callable[[], Any]) -> Any:
    """What a function makes, with parameters that take no memory, or real ones where it needs them.

    timm's Swin, for one, makes a mask on the device of a parameter, and its SwinV2 computes with the parameters.
    """
    try:
        with init_empty_weights(include_buffers=False):
            made = make()
        needed = next(_without_values(made), None) if isinstance(made, nn.Module) else None
        if needed is None:
            return made
    except Exception as problem:  # if it is not for that reason, it is raised again below
        needed = str(problem)
    logger.info("The float model is made in memory, as its constructor needs its parameters (%s).", needed)
    return make()


def _without_values(model: nn.Module) -> Iterator[str]:
    """Names of the tensors without memory that no checkpoint holds: non-persistent buffers and plain attributes."""
    for prefix, module in model.named_modules():
        kept = {key: b for key, b in module._buffers.items() if key in module._non_persistent_buffers_set}
        for key, value in {**vars(module), **kept}.items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            held = value.values() if isinstance(value, dict) else value
            if any(map(_is_meta, held if isinstance(value, (dict, list, tuple)) else [value])):
                yield f"{prefix}.{key}".lstrip(".")


def _decisions(model: nn.Module, config: MonoQuantConfig) -> list[Decision]:
    """What the config says of each module; the checkpoint has the last word."""
    decisions, settings = [], settings_of(config, model)
    for name, module in model.named_modules():
        quantized_class = quantized_class_for(module)
        if quantized_class is not None:
            in_float = Decision(name, type(module).__name__, "float", None, reason="", parameters=0)
            decisions.append(in_float.set_to(settings(name), quantized_class, reason=""))
    return decisions


def _left_out(files: list[str]) -> dict[str, str]:
    """`{name: the name it was written by}` of tensors that have several, as huggingface_hub notes in the files."""
    noted: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            noted |= tensors.metadata() or {}
    return noted


def _names_of_tensors(model: nn.Module, files: list[str]) -> dict[str, list[str]]:
    """`{name: every name of that tensor, itself included}` of what a checkpoint of the model holds.

    Which tensors are one is known from the model, but not where it was made without memory, and from the metadata of
    the files, where huggingface_hub notes under which name a tensor that has several was written.
    """
    names = groups_of_one_tensor(model)
    for left_out, written in _left_out(files).items():
        if left_out in names and written in names and names[left_out] is not names[written]:
            names[written] += names[left_out]
            names |= dict.fromkeys(names[left_out], names[written])
    return names


def _check_names(model: nn.Module, names: dict[str, list[str]], stored: dict[str, StoredTensor]) -> None:
    kind = type(model).__name__
    unknown = next((name for name in stored if name not in names), None)
    if unknown is not None:
        raise ValueError(
            f"{unknown} in {stored[unknown].file} is no tensor of {kind}; is it another model's?"
        )
    missing = next((name for name, group in names.items() if not any(n in stored for n in group)), None)
    if missing is not None:
        raise ValueError(
            f"{missing} of {kind} is missing from the checkpoint; save the quantized model again."
        )
    expected = model.state_dict()
    for name, found in stored.items():
        shape = tuple(expected[name].shape)
        if found.shape != shape:
            raise ValueError(
                f"{name} in {found.file} has shape {list(found.shape)} where {kind} has {list(shape)}; "
                "is it the checkpoint of another model?"
            )


def _fill(
    model: nn.Module,
    names: dict[str, list[str]],
    stored: dict[str, StoredTensor],
    device: str | torch.device,
) -> None:
    """Put the tensors of the files in the place of the model's own; those that were one stay one."""
    for file in sorted({entry.file for entry in stored.values()}):
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a dict
                tensor = tensors.get_tensor(key)
                if tensor.data_ptr() % ALIGNMENT:
                    tensor = tensor.clone()
                owner, _, last = key.rpartition(".")
                old = model.get_submodule(owner)._parameters.get(last)
                new = tensor if old is None else nn.Parameter(tensor, requires_grad=old.requires_grad)
                for name in names[key]:
                    owner, _, last = name.rpartition(".")
                    module = model.get_submodule(owner)
                    place: dict[str, Any] = module._buffers if old is None else module._parameters
                    place[last] = new


def _is_meta(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_meta
