"""Numba's cache on disk, with checksums: Numba runs what it finds, cut short, damaged or outdated as it may be."""

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core import event

log = logging.getLogger("mono_quant_hf")


class Cache:
    """The cache of the functions that the source files of this folder have.

    `folder` is where it stands, None where no folder can be written. Numba notices a change of the file a function
    stands in, and of no other: the name of the list of checksums says which state of all the files it is of. What is
    not as `seal` left it is removed, so that Numba compiles it anew; `sha256sum --check` reads the list too.
    """

    def __init__(self) -> None:
        self.complete = True  # nothing had to be compiled so far
        self.folder: Path | None
        try:
            self._seal = _seal_of_sources()
            self.folder = Path(numba.njit(cache=True)(_anywhere).stats.cache_path)
            seal = self.folder / self._seal
            known = set(seal.read_bytes().splitlines(keepends=True)) if seal.exists() else set()
            for path, line in _lines(self.folder).items():
                if line not in known:
                    path.unlink(missing_ok=True)
        except (OSError, RuntimeError):  # the latter is Numba's, where it has no folder
            self.folder = None

    def compile(self, name: str, function: Any, signature: Any, **options: Any) -> Any:
        """`function`, called `name` to people, by `numba.njit` with this cache, or without it from the first file on
        that cannot be written.
        """
        with event.install_listener("numba:compile", _Announcement(name)):
            if self.folder is not None and self._seal == _seal_of_sources():  # no update of the package since
                try:
                    compiled = numba.njit(signature, cache=True, **options)(function)
                    self.complete = self.complete and bool(compiled.stats.cache_hits)
                    self.seal()
                    return compiled
                except (OSError, RuntimeError):
                    self.folder = None
            return numba.njit(signature, **options)(function)

    def seal(self) -> None:
        """Write down the checksums of the files, where any was compiled."""
        if self.folder is None or self.complete:
            return
        seal = self.folder / self._seal
        aside = seal.with_suffix(f".{os.getpid()}.tmp")
        try:
            for outdated in self.folder.glob("*.sha256"):
                if outdated != seal:
                    outdated.unlink(missing_ok=True)
            aside.write_bytes(b"".join(_lines(self.folder).values()))
            aside.replace(seal)
        except OSError:
            self.folder = None
            aside.unlink(missing_ok=True)


class _Announcement(event.Listener):
    """Says that a function is being compiled, once it is: one that is read from the cache is not."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def on_start(self, event: Any) -> None:
        if self._name is not None:
            log.warning("Compiling the CPU kernel %r for this processor: some 10 s, once ...", self._name)
            self._name = None

    def on_end(self, event: Any) -> None:
        pass


def _seal_of_sources() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16] + ".sha256"


def _lines(folder: Path) -> dict[Path, bytes]:
    lines = {}
    for path in sorted(folder.glob("*.nb[ci]")):
        with suppress(FileNotFoundError):  # another process took it for damaged meanwhile
            lines[path] = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n".encode()
    return lines


def _anywhere() -> None:
    """Numba finds the folder by a function, and gives the same one to all of a source folder."""
