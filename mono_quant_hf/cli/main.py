"""The command line: one parser, one subcommand per module beside this one."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mono_quant_hf import __version__
from mono_quant_hf.files import remove_leftovers

from . import chat, demo, estimate, evaluate, export, generate, inspect, push, quantize, search, verify
from . import compile as compile_command
from .errors import explained
from .output import escaped_logs, progress_on_terminals_only, say
from .parser import Parser

PROGRAM = "mono-quant-hf"
TRACEBACK = "MONO_QUANT_TRACEBACK"
"""An environment variable: with any value, errors of the user's are shown with their traceback too."""
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
EPILOG = f"""\
examples:
  {PROGRAM} demo
  {PROGRAM} quantize ./model ./model-int8
  {PROGRAM} COMMAND --help

exit codes: 0 done, 1 what was checked does not hold, 2 a mistake in the call or its files, 3 a bug,
130 interrupted (Ctrl-C), 143 terminated; {TRACEBACK}=1 shows the traceback of an error.
"""


def parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets `run`, which takes the parsed arguments and returns the exit code."""
    top = Parser(
        prog=PROGRAM,
        description="Per-channel INT8 and FP16 weights for Hugging Face transformers.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands: Any = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    chat.add_command(commands)
    compile_command.add_command(commands)
    demo.add_command(commands)
    estimate.add_command(commands)
    evaluate.add_command(commands)
    export.add_command(commands)
    generate.add_command(commands)
    inspect.add_command(commands)
    push.add_command(commands)
    quantize.add_command(commands)
    search.add_command(commands)
    verify.add_command(commands)
    return top


class Interruption(KeyboardInterrupt):
    """A signal that ends the command, once all that was begun has been cleared away."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Have signals that end a process raise an `Interruption`, so that temporary folders are removed.

    More of them while that is under way change nothing. One that the process was started to ignore (nohup) stays so.
    """

    def interrupt(number: int, _: Any) -> None:
        under_way = sys.exception()
        while under_way is not None:
            if isinstance(under_way, Interruption):
                return
            under_way = under_way.__context__
        raise Interruption(number)

    said = sys.unraisablehook

    def unraisable(lost: Any) -> None:
        """A signal that came in a finalizer or a callback, which Python lets no exception leave, comes again."""
        if isinstance(lost.exc_value, Interruption):
            threading.Timer(0.01, _thread.interrupt_main, [lost.exc_value.number]).start()
        else:
            said(lost)

    before = {}
    sys.unraisablehook = unraisable
    if threading.current_thread() is threading.main_thread():  # the only one that may
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = said
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        the exit code: 0; 1 where what was checked does not hold; 2 for a mistake of the user; 3 for a bug,
        with a traceback; 128 and the number of the signal that ended it, so 130 for Ctrl-C; 141 when what
        reads the output has gone.
    """
    try:
        arguments = parser().parse_args(argv)
        with signals_raise(), progress_on_terminals_only(), escaped_logs():
            with contextlib.suppress(OSError):  # there may be no such folder, nor need of one
                remove_leftovers(Path(tempfile.gettempdir()))
            code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # `mono-quant-hf ... | head`: Python would complain once more when it closes the stream.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interruption:
        ended_by = interruption.number if isinstance(interruption, Interruption) else signal.SIGINT
        print(f"{PROGRAM}: {'interrupted' if ended_by == signal.SIGINT else 'terminated'}", file=sys.stderr)
        return 128 + ended_by
    except Exception as problem:
        if (said := explained(problem)) is not None and not os.environ.get(TRACEBACK):
            say(f"{PROGRAM}: error: {said}", sys.stderr)
            return 2
        say(traceback.format_exc(), sys.stderr)
        print(f"{PROGRAM}: this is a bug; please report it.", file=sys.stderr)
        return 3
    return code
