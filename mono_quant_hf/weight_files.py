"""The safetensors files of a model: which they are, and what their headers say."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .json_files import read_index
from .texts import shown

INDEX = "model.safetensors.index.json"
"""Says in which file each tensor of a checkpoint in shards is."""


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor: where it is, its safetensors dtype (`"I8"`, `"F32"`, ...) and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a model: those that its index names, else `model.safetensors`, else all in the folder.

    Raises:
        FileNotFoundError: there is none, or one that the index names is missing.
        ValueError: the index is damaged, or names files elsewhere.
    """
    folder = Path(folder)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        names = sorted(set(read_index(folder / INDEX).values()))
    elif not names or "model.safetensors" in names:
        names = ["model.safetensors"]
    missing = next((folder / name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise FileNotFoundError(
            f"{missing} is missing; name the folder of a saved model, or download or save it again."
        )
    return [folder / name for name in names]


def read_headers(files: Iterable[str | os.PathLike[str]]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name.

    Raises:
        ValueError: a file is missing, truncated or no safetensors file, or a tensor is in two files; names the file.
    """
    stored: dict[str, StoredTensor] = {}
    for file in map(str, files):
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"{file} is no safetensors file; a mono_quant checkpoint is saved as safetensors only."
            )
        if not Path(file).is_file():
            raise ValueError(f"{file} is missing; the checkpoint is incomplete, download or save it again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    if not name.isprintable():
                        raise ValueError(
                            f"{file} holds a tensor named {shown(name)}, with characters that no name has; download or "
                            "save it again."
                        )
                    if name in stored:
                        raise ValueError(
                            f"{name} is both in {stored[name].file} and in {file}; save the model again."
                        )
                    part = tensors.get_slice(name)
                    stored[name] = StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as problem:
            raise ValueError(f"{file} is damaged ({problem}); download or save it again.") from problem
    return stored


def opener() -> Callable[[str], Any]:
    """A function that opens safetensors files by path, each once: reading a header takes longer than most tensors."""
    return functools.cache(lambda file: safe_open(file, framework="pt"))
