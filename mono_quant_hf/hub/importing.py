"""Any checkpoint in, a quantized one out: float, GGUF, and the int8 of compressed-tensors and bitsandbytes.

int8 codes with a scale per output channel, or per tensor, are taken over as they are. What has another form (groups,
4 bits, float8, the blocks of GGUF) is made float first and rounded anew.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, CompressedTensorsConfig
from transformers.pytorch_utils import Conv1D

from mono_quant_hf.calibration.samples import reads_text
from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.files import check_room, scratch_folder
from mono_quant_hf.integration import quantize_model
from mono_quant_hf.integration.selection import aliases_of
from mono_quant_hf.json_files import read_json
from mono_quant_hf.names import QUANT_METHOD
from mono_quant_hf.versions import require
from mono_quant_hf.weight_files import INDEX, StoredTensor, opener, read_headers, weight_files

from .card import load_card, model_card
from .checkpoint import (
    gguf_model,
    is_hub_id,
    local_folder,
    making,
    model_of,
    processor_of,
    quantization_of,
    skeleton_of,
)
from .errors import HubError
from .estimate import bytes_when_quantized
from .export.bitsandbytes import ROW_MAJOR
from .export.compressed_tensors import unpack
from .folders import check_destination, copy_companions, written_beside

logger = logging.getLogger("mono_quant_hf")


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    config: MonoQuantConfig | None = None,
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    calibration: Any = None,
    **options: Any,
) -> str:
    """Write a checkpoint quantized by mono_quant_hf, with its tokenizer or processor and a model card.

    What saving needs is looked at before the work: the folder, and room on its disk. The model is written first, and
    what of the rest cannot be is warned about.

    Args:
        source: folder or Hub name of a float model, or of an int8 one of compressed-tensors or bitsandbytes; or a
            GGUF file.
        destination: a folder, written whole or not at all.
        config: how to quantize; `MonoQuantConfig()` if None, as it has to be where int8 codes are taken over.
        revision: of a source on the Hub.
        dtype: of what is left in float, `"auto"` for that of the checkpoint.
        overwrite: replace a checkpoint that this package wrote.
        max_shard_size: where to split the weights; codes taken over keep the files of the source.
        calibration: how int8 codes are chosen, as in `quantize_model`; the float model is in memory then.
        options: of calibration: `sampling`, `compensation`, `resume_folder`, `progress`.

    Returns:
        what was done, in a few words.

    Raises:
        HubError: the source is quantized by mono_quant_hf already or in a way that cannot be read, or the
            destination is taken.
        TypeError: options of calibration without it.
        OSError, ImportError: the disk has too little room; what reads the format is missing.
        HubError, ValueError: a file of the source is damaged.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     BertModel(config).save_pretrained(f"{folder}/float")
        ...     quantize_checkpoint(f"{folder}/float", f"{folder}/int8")
        ...     model = BertModel.from_pretrained(f"{folder}/int8")
        'rounded from float'
        >>> model.encoder.layer[0].intermediate.dense
        QuantizedLinear(in_features=32, out_features=32, bias=True, weights=int8, asymmetric)
    """
    check_destination(destination, overwrite, source)
    if options and calibration is None:
        raise TypeError(f"{next(iter(options))} is for calibration; give calibration= too, or leave it out.")
    folder = Path(source) if str(source).endswith(".gguf") else local_folder(source, revision)
    work = _Import(source, config or MonoQuantConfig(), dtype, max_shard_size, calibration, options)
    write, done = work.way(folder)
    with written_beside(destination, overwrite, source) as new, scratch_folder(new.parent) as scratch:
        add_companions(source, write(folder, new, scratch), new, destination)
    return done


Write = Callable[[Path, Path, Path], Path]
"""Writes what is in a folder or file into a new folder, with one for scratch; says where what belongs to it is."""


@dataclass(frozen=True)
class _Import:
    """One run of `quantize_checkpoint`, whose arguments these are."""

    source: Any
    config: MonoQuantConfig
    dtype: Any
    max_shard_size: int | str
    calibration: Any
    options: dict[str, Any]

    def way(self, folder: Path) -> tuple[Write, str]:
        """How a source is written, and what that is in a few words."""
        again = "rounded a second time" if self.calibration is None else "calibrated"
        if folder.suffix == ".gguf":
            if not folder.is_file():
                raise HubError(f"There is no file {folder}.")
            require("gguf", "Reading GGUF")
            return self.from_gguf, f"made float and {again}, as GGUF has a scale for each block of a row"
        settings = quantization_of(folder)
        if settings is None:
            return self.from_float, f"{'rounded' if self.calibration is None else 'calibrated'} from float"
        method = settings["quant_method"]
        if method == QUANT_METHOD:
            raise HubError(
                f"{self.source} is quantized by mono_quant_hf already; give the float model it was made from."
            )
        if method == "compressed-tensors" and not _codes_fit(folder, settings):
            said = f"made float and {again}, as its format is not int8 with a scale per channel"
            return self.from_compressed, said
        if method != "compressed-tensors" and not (method == "bitsandbytes" and settings.get("load_in_8bit")):
            raise HubError(
                f"{self.source} is quantized by {method}, which cannot be taken over; give the float model it was made "
                "from."
            )
        if self.config != MonoQuantConfig() or self.calibration is not None:
            raise HubError(
                f"{self.source} holds int8 codes, which are taken over as they are; leave the settings out, or give "
                "the float model it was made from."
            )
        skeleton_of(folder)  # codes of what no class can load are not taken over
        return self.from_codes, "the int8 codes taken over as they are"

    def from_float(self, folder: Path, new: Path, scratch: Path) -> Path:
        check_room(new, bytes_when_quantized(folder, self.config, self.dtype), "The quantized model")
        if self.calibration is None:
            model = model_of(folder, dtype=self.dtype, quantization_config=self.config)
        else:
            tokenizer = processor_of(folder, AutoTokenizer) if reads_text(self.calibration) else None
            model = model_of(folder, dtype=self.dtype).eval()
            for part in (model.config, model.generation_config if model.can_generate() else None):
                if part is not None:
                    part.save_pretrained(new)  # one that cannot be saved shows now, and not after hours
            calibrated = {"calibration": self.calibration, "tokenizer": tokenizer, **self.options}
            quantize_model(model, self.config, **calibrated)
        model.save_pretrained(new, max_shard_size=self.max_shard_size)
        return folder

    def from_gguf(self, file: Path, new: Path, scratch: Path) -> Path:
        made = scratch / "float"
        with making(file, "it is no GGUF file that transformers can read"):
            gguf_model(file).save_pretrained(made)
        try:
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(made)
        except (ValueError, KeyError, NotImplementedError) as problem:
            logger.warning("The tokenizer in %s cannot be read (%s): add one to the result.", file, problem)
        return self.from_float(made, new, scratch)

    def from_compressed(self, folder: Path, new: Path, scratch: Path) -> Path:
        require("compressed-tensors", "Reading this format")
        made = scratch / "float"
        how = CompressedTensorsConfig(dequantize=True)
        model_of(folder, dtype=self.dtype, quantization_config=how).save_pretrained(made)
        _write_config(made, made, None)
        self.from_float(made, new, scratch)
        return folder

    def from_codes(self, folder: Path, new: Path, scratch: Path) -> Path:
        check_room(
            new, sum(file.stat().st_size for file in weight_files(folder)), f"The model of {self.source}"
        )
        settings = quantization_of(folder) or {}
        decoder = _of_bitsandbytes if settings["quant_method"] == "bitsandbytes" else _of_compressed
        config, convert = decoder(folder, settings, read_headers(weight_files(folder)))
        _convert_files(folder, new, convert)
        _write_config(folder, new, config)
        return folder


def add_companions(source: Any, folder: Path, new: Path, destination: str | os.PathLike[str]) -> None:
    """Complete a quantized model: what its float model's folder holds beside the weights, and a model card.

    What of that cannot be had is warned about: the model is worth as much without.

    Args:
        source: what the user calls the float model.
        folder: where it is.
        new: where the quantized one is written.
        destination: where it will be in the end.
    """
    copy_companions(folder, new)
    base = str(source) if is_hub_id(str(source)) else None
    name = Path(destination).resolve().name
    try:
        model_card(new, name, original=load_card(folder), base_model=base).save(new / "README.md")
    except Exception as problem:
        logger.warning(
            "No model card was written (%s: %s); the model itself is whole.", type(problem).__name__, problem
        )


# The codes of others

Load = Callable[[str], Tensor]
Convert = Callable[[str, Load], dict[str, Tensor]]
"""Name of a stored tensor, and what loads one, to the tensors that stand for it here."""


def _groups(folder: Path, settings: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """What each of the config groups says of `"weights"` or `"input_activations"`; nothing where it says null.

    Raises:
        HubError: they are not what the format has.
    """
    groups = settings.get("config_groups")
    if isinstance(groups, dict) and all(isinstance(group, dict) for group in groups.values()):
        parts = [group.get(part) or {} for group in groups.values()]
        if all(isinstance(settings, dict) for settings in parts):
            return parts
    raise HubError(
        f"{folder / 'config.json'} has no config_groups as compressed-tensors writes them; download or save the model "
        "again."
    )


def _codes_fit(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether all that is quantized is int8 with a scale per output channel or per tensor."""
    for weights in _groups(folder, settings, "weights"):
        if (
            (weights.get("num_bits"), weights.get("type")) != (8, "int")
            or weights.get("strategy") not in ("channel", "tensor")
            or weights.get("actorder")
        ):
            return False
    stored = read_headers(weight_files(folder))
    scales = {name: tensor for name, tensor in stored.items() if name.endswith(".weight_scale")}
    return bool(scales) and all(
        len(tensor.shape) < 2 or (len(tensor.shape) == 2 and tensor.shape[1] == 1)
        for tensor in scales.values()
    )


