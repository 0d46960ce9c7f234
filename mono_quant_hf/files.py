"""Files and folders that are there whole or not at all: written aside, then put in place in one step."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":  # where what a killed process left stays
    import fcntl

logger = logging.getLogger("mono_quant_hf")

SCRATCH = ".mono-quant-hf-"
"""How the names of scratch folders begin."""

_NAME = re.compile(re.escape(SCRATCH) + "[0-9a-f]{32}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def scratch_folder(parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """An empty folder in `parent` (that of temporary files by default), removed when the block ends.

    What processes that were killed left there is removed first. A folder is held by a lock on it, which ends with its
    process however that ends; where a file system has no such locks, what was left stays. `parent` is made if it is
    missing, and removed again if it is empty in the end.
    """
    parent = Path(tempfile.gettempdir() if parent is None else parent)
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    try:
        with _held(parent) as folder:
            yield folder
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def folder_written_aside(
    destination: str | os.PathLike[str], may_replace: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """An empty folder to write into, which becomes `destination` when the block ends without an error.

    What is at `destination` stays until then. An interruption leaves the old or the new one, also one by SIGKILL where
    the file system can exchange two names at once (most of Linux), else after the next run in the same folder.

    Args:
        destination: the folder to make; an empty one may be there.
        may_replace: whether what is at `destination` may be replaced, asked at the end.

    Raises:
        OSError: it cannot be put there, or others came first; the message says where the new folder is instead.
    """
    target = Path(destination)
    with scratch_folder(target.parent) as scratch:
        # A folder of its own inside: the scratch folder is readable by its owner only, what is kept shall not be.
        new = scratch / "new" / target.name
        new.mkdir(parents=True)
        yield new
        replaces = os.path.lexists(target) and not _is_empty(target)
        for path in (*new.rglob("*"), new) if replaces else ():
            _sync(path)  # what it replaces is removed, so it has to be on the disk before
        try:
            if replaces and not may_replace(target):
                raise FileExistsError("others wrote there meanwhile")
            _put_in_place(new, target)
        except OSError as problem:
            names = (target.with_name(f"{target.name}-{n}") for n in itertools.count(1))
            kept = next(path for path in names if not os.path.lexists(path))
            new.rename(kept)
            raise OSError(
                f"{target} could not be put in place ({problem}); what was to be there is in {kept}."
            ) from problem


@contextmanager
def file_written_aside(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file to, which becomes `destination` when the block ends without an error.

    What is no plain file (a pipe, a device) is written to as it is.
    """
    if os.path.exists(destination) and not os.path.isfile(destination):
        yield Path(destination)
        return
    target = Path(os.path.realpath(destination))  # a link stays one
    with scratch_folder(target.parent) as scratch:
        yield (new := scratch / target.name)
        _sync(new)
        os.replace(new, target)
        _sync(target.parent)


def check_room(
    folder: str | os.PathLike[str],
    needed: int,
    what: str,
    remedy: str = "make room, or name a folder on another disk",
) -> None:
    """Refuse what does not fit on the disk, before the work and not after it.

    Args:
        folder: to be written to; need not be there yet.
        needed: bytes.
        what: is written, for the message.
        remedy: for the message.

    Raises:
        OSError: fewer bytes are free.
    """
    path = Path(folder).absolute()
    free = shutil.disk_usage(next(there for there in (path, *path.parents) if there.exists())).free
    if needed > free:
        raise OSError(
            f"{what} needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: {remedy}."
        )


def remove_leftovers(parent: Path) -> None:
    """Remove the scratch folders of processes that were killed, and put back what one had moved out of the way."""
    if sys.platform == "win32":
        return
    try:
        names = [name for name in os.listdir(parent) if _NAME.fullmatch(name)]
    except PermissionError:
        return
    for folder in (parent / name for name in names):
        with suppress(OSError):  # gone meanwhile, or held by its process
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                continue
            if (lock := _lock(folder)) is not None:
                try:
                    _remove(folder)
                finally:
                    os.close(lock)


@contextmanager
def _held(parent: Path) -> Iterator[Path]:
    """A new scratch folder that is held by this process, and removed when the block ends."""
    while True:
        folder, lock = parent / f"{SCRATCH}{uuid.uuid4().hex}", None
        try:
            try:
                folder.mkdir(mode=0o700)
            except OSError as problem:  # the user knows the parent alone
                raise OSError(problem.errno, problem.strerror, str(parent)) from problem
            try:
                lock = _lock(folder)
            except (BlockingIOError, FileNotFoundError):
                continue
            if folder.exists():  # else another process took it for a leftover just now, as above
                yield folder
                return
        finally:
            try:
                _remove(folder)
            except KeyboardInterrupt:
                _remove(folder)
                raise
            finally:
                if lock is not None:
                    os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds a folder until it is closed, None where the file system has no such locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)  # which programs that are started do not inherit
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        os.close(descriptor)
        if isinstance(problem, BlockingIOError):
            raise
        return None
    return descriptor


def _remove(folder: Path) -> None:
    """Remove a scratch folder; what `_put_in_place` moved out of the way goes back where nothing took its place."""
    try:
        if (folder / "old").is_dir():
            for old in (folder / "old").iterdir():
                if not os.path.lexists(folder.parent / old.name):
                    old.rename(folder.parent / old.name)
            (folder / "old").rename(folder / "replaced")  # half removed, it shall never be put back
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as problem:
        logger.warning("%s cannot be removed (%s); remove it by hand.", folder, problem)


def _put_in_place(new: Path, target: Path) -> None:
    if not os.path.lexists(target) or _is_empty(target):
        new.rename(target)
        return
    if not _exchanged(new, target):
        old = new.parent.parent / "old"
        old.mkdir()
        target.rename(old / target.name)
        new.rename(target)
    _sync(target.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two paths could be exchanged in one step, which most file systems of Linux can."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if exchange is None:
        return False
    exchange.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    paths = os.fsencode(one), os.fsencode(other)
    return bool(exchange(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder where its file system can, on the disk."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    elif path.is_dir():
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
