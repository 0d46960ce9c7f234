"""What a command prints: text for people, JSON for programs, the same way in every command."""

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from transformers.utils import logging as transformers_logging

from mono_quant_hf.texts import printable

STDOUT = Path("-")
_STYLES = re.compile(r"\x1b\[[0-9;]*m")


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
    content = json.dumps(result, indent=2)
    say(text if prints_text(arguments) else content)
    if arguments.json and prints_text(arguments):
        arguments.json.write_text(content + "\n", encoding="utf-8")


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
