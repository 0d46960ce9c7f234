"""The command line: one parser, one subcommand per module beside this one."""

import argparse
import sys
from collections.abc import Sequence

from mono_quant_hf import __version__

from . import demo, evaluate, export, inspect, push, quantize, search
from .errors import CommandError

PROGRAM = "mono-quant-hf"


def parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets `run`, which takes the parsed arguments and returns the exit code."""
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Per-channel INT8 and FP16 weights for Hugging Face transformers.",
        epilog=f"example: {PROGRAM} demo",
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_command(commands)
    evaluate.add_command(commands)
    export.add_command(commands)
    inspect.add_command(commands)
    push.add_command(commands)
    quantize.add_command(commands)
    search.add_command(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        the exit code: 0, 1 where what was checked does not hold, 2 for a mistake of the user's.
    """
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except CommandError as problem:
        print(f"{PROGRAM}: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return code
