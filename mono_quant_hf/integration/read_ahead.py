"""The files of a checkpoint are fetched from the disk while what came before is quantized or compared.

Taken one after the other, as transformers takes the tensors of a model that is quantized on load, the disk waits for
the processor, and the processor for the disk.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

CHUNK = 1 << 20  # bytes; the kernel reads on from there by itself
LEAD = 512 << 20  # bytes read and not yet used: few enough not to drive out what is needed
PATIENCE = 10.0  # seconds without progress: the load has failed, or does not wait for the disk
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
LARGEST_HEADER = 100_000_000  # bytes; the format's own bound


class _Place(NamedTuple):
    """Where a tensor lies: a file, and the bytes from its start."""

    name: str
    file: str
    start: int
    end: int


class ReadAhead:
    """Reads the tensors of safetensors files into the page cache, in the background and by a bounded way ahead of use.

    It keeps nothing of what it reads, skips what is in the page cache, and does nothing where the system cannot tell
    whether it is (Linux can, for local file systems). A file that it cannot read ends it without a word: loading meets
    the same file and says what is wrong.

    Args:
        files: the safetensors files of the checkpoint.
        order: sort key, of a tensor's name, for the order of use; as they lie in the files if None.
    """

    def __init__(self, files: Sequence[str], order: Callable[[str], Any] | None = None):
        self._files = files
        self._order = order
        self._condition = threading.Condition()
        # Bytes up to the end of each tensor, in the order of use, and how many of them were used.
        self._ends: dict[str, int] = {}
        self._used = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="mono_quant read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        if hasattr(os, "RWF_NOWAIT"):
            self._thread.start()

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def reached(self, name: str) -> None:
        """Say that this tensor is used now; other names than those in the files say nothing."""
        with self._condition:
            self._used = max(self._used, self._ends.get(name, 0))
            self._condition.notify()

    def _run(self) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(*UNREADABLE):
            places = [place for file in self._files for place in _places(file)]
            if self._order is not None:
                order = self._order
                places.sort(key=lambda place: order(place.name))
            sizes = (place.end - place.start for place in places)
            ends = dict(zip((place.name for place in places), itertools.accumulate(sizes), strict=True))
            with self._condition:
                self._ends = ends
            opened = functools.cache(lambda file: stack.enter_context(open(file, "rb", buffering=0)))
            buffer = memoryview(bytearray(CHUNK))
            for place in places:
                for start in range(place.start, place.end, CHUNK):
                    if not self._wait_for(ends[place.name] - (place.end - start) - LEAD):
                        return
                    _fetch(opened(place.file).fileno(), start, buffer[: place.end - start])

    def _wait_for(self, used: int) -> bool:
        """Wait until so many bytes were used; False if there is nothing more to wait for."""
        with self._condition:
            reached = self._condition.wait_for(lambda: self._stopped or self._used >= used, PATIENCE)
            return reached and not self._stopped


def _fetch(file: int, start: int, buffer: memoryview) -> None:
    """Read what belongs into the buffer, unless the last byte of it can be had without waiting."""
    try:
        os.preadv(file, [buffer[-1:]], start + len(buffer) - 1, os.RWF_NOWAIT)
    except BlockingIOError:
        os.preadv(file, [buffer], start)


def _places(file: str) -> list[_Place]:
    """Those of the tensors of a safetensors file, as they follow each other.

    Raises:
        One of `UNREADABLE`: it is none.
    """
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(size, LARGEST_HEADER):
            raise ValueError(f"{file} has no header.")
        header = json.loads(opened.read(length))
    places = []
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if not 0 <= start <= end <= size:
                raise ValueError(f"{name} goes past the end of {file}.")
            places.append(_Place(name, file, start, end))
    return sorted(places, key=lambda place: place.start)
