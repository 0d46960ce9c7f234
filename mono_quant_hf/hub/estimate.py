"""What a model would take in memory in each form, and where a device map would put it, before any weight is there."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.accelerate import _get_device_map, compute_module_sizes, get_device

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.integration.apply import change_modules, make_room
from mono_quant_hf.integration.placement import keep_tied_together
from mono_quant_hf.integration.selection import Decision, decide, quantized_share
from mono_quant_hf.weight_files import StoredTensor, read_headers, weight_files

from .checkpoint import bytes_of, hub_errors, is_hub_id, local_folder, skeleton_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Form:
    """A model in one form.

    Attributes:
        name: such as `"bfloat16"` or `"int8, embeddings too"`.
        bytes: of its parameters and buffers, those that are tied once: what `get_memory_footprint()` says once it is
            loaded. The cache of keys and values, and what a forward pass takes, come on top.
        share: of the parameters in modules with weights that is quantized, 0 to 1.
        device_map: `{module: device}` as `device_map="auto"` gives it; None where no memory was named.
        bytes_by_device: of these bytes, on each device of the map.
    """

    name: str
    bytes: int
    share: float
    device_map: dict[str, int | str] | None
    bytes_by_device: dict[int | str, int]


@dataclass(frozen=True)
class Estimate:
    """A model in several forms.

    Attributes:
        architecture: the class of the model.
        parameters: how many numbers it has, those that are tied once.
        bytes_on_disk: of the tensors in its safetensors files; None where there are none.
        forms: in float32, bfloat16, float16, int8, int8 with embeddings, and as a config says that was given.
    """

    architecture: str
    parameters: int
    bytes_on_disk: int | None
    forms: tuple[Form, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    source: str | os.PathLike[str],
    config: MonoQuantConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    revision: str | None = None,
) -> Estimate:
    """What a model takes in float32, bfloat16, float16, int8 and int8 with embeddings.

    Read from its config and the headers of its safetensors files: of a model on the Hub no weights are downloaded, and
    none are made.

    Args:
        source: folder or Hub name of a model.
        config: how to quantize, for one form more.
        dtype: of what is not quantized; None for that of the checkpoint.
        max_memory: as for `from_pretrained`, such as `{0: "8GB", "cpu": "16GB"}`; devices that this machine lacks may
            be named too.
        revision: of a model on the Hub.

    Raises:
        HubError, ValueError, OSError: there is no such model, or a file of it is damaged.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     BertModel(config).save_pretrained(folder)
        ...     made = estimate(folder)
        >>> [form.name for form in made.forms]
        ['float32', 'bfloat16', 'float16', 'int8', 'int8, embeddings too']
        >>> made.forms[0].bytes > 2 * made.forms[1].bytes - 9000 > made.forms[4].bytes
        True
    """
    folder, stored = _config_and_headers(source, revision)
    skeleton = skeleton_of(folder)
    rest = dtype or _dtype_of(skeleton, stored)
    quantized = {"int8": MonoQuantConfig(), "int8, embeddings too": MonoQuantConfig(quantize_embeddings=True)}
    if config is not None:
        quantized["as asked"] = config
    wanted: list[tuple[str, torch.dtype, MonoQuantConfig | None]] = [
        *((str(one).removeprefix("torch."), one, None) for one in FLOATS),
        *((name, rest, one) for name, one in quantized.items()),
    ]
    limits = None if max_memory is None else dict(max_memory)
    return Estimate(
        architecture=type(skeleton).__name__,
        parameters=sum(p.numel() for _, p in _untied(skeleton)),
        bytes_on_disk=bytes_of(stored) if stored else None,
        forms=tuple(_form(name, *_in_form(skeleton, rest, how), limits) for name, rest, how in wanted),
    )


def bytes_when_quantized(folder: Path, config: MonoQuantConfig, dtype: Any) -> int:
    """What the parameters of the model in a folder take once they are quantized, without its overrides and skips."""
    skeleton = skeleton_of(folder)
    rest = dtype if isinstance(dtype, torch.dtype) else _dtype_of(skeleton, {})
    # Overrides and skips would be warned of here and again when the model is quantized.
    alike = MonoQuantConfig(
        weights=config.weights, symmetric=config.symmetric, quantize_embeddings=config.quantize_embeddings
    )
    model, _ = _in_form(skeleton, rest, alike)
    return sum(parameter.nbytes for _, parameter in _untied(model))


def _config_and_headers(
    source: str | os.PathLike[str], revision: str | None
) -> tuple[Path, dict[str, StoredTensor]]:
    """A folder with the config.json, and what the headers of the safetensors files say: nothing where none are."""
    name = str(source)
    if not is_hub_id(name):
        folder = local_folder(source)
        return folder, read_headers(weight_files(folder)) if any(folder.glob("*.safetensors")) else {}
    with hub_errors(name):
        folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
    try:
        found = HfApi().get_safetensors_metadata(name, revision=revision)
    except (NotASafetensorsRepoError, SafetensorsParsingError, EntryNotFoundError, OfflineModeIsEnabled):
        return folder, {}
    tensors = ((file, parsed.tensors) for file, parsed in found.files_metadata.items())
    return folder, {
        tensor: StoredTensor(file, info.dtype, tuple(info.shape))
        for file, infos in tensors
        for tensor, info in infos.items()
    }


def _dtype_of(skeleton: PreTrainedModel, stored: dict[str, StoredTensor]) -> torch.dtype:
    """That of the checkpoint, as `dtype="auto"` takes it."""
    if isinstance(recorded := skeleton.config.dtype, torch.dtype):
        return recorded
    by_name = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return next((by_name[t.dtype] for t in stored.values() if t.dtype in by_name), torch.float32)


def _in_form(
    skeleton: PreTrainedModel, dtype: torch.dtype, config: MonoQuantConfig | None
) -> tuple[PreTrainedModel, list[Decision]]:
    """A copy of the skeleton with the parameters that the loaded model has, and what was decided on."""
    model = copy.deepcopy(skeleton)
    plan = model._get_dtype_plan(dtype)
    kept = build_glob_alternation(list(plan))[0] if plan else None
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if kept and kept.search(name) else dtype)
    decisions = [] if config is None else decide(model, config)
    change_modules(model, decisions, make_room)
    return model, decisions


def _form(
    name: str,
    model: PreTrainedModel,
    decisions: list[Decision],
    limits: dict[int | str, int | str] | None,
) -> Form:
    sizes, _ = compute_module_sizes(model, only_modules=False)
    device_map = None
    by_device: dict[int | str, int] = {}
    if limits is not None:
        said = logging.getLogger("accelerate.utils.modeling")
        level = said.level
        said.setLevel(logging.ERROR)  # a warning of each device that is not in this machine
        try:
            device_map = _get_device_map(model, "auto", dict(limits), None)
        finally:
            said.setLevel(level)
        keep_tied_together(model, device_map)
        for tensor, _ in [*_untied(model), *model.named_buffers()]:
            device: Any = get_device(device_map, tensor)
            by_device[device] = by_device.get(device, 0) + sizes[tensor]
    return Form(name, sizes[""], quantized_share(decisions), device_map, by_device)


def _untied(model: PreTrainedModel) -> Iterable[tuple[str, torch.nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if n not in model.all_tied_weights_keys)
