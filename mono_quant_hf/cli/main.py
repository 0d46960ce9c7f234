"""The command line: one parser, one subcommand per module beside this one."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

from mono_quant_hf import __version__

from . import demo, evaluate, export, inspect, push, quantize, search, verify
from .errors import explained
from .output import escaped_logs, progress_on_terminals_only, say

PROGRAM = "mono-quant-hf"
TRACEBACK = "MONO_QUANT_HF_TRACEBACK"
"""An environment variable: with any value, errors of the user's are shown with their traceback too."""
EPILOG = f"""\
examples:
  {PROGRAM} demo
  {PROGRAM} quantize ./model ./model-int8
  {PROGRAM} COMMAND --help

exit codes: 0 done, 1 what was checked does not hold, 2 a mistake in the call or its files, 3 a mistake of the
program's, 130 interrupted; {TRACEBACK}=1 shows the traceback of an error.
"""


def parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets `run`, which takes the parsed arguments and returns the exit code."""
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Per-channel INT8 and FP16 weights for Hugging Face transformers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
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
    verify.add_command(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        the exit code: 0; 1 where what was checked does not hold; 2 for a mistake of the user's; 3 for one of the
        program's, with a traceback; 130 when interrupted; 141 when what reads the output has gone.
    """
    try:
        arguments = parser().parse_args(argv)
        with progress_on_terminals_only(), escaped_logs():
            code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # `mono-quant-hf ... | head`: Python would complain once more when it closes the stream.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except Exception as problem:
        if (said := explained(problem)) is not None and not os.environ.get(TRACEBACK):
            say(f"{PROGRAM}: error: {said}", sys.stderr)
            return 2
        say(traceback.format_exc(), sys.stderr)
        print(f"{PROGRAM}: this is a mistake of the program's; please report it.", file=sys.stderr)
        return 3
    return code
