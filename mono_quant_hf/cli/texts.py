"""The text that a command reads: a file, a dataset, or what ships with Python."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .errors import CommandError


def add_text_arguments(command: argparse.ArgumentParser, purpose: str, tokens: int | None) -> None:
    """Add `--text-file`, `--dataset` and so on, and `--max-tokens` with its default."""
    text = command.add_argument_group(f"{purpose} (default: the help topics that ship with Python)")
    text.add_argument("--text-file", type=Path, metavar="FILE", help="a UTF-8 text file")
    text.add_argument(
        "--dataset", metavar="NAME", help="a dataset: Hub name, local folder, or json, parquet, csv, text"
    )
    text.add_argument(
        "--data-files", nargs="+", metavar="FILE", help="the files of --dataset json, text, ..."
    )
    text.add_argument("--dataset-config", metavar="NAME", help="configuration of the dataset")
    text.add_argument("--split", default="test", help="split of the dataset (test)")
    text.add_argument("--column", default="text", help="its column of text (text)")
    text.add_argument("--streaming", action="store_true", help="stream the dataset instead of downloading it")
    text.add_argument(
        "--max-tokens",
        type=_count_or_all,
        default=tokens,
        metavar="N",
        help=f"tokens to use from the start of the text, or 'all' ({tokens or 'all'})",
    )


def load_text(arguments: argparse.Namespace) -> tuple[str, Any]:
    """A name for the text, and the text or dataset.

    Raises:
        CommandError: arguments that contradict each other, or a text that cannot be read.
    """
    if arguments.text_file and arguments.dataset:
        raise CommandError("give either --text-file or --dataset, not both.")
    if arguments.data_files and not arguments.dataset:
        raise CommandError(
            "--data-files needs --dataset, which says what they are (json, parquet, text, ...)."
        )
    if arguments.text_file:
        try:
            return arguments.text_file.name, arguments.text_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise CommandError(f"--text-file {arguments.text_file} cannot be read: {problem}") from problem
    if arguments.dataset:
        return _load_dataset(arguments)
    from pydoc_data.topics import topics

    version = ".".join(str(part) for part in sys.version_info[:2])
    return f"the help topics of Python {version}", "\n\n".join(topics.values())


def _load_dataset(arguments: argparse.Namespace) -> tuple[str, Any]:
    from datasets import load_dataset

    # files given by hand are one split, which datasets calls "train"
    split = "train" if arguments.data_files and arguments.split == "test" else arguments.split
    try:
        dataset = load_dataset(
            arguments.dataset,
            arguments.dataset_config,
            split=split,
            data_files=arguments.data_files,
            streaming=arguments.streaming,
        )
    except (OSError, ValueError) as problem:
        raise CommandError(f"--dataset {arguments.dataset} cannot be loaded: {problem}") from problem
    return " ".join(filter(None, [arguments.dataset, arguments.dataset_config, split])), dataset


def _count_or_all(value: str) -> int | None:
    if value == "all":
        return None
    if not value.isdecimal() or int(value) < 2:
        raise argparse.ArgumentTypeError(f"{value!r} is neither a number of at least 2 nor 'all'")
    return int(value)
