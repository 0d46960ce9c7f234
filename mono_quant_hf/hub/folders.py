"""Folders of models: what may be replaced by one, what belongs to one, and where it ends."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mono_quant_hf.files import folder_written_aside
from mono_quant_hf.json_files import read_json
from mono_quant_hf.names import QUANT_METHOD

from .errors import HubError

logger = logging.getLogger("mono_quant_hf")

WEIGHT_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.ckpt"),
    *("*.gguf", "*.h5", "*.msgpack", "*.onnx"),
)
"""Files that hold weights, or say which file does, and so never are copied beside other weights."""

CONTENTS = ".mono_quant_hf"
"""A file in what the commands write, with the names of all that they wrote: no more than that is ever overwritten."""

_USUAL = (
    *("config.json", "generation_config.json", "*processor_config.json", "README.md", CONTENTS),
    *("model*.safetensors", "model*.safetensors.index.json", "tokenizer*", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*"),
)
"""What `save_pretrained` and `save_quantized` write, and a model card."""


@contextmanager
def written_beside(
    destination: str | os.PathLike[str], overwrite: bool = False, source: Any = None
) -> Iterator[Path]:
    """An empty folder to write into, which becomes `destination` when the block ends without an error.

    Args:
        destination: the folder to make; an empty one may be there already.
        overwrite: replace a checkpoint that this package wrote. What is there stays until the new one is complete.
        source: the model that is read meanwhile; see `check_destination`.

    Raises:
        HubError: as `check_destination`.
    """
    check_destination(destination, overwrite, source)

    def may_replace(target: Path) -> bool:
        try:
            check_destination(target, overwrite, source)
        except HubError:
            return False
        return True

    with folder_written_aside(destination, may_replace) as new:
        yield new
        names = sorted(file.relative_to(new).as_posix() for file in new.rglob("*") if file.is_file())
        (new / CONTENTS).write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")


def check_destination(
    destination: str | os.PathLike[str], overwrite: bool = False, source: Any = None
) -> None:
    """Refuse, before any work, a destination that would be refused in the end.

    Args:
        destination: a folder that is not there, or holds nothing.
        overwrite: it may also hold a checkpoint that this package wrote, and nothing else.
        source: the folder or file that is read; it must not be, or be in, the destination. What is no path is no harm.

    Raises:
        HubError: it is none of these, or holds the folder that this runs in; says what stands in the way.
    """
    target = Path(destination)
    whole = Path(os.path.realpath(target))
    check_not_read(target, source)
    if whole in (here := Path.cwd(), *here.parents):
        raise HubError(f"{target} holds the folder that this runs in; name a new folder to write to.")
    if target.is_symlink():
        raise HubError(f"{target} is a link; name the folder that it leads to, or another one.")
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not there.is_dir():
        raise HubError(f"{there} is a file; name a new folder to write to.")
    if os.path.ismount(target):
        raise HubError(f"{target} is a mount point, which cannot be replaced; name a folder in it.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise HubError(
            f"{target} is there already; name a new folder, or allow it to be replaced (--overwrite)."
        )
    if (foreign := _foreign(target)) is not None:
        raise HubError(
            f"{target} holds {foreign}, so it is not only a checkpoint that mono_quant_hf wrote, and is not replaced; "
            "name another folder, or remove it yourself."
        )


def check_not_read(target: Path, source: Any) -> None:
    """Refuse to write to a file or folder that is read, or holds what is read.

    Raises:
        HubError: it is, or does.
    """
    if isinstance(source, (str, os.PathLike)) and os.path.exists(source):
        whole, read = Path(os.path.realpath(target)), Path(os.path.realpath(source))
        if whole in (read, *read.parents):
            raise HubError(f"{target} is, or holds, {source}, which is read; name another place to write to.")


def _foreign(folder: Path) -> str | None:
    """Something in a folder that is no part of a checkpoint that this package wrote, None where there is nothing."""
    try:
        contents = folder / CONTENTS
        listed = set(read_json(contents, (list,))) if contents.is_file() else None
        if listed is None and (
            read_json(folder / "config.json")["quantization_config"]["quant_method"] != QUANT_METHOD
        ):
            return "a checkpoint of others"
    except (OSError, ValueError, TypeError, KeyError, HubError):
        return "other files"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        usual = path.parent == folder and any(path.match(pattern) for pattern in _USUAL)
        folder_here = path.is_dir() and not path.is_symlink()
        if not (folder_here or usual or name in (listed or ())):
            return name
    return None


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads to something within a model's folder; from the Hub's cache also to where that keeps files.

    There a snapshot holds links to `blobs` of its repository, and those may lead on to `blobs` of the whole cache.
    """
    root, found = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    roots = [root]
    repo = root.parents[1] if root.parent.name == "snapshots" else None
    if repo is not None and repo.name.startswith("models--"):
        roots += [repo / "blobs", repo.parent / "blobs"]
    return any(found.is_relative_to(one) for one in roots)


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what a model's folder holds beside its weights and config: tokenizer, processor, templates, licence, and
    the further modules of sentence-transformers.

    Files that are in the destination already stay as they are; a model card is left out, it speaks of the source.
    What cannot be copied, and links that lead out of the source, are warned about: the model is worth more.
    """
    folders = {"additional_chat_templates", "chat_templates", *_module_folders(source)}
    for path in sorted(source.iterdir()):
        weights = any(path.match(pattern) for pattern in WEIGHT_PATTERNS)
        skipped = path.name in ("README.md", "config.json") or path.name.startswith(".") or weights
        if not skipped and (path.name in folders or not path.is_dir()):
            _copy(path, destination / path.name, source)


def _copy(path: Path, target: Path, root: Path) -> None:
    """Copy a file or folder of a model; what cannot be is warned about."""
    if os.path.lexists(target):
        return
    try:
        if not is_inside(path, root):
            raise OSError(f"it is a link that leads out of {root}")
        if path.is_dir() and not path.is_symlink():
            target.mkdir()
            for child in sorted(path.iterdir()):
                _copy(child, target / child.name, root)
        elif path.is_file():
            shutil.copyfile(path, target)
        else:
            raise OSError("it is neither a file nor a folder")
    except OSError as problem:
        if target.is_file():
            target.unlink()  # the half of it
        logger.warning("%s was not copied (%s); copy it by hand where it is needed.", path, problem)


def _module_folders(folder: Path) -> set[str]:
    """The folders of a sentence-transformers model: pooling, dense layers and so on."""
    file = folder / "modules.json"
    try:
        modules = read_json(file, (list,)) if file.is_file() else []
    except (OSError, ValueError) as problem:
        logger.warning("%s cannot be read (%s), so the modules that it names are not copied.", file, problem)
        return set()
    paths = (module.get("path") for module in modules if isinstance(module, dict))
    return {Path(path).parts[0] for path in paths if isinstance(path, str) and path}
