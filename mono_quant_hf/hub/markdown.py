"""A stranger's names in a page of Markdown: seen, and never read as Markdown, HTML or a link."""

from __future__ import annotations

import re
from urllib.parse import quote

from mono_quant_hf.texts import one_line

_PLAIN = re.compile(r"\w(?:[\w ,;'()-]|(?<=\d)\.(?=\d))*(?<!_)")


def code_span(text: str) -> str:
    """The text as code, in a table or outside of one.

    Example:
        >>> code_span("model.layers.0"), code_span("<img src=x>|`a`")
        ('`model.layers.0`', '`` <img src=x>\\\\|`a` ``')
    """
    # A table ends a cell at a pipe in code too, unless a backslash is before it that no other backslash escapes.
    text = one_line(text).replace("\\|", "\\x7c").replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def phrase(text: str) -> str:
    """The text as it is where it is only words, else as code.

    Example:
        >>> phrase("the help topics of Python 3.11"), phrase("www.example.org")
        ('the help topics of Python 3.11', '`www.example.org`')
    """
    return text if _PLAIN.fullmatch(text) and "__" not in text and " _" not in text else code_span(text)


def fenced(text: str, language: str = "") -> str:
    """A block of code."""
    lines = "\n".join(map(one_line, text.splitlines()))
    fence = "`" * max(3, max(map(len, re.findall("`+", lines)), default=0) + 1)
    return f"{fence}{language}\n{lines}\n{fence}"


def picture(words: str, path: str) -> str:
    """A picture of the same folder."""
    words = re.sub(r"([!-,./:-@\[-`{-~])", r"\\\1", one_line(words))
    return f"![{words}]({quote(path)})"
