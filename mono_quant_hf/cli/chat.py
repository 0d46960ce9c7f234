"""`mono-quant-hf chat`: a conversation with a model on the terminal, or with lines that are piped in."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .errors import CommandError
from .generate import add_model_arguments, answer_to, open_model
from .models import chat_inputs
from .output import say, show

DESCRIPTION = """\
Talk to a language model: a line is what you say, the answer is written as it comes, with how many tokens a second that
was. Ctrl-D ends the conversation, as does the end of what is piped in. A float model is quantized as it loads. What no
longer fits into the model's context is forgotten, the oldest first.
"""
EPILOG = """\
examples:
  mono-quant-hf chat ./model-int8
  mono-quant-hf chat org/model --system "Answer in one sentence." --max-new-tokens 100
  mono-quant-hf chat ./model-int8 --json < questions.txt
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `chat` to the subcommands."""
    command = commands.add_parser(
        "chat", help="talk to a model on the terminal", description=DESCRIPTION, epilog=EPILOG
    )
    command.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_model_arguments(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Answer line by line."""
    from mono_quant_hf.calibration.samples import max_positions

    model, tokenizer = open_model(arguments)
    if not getattr(tokenizer, "chat_template", None):
        raise CommandError(
            f"{arguments.model} has no chat template; use mono-quant-hf generate --raw, which goes on with a text."
        )
    told = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages: list[dict[str, str]] = []
    remembered = 0  # from which message on
    tokens, seconds = 0, 0.0
    while (line := _next_line()) is not None:
        messages.append({"role": "user", "content": line})
        inputs = chat_inputs(tokenizer, told + messages[remembered:])
        while remembered + 2 < len(messages) and inputs["input_ids"].shape[1] + arguments.max_new_tokens > (
            max_positions(model) or sys.maxsize
        ):
            remembered += 2
            inputs = chat_inputs(tokenizer, told + messages[remembered:])
        answer = answer_to(inputs, model, tokenizer, arguments)
        messages.append({"role": "assistant", "content": answer.answer})
        tokens, seconds = tokens + answer.tokens, seconds + answer.seconds
        say(f"[{answer.speed()}]", sys.stderr)
    result: dict[str, Any] = {"messages": told + messages, "tokens": tokens, "seconds": seconds}
    show(arguments, f"{len(messages) // 2} answers.", result)
    return 0


def _next_line() -> str | None:
    """The next line that is not empty; None where there are no more."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line:
            return line
