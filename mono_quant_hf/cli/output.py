"""What a command prints: text for people, JSON for programs, the same way in every command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mono_quant_hf import __version__
from mono_quant_hf.files import file_written_aside
from mono_quant_hf.texts import printable
from mono_quant_hf.versions import require

from .errors import CommandError

STDOUT = Path("-")
_STYLES = re.compile(r"\x1b\[[0-9;]*m")


PACKAGE = "mono_quant_hf"
"""Named at the beginning of each file that a command writes: what does not is of others, and never overwritten."""

_BEGINNINGS = (f'{{\n  "{PACKAGE}": '.encode(), b"\x89PNG", b"<!doctype html>")


def add_json_argument(command: argparse.ArgumentParser) -> None:
    """Add `--json [FILE]`."""
    command.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="print the result as JSON in place of text; with FILE, print text and write the JSON to FILE",
    )


def prints_text(arguments: argparse.Namespace) -> bool:
    """Whether standard output is for text, and not for JSON alone."""
    return bool(arguments.json != STDOUT)


def show(arguments: argparse.Namespace, text: str, result: dict[str, Any]) -> None:
    """Print a result as text or as JSON, or both, as `--json` says."""
    content = json.dumps({PACKAGE: __version__} | result, indent=2)
    say(text if prints_text(arguments) else content)
    if arguments.json and prints_text(arguments):
        with file_written_aside(arguments.json) as new:
            new.write_text(content + "\n", encoding="utf-8")


def check_output_files(*files: Path | None, destination: Path | None = None) -> None:
    """Refuse, before the work and not after it, a file that cannot be written, or that would destroy another.

    Args:
        files: to be written; None and `-` are fine. One that is there must be of a command of this package.
        destination: of the model that the same command writes; no result may be in it.

    Raises:
        CommandError: says what is wrong with which.
    """
    taken = {} if destination is None else {Path(os.path.realpath(destination)): destination}
    for file in files:
        if file is None or file == STDOUT:
            continue
        place = Path(os.path.realpath(file))
        if other := next((taken[path] for path in (place, *place.parents) if path in taken), None):
            raise CommandError(f"{file} is, or is in, {other}, which is written too; name another file.")
        taken[place] = file
        if file.is_dir():
            holds = "a folder with files in it" if any(file.iterdir()) else "a folder"
            raise CommandError(f"{file} is {holds}; name a file after the option.")
        plain = file.is_file() or not file.exists()  # no device or pipe
        if plain and not place.parent.is_dir():
            raise CommandError(f"the folder of {file} does not exist; make it first, or name another file.")
        if not os.access(place.parent if plain else file, os.W_OK):
            raise CommandError(f"{file} may not be written by this user; name another file.")
        if file.is_file() and not _is_own(file):
            raise CommandError(f"{file} is there already, and no result of this program; name another file.")


def _is_own(file: Path) -> bool:
    """Whether a file is empty, or begins as a result of a command does."""
    with file.open("rb") as opened:
        head = opened.read(4096)
    return not head or any(head.startswith(begin) and PACKAGE.encode() in head for begin in _BEGINNINGS)


def check_png(file: Path | None) -> None:
    """Refuse, before the work and not after it, a picture where nothing can draw it."""
    if file is not None:
        require("matplotlib", "--png")


def say(text: str, file: TextIO | None = None) -> None:
    """Print to standard output, or to `file`, what may hold a stranger's names."""
    print(printable(text), file=file, flush=True)


@contextmanager
def escaped_logs() -> Iterator[None]:
    """What transformers logs of a stranger's files is printable too, without its bold letters."""

    def escape(record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(_STYLES.sub("", record.getMessage())), ()
        return True

    handlers = list(logging.getLogger("transformers").handlers)
    for handler in handlers:
        handler.addFilter(escape)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(escape)


@contextmanager
def progress_on_terminals_only() -> Iterator[None]:
    """Without the progress bars of the libraries where standard error is no terminal: a log is no place for them."""
    import datasets
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging as transformers_logging

    if sys.stderr.isatty():
        yield
        return
    before = (
        transformers_logging.is_progress_bar_enabled(),
        not datasets.are_progress_bars_disabled(),
        not are_progress_bars_disabled(),
    )
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        for was_on, enable in zip(
            before,
            (transformers_logging.enable_progress_bar, datasets.enable_progress_bars, enable_progress_bars),
            strict=True,
        ):
            if was_on:
                enable()
