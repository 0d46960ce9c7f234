"""The parser of every command: help at the terminal's width, and errors that show the usage of their own command."""

import argparse
import difflib
import textwrap
from typing import Any, NoReturn


class HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions at the terminal's width, but keeps their paragraphs and the items of their lists.

    A line indented by two spaces begins an item; one indented further goes on with it.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        items: list[str] = []
        for line in text.splitlines():
            depth = len(line) - len(line.lstrip())
            before = items[-1] if items else ""
            in_paragraph = depth == 0 and before[:1].strip() and not before.endswith(":")
            if line.strip() and before and (depth > 2 or in_paragraph):
                items[-1] += f" {line.strip()}"
            else:
                items.append(line.rstrip())
        return "\n".join(
            item  # a command stays in one line, to be copied
            if item.startswith("  mono-quant-hf ")
            else textwrap.fill(
                item,
                width,
                subsequent_indent="    " if item.startswith(" ") else "",
                break_on_hyphens=False,
                break_long_words=False,
            )
            for item in items
        )


class Parser(argparse.ArgumentParser):
    """Refuses an unknown option at once, with the usage of the subcommand it was given to and the nearest option."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **({"formatter_class": HelpFormatter} | kwargs))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all of `args`; what is left over is an error of this parser, not of the one above it."""
        found, extras = super().parse_known_args(args, namespace)
        if extras:
            self._refuse(next((extra for extra in extras if extra.startswith("-")), extras[0]))
        return found, extras

    def _refuse(self, extra: str) -> NoReturn:
        if not extra.startswith("-"):
            self.error(f"unexpected argument {extra!r}")
        options = [name for action in self._actions for name in action.option_strings]
        nearest = difflib.get_close_matches(extra.partition("=")[0], options, n=1)
        self.error(f"unknown option {extra}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