def _of_compressed(
    folder: Path, settings: dict[str, Any], stored: dict[str, StoredTensor]
) -> tuple[MonoQuantConfig, Convert]:
    """The config of compressed-tensors as ours, and the conversion of its tensors."""
    zero_points = any(name.endswith(".weight_zero_point") for name in stored)
    activations = None
    inputs = [part for part in _groups(folder, settings, "input_activations") if part]
    if inputs:
        if all(part.get("dynamic") is True and part.get("num_bits") == 8 for part in inputs):
            activations = "int8"
        else:
            logger.warning("The activations were to be quantized too; here they are computed in float.")
    own = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    dropped = [
        name
        for name in stored
        if name.endswith(("_scale", "_zero_point", "_g_idx")) and name.rpartition(".")[2] not in own
    ]
    if dropped:
        logger.warning(
            "%d tensors, such as %s, have no place here and were left out.", len(dropped), dropped[0]
        )

    def convert(name: str, load: Load) -> dict[str, Tensor]:
        base, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            rows, columns = load(f"{base}.weight_shape").tolist()
            codes = unpack(load(name), (rows, columns))
        elif kind == "weight" and f"{base}.weight_scale" in stored:
            codes = load(name)
        else:
            return {} if kind in own or name in dropped else {name: load(name)}
        shape = (len(codes), 1)
        scale = load(f"{base}.weight_scale").float().reshape(-1, 1).expand(shape).contiguous()
        tensors = {f"{base}.weight_int8": codes, f"{base}.weight_scale": scale}
        if zero_points:
            zero_point = torch.zeros(shape, dtype=torch.int8)
            if f"{base}.weight_zero_point" in stored:
                zero_point = load(f"{base}.weight_zero_point")
                if zero_point.dtype is torch.int32:  # packed like the weight, but down the rows
                    zero_point = unpack(zero_point.T, (1, len(codes))).T
                zero_point = zero_point.reshape(-1, 1).to(torch.int8).expand(shape).contiguous()
            tensors[f"{base}.weight_zero_point"] = zero_point
        return tensors

    return MonoQuantConfig(symmetric=not zero_points, activations=activations), convert


