"""`mono-quant-hf compile`: the CPU kernels before the first model, as in the image of a container."""

from __future__ import annotations

import argparse
import logging
import sys

from .errors import CommandError
from .output import add_json_argument, check_output_files, show

DESCRIPTION = """\
Compile the CPU kernels for this processor ahead of the first model, which waits for them else. They are kept in the
cache of Numba: beside the installed package, or in $NUMBA_CACHE_DIR.
The folder that is printed can be shipped, as in the image of a container. It is used where Python, Numba and the kind
of processor are the same, and the package lies under the same path; beside the package it may move with it. Elsewhere
the kernels are compiled again. Numba 0.68 knows the package by what is in its files; 0.62 also by their time, so that
there the package may not be installed anew.
"""
EPILOG = """\
examples:
  mono-quant-hf compile
  NUMBA_CACHE_DIR=/opt/kernels mono-quant-hf compile
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `compile` to the subcommands."""
    command = commands.add_parser(
        "compile", help="compile the CPU kernels ahead", description=DESCRIPTION, epilog=EPILOG
    )
    add_json_argument(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compile; the exit code is 0, or a CommandError says why not."""
    from mono_quant_hf.kernels import cpu

    check_output_files(arguments.json)
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    folder = cpu.compile_all()
    if folder is None:
        raise CommandError(
            f"Expected kernels that can be compiled and kept, got none: {cpu.why_missing() or 'no cache'}; "
            f"see the lines above."
        )
    show(arguments, f"The CPU kernels are in {folder}.", {"folder": str(folder)})
    return 0
