"""Folders of models: written beside and then renamed, so that they are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mono_quant_hf.json_files import read_index, read_json

from .errors import HubError

WEIGHT_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.ckpt"),
    *("*.gguf", "*.h5", "*.msgpack", "*.onnx"),
)
"""Files that hold weights, or say which file does, and so never are copied beside other weights."""


INDEX = "model.safetensors.index.json"


@contextmanager
def written_beside(destination: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to write into, which becomes `destination` when the block ends without an error.

    Args:
        destination: the folder to make; an empty one may be there already.
        overwrite: replace a folder that holds files, or a file. What is there stays until the new one is complete.

    Raises:
        HubError: `destination` holds something and `overwrite` is False, or it is no place for a folder.
    """
    target = Path(destination)
    check_destination(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        # A folder of its own inside: the scratch folder is readable by its owner only, what is kept shall not be.
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if target.exists() or target.is_symlink():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise


def check_destination(destination: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse, before any work, a destination that would be refused in the end."""
    target = Path(destination)
    if not target.name or target.resolve() == Path.cwd().resolve():
        raise HubError(f"{destination} is the folder this runs in; name a new folder to write to.")
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() and not overwrite:
        raise HubError(
            f"{target} is there already; name a new folder, or allow it to be replaced (--overwrite)."
        )


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what a model's folder holds beside its weights and config: tokenizer, processor, templates, licence, and
    the further modules of sentence-transformers.

    Files that are in the destination already stay as they are; a model card is left out, it speaks of the source.
    """
    folders = {"additional_chat_templates", "chat_templates", *_module_folders(source)}
    for file in sorted(source.iterdir()):
        target = destination / file.name
        if file.name in ("README.md", "config.json") or any(
            file.match(pattern) for pattern in WEIGHT_PATTERNS
        ):
            continue
        if file.name.startswith(".") or target.exists():
            continue
        if file.is_dir():
            if file.name in folders:
                shutil.copytree(file, target)
        else:
            shutil.copyfile(file, target)


def _module_folders(folder: Path) -> set[str]:
    """The folders of a sentence-transformers model: pooling, dense layers and so on."""
    file = folder / "modules.json"
    modules = read_json(file, (list,)) if file.is_file() else []
    paths = (module.get("path") for module in modules if isinstance(module, dict))
    return {path for path in paths if isinstance(path, str) and path}


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds weights as safetensors, or an index of such."""
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: those its index names, else all.

    Raises:
        HubError: there is none, or the index names one that is missing.
        ValueError: the index is damaged, or names files elsewhere.
    """
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(read_index(index).values()))
    else:
        single = folder / "model.safetensors"
        names = (
            ["model.safetensors"]
            if single.is_file()
            else sorted(f.name for f in folder.glob("*.safetensors"))
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise HubError(
            f"{folder} lacks {missing[0]}, which its index names; download or save the model again."
        )
    if not names:
        raise HubError(f"{folder} holds no safetensors file; name the folder of a saved model.")
    return [folder / name for name in names]
