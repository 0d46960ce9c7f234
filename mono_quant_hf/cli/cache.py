"""Folders that are made once and kept outside the repository."""

import os
from collections.abc import Callable
from pathlib import Path

from mono_quant_hf.files import scratch_folder

VARIABLE = "MONO_QUANT_CACHE"


def cache_folder() -> Path:
    """`$MONO_QUANT_CACHE`, else `mono_quant_hf` in `$XDG_CACHE_HOME` or `~/.cache`; may not exist yet."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mono_quant_hf"


def prepared(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `build` unless it is there already.

    It is built aside and then renamed, so that it is there whole or not at all, whatever fails and however
    many processes prepare it at once.

    Args:
        name: of the folder; it should change when what `build` writes changes.
        build: writes the files into the empty folder that it is given.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent) as aside:
        built = aside / name
        built.mkdir()
        build(built)
        try:
            built.replace(folder)
        except OSError:  # another process was first; a folder that holds files is never replaced
            if not folder.is_dir():
                raise
    return folder