def _of_bitsandbytes(
    folder: Path, settings: dict[str, Any], stored: dict[str, StoredTensor]
) -> tuple[MonoQuantConfig, Convert]:
    """The config of LLM.int8 as ours, and the conversion of its tensors."""
    skeleton = skeleton_of(folder)
    aliases = aliases_of(skeleton)
    conv1ds = (name for name, module in skeleton.named_modules() if isinstance(module, Conv1D))
    transposed = {alias for name in conv1ds for alias in aliases(name)}

    def convert(name: str, load: Load) -> dict[str, Tensor]:
        base, _, kind = name.rpartition(".")
        if kind in ("SCB", "weight_format"):
            return {}
        if kind != "weight" or f"{base}.SCB" not in stored:
            return {name: load(name)}
        if f"{base}.weight_format" in stored and int(load(f"{base}.weight_format")) != ROW_MAJOR:
            raise HubError(
                f"{name} is in a layout that bitsandbytes no longer writes; load and save the model with a current "
                "bitsandbytes first."
            )
        scale = (load(f"{base}.SCB").float() / 127).reshape(-1, 1)
        codes = load(name).masked_fill(scale == 0, 0)  # a row of zeros
        scale = scale.masked_fill(scale == 0, 1)
        if base in transposed:
            codes, scale = codes.T.contiguous(), scale.T.contiguous()
        return {f"{base}.weight_int8": codes, f"{base}.weight_scale": scale}

    return MonoQuantConfig(symmetric=True), convert


def _convert_files(folder: Path, new: Path, convert: Convert) -> None:
    """Write every weight file anew, one in memory at a time, with what `convert` makes of each tensor's name."""
    files = weight_files(folder)
    stored, opened = read_headers(files), opener()

    def load(name: str) -> Tensor:
        if name not in stored:
            raise HubError(f"{name} is missing from {folder}; download or save the model again.")
        tensor: Tensor = opened(stored[name].file).get_tensor(name)
        return tensor

    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        made: dict[str, Tensor] = {}
        for name in sorted(name for name, tensor in stored.items() if tensor.file == str(file)):
            with making(file, f"{name} in it is not what the format says"):
                tensors = convert(name, load)
            _check_codes(file, tensors)
            made |= tensors
        save_file(made, new / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(made, file.name)
        total += sum(tensor.nbytes for tensor in made.values())
    if len(files) > 1:
        _write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _check_codes(file: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse what could be written, and not loaded: a scale that is none, or one of something else than codes."""
    for name, scale in tensors.items():
        if name.endswith("_scale"):
            codes = tensors[name.removesuffix("_scale") + "_int8"]
            if codes.dtype is not torch.int8 or not bool((scale.isfinite() & (scale > 0)).all()):
                raise HubError(
                    f"{name} in {file} is no positive scale of int8 codes; download or save the model again."
                )


def _write_config(folder: Path, new: Path, config: MonoQuantConfig | None) -> None:
    """The config.json of `folder` with another quantization config, or with none."""
    data = read_json(folder / "config.json")
    data.pop("compression_config", None)
    data.pop("quantization_config", None)
    if config is not None:
        data["quantization_config"] = config.to_dict()
    _write_json(new / "config.json", data)


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
