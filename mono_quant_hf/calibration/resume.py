"""What a calibration has done so far, kept in a folder for it to go on from after an interruption."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mono_quant_hf.files import SCRATCH, file_written_aside

MANIFEST, TEXT = "calibration.json", "text.safetensors"
_KNOWN = (MANIFEST, TEXT, "stage-*.safetensors", f"{SCRATCH}*")
_OF_ANOTHER = "of another model, samples or settings: choose another folder, or delete it."
_ABOUT_THE_FILES = ("_name_or_path", "transformers_version", "architectures", "dtype")
"""Of a config, what is about where a model was saved, and not about what it computes."""

Expected = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Names of tensors with the dtype and shape that each must have."""


def fingerprint_of(*parts: Any) -> str:
    """128 bits of the hash of all that the parts hold: every byte of tensors, and of modules all state and the config.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> before = fingerprint_of(layer, {"samples": [torch.ones(3)]})
        >>> before == fingerprint_of(layer, {"samples": [torch.ones(3)]})
        True
        >>> with torch.no_grad():
        ...     layer.weight[3, 3] += 1
        >>> before == fingerprint_of(layer, {"samples": [torch.ones(3)]})
        False
    """
    digest = xxhash.xxh3_128()
    for part in parts:
        _add(digest, part)
    return str(digest.hexdigest())


def _add(digest: Any, part: Any) -> None:
    if isinstance(part, nn.Module):
        config: Any = getattr(part, "config", None)
        settings: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
        settings = {key: value for key, value in settings.items() if key not in _ABOUT_THE_FILES}
        _add(digest, json.dumps(settings, sort_keys=True, default=repr))
        _add(digest, repr(part))
        _add(digest, dict(part.named_parameters()) | dict(part.named_buffers()))
    elif isinstance(part, Tensor):
        digest.update(f"{part.dtype}{list(part.shape)}".encode())
        if part.numel() and not part.is_meta:
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(part, Mapping):
        digest.update(f"{{{len(part)}".encode())
        for key, value in part.items():
            _add(digest, key)
            _add(digest, value)
    elif isinstance(part, (list, tuple)):
        digest.update(f"[{len(part)}".encode())
        for value in part:
            _add(digest, value)
    elif isinstance(part, (str, int, float, type(None))):
        digest.update(f"{type(part).__name__} {part!r}".encode())
    else:
        digest.update(pickle.dumps(part))


def claim_resume_folder(folder: str | os.PathLike[str], fingerprint: str) -> Path:
    """The folder, made if it is missing, of the calibration with this fingerprint of all that its tensors depend on.

    Raises:
        ValueError: as `check_resume_folder`, or its manifest speaks of another fingerprint.
    """
    recorded = check_resume_folder(folder)
    if recorded not in (None, fingerprint):
        raise ValueError(f"{folder} holds the calibration {_OF_ANOTHER}")
    if recorded is None:
        with file_written_aside(Path(folder) / MANIFEST) as new:
            new.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
    return Path(folder)


def check_resume_folder(folder: str | os.PathLike[str]) -> str | None:
    """The fingerprint of the calibration that a folder holds, None where there is none or no folder.

    Raises:
        ValueError: it is no folder, holds other files, or its manifest is damaged; the message says what to do.
    """
    path = Path(folder)
    if not os.path.lexists(path):
        return None
    if not path.is_dir():
        raise ValueError(f"{folder} is no folder, so no calibration can be kept in it: choose a new folder.")
    manifest = path / MANIFEST
    known = _KNOWN if manifest.exists() else (TEXT, f"{SCRATCH}*")
    for file in sorted(path.iterdir()):
        if not any(file.match(pattern) for pattern in known):
            raise ValueError(
                f"{folder} holds {file.name}, which is of no calibration that can go on: choose a new or empty folder."
            )
    if not manifest.exists():
        return None
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise ValueError(
            f"{manifest} is damaged ({type(problem).__name__}), so what {folder} belongs to is not known: delete it, "
            "or choose another folder."
        ) from problem


def load_kept(path: Path, fingerprint: str, expected: Expected) -> dict[str, Tensor] | None:
    """The tensors of a file that `save_kept` wrote, None where it is not there.

    Raises:
        ValueError: it is damaged, holds other tensors than expected, or is of another fingerprint; names the file.
    """
    if not os.path.lexists(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as problem:
        raise ValueError(f"{path} is damaged ({problem}): delete it, and it is made again.") from problem
    if about.get("fingerprint") != fingerprint:
        raise ValueError(f"{path} is {_OF_ANOTHER}")
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != dict(expected) or about.get("content") != _content(tensors):
        raise ValueError(
            f"{path} is damaged (its tensors are not those that were saved): delete it, and it is made again."
        )
    return tensors


def save_kept(path: Path, fingerprint: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with what they belong to; the file is there whole or not at all."""
    kept = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with file_written_aside(path) as new:
        save_file(kept, new, metadata={"fingerprint": fingerprint, "content": _content(kept)})


def _content(tensors: Mapping[str, Tensor]) -> str:
    return fingerprint_of([(name, tensors[name]) for name in sorted(tensors)])
