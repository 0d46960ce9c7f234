"""Numba's cache on disk, with checksums: Numba runs what it finds there, cut short or damaged as it may be."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba


class Cache:
    """The cache of the functions of one source file beside this one.

    `folder` is where it stands, None where no folder can be written. Files that are not as `seal` left them are
    removed, so that Numba compiles what they held; `sha256sum --check` reads the list too.
    """

    def __init__(self, source: str) -> None:
        self._name = Path(source).stem
        self.complete = True  # nothing had to be compiled so far
        self.folder: Path | None
        try:
            self.folder = Path(numba.njit(cache=True)(_anywhere).stats.cache_path)
            seal = self._seal_of(self.folder)
            known = set(seal.read_bytes().splitlines(keepends=True)) if seal.exists() else set()
            for path, line in self._lines(self.folder).items():
                if line not in known:
                    path.unlink(missing_ok=True)
        except (OSError, RuntimeError):  # the latter is Numba's, where it has no folder
            self.folder = None

    def compile(self, kind: Any, *args: Any, **options: Any) -> Any:
        """`numba.njit` or `numba.cfunc` with this cache; without it from the first file on that cannot be written."""

        def decorate(function: Any) -> Any:
            if self.folder is not None:
                try:
                    compiled = kind(*args, cache=True, **options)(function)
                    hits = compiled.stats.cache_hits if kind is numba.njit else compiled.cache_hits
                    self.complete = self.complete and bool(hits)
                    return compiled
                except (OSError, RuntimeError):
                    self.folder = None
            return kind(*args, **options)(function)

        return decorate

    def seal(self) -> None:
        """Once all is there: write down the checksums of the files, where any was compiled."""
        if self.folder is None or self.complete:
            return
        seal = self._seal_of(self.folder)
        aside = seal.with_suffix(f".{os.getpid()}.tmp")
        try:
            aside.write_bytes(b"".join(self._lines(self.folder).values()))
            aside.replace(seal)
        except OSError:
            self.folder = None
            aside.unlink(missing_ok=True)

    def _seal_of(self, folder: Path) -> Path:
        return folder / f"{self._name}.sha256"

    def _lines(self, folder: Path) -> dict[Path, bytes]:
        lines = {}
        for path in sorted(folder.glob(f"{self._name}.*.nb[ci]")):
            with suppress(FileNotFoundError):  # another process took it for damaged meanwhile
                lines[path] = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n".encode()
        return lines


def _anywhere() -> None:
    """Numba finds the folder by a function, and gives the same one to all of a source folder."""
