"""What of a stranger's names is printed and logged."""

import logging

import pytest

from mono_quant_hf.texts import one_line, printable, shown

NAMES = {
    "a.weight": "a.weight",
    "größe 日本": "größe 日本",
    "a\nb": r"a\nb",
    "\x1b[31m": r"\x1b[31m",
    "\x9b31m": r"\x9b31m",
    "\u202eabc": r"\u202eabc",
    "\u2066\u200b\ufeff": r"\u2066\u200b\ufeff",
    "\u2028\x85": r"\u2028\x85",
    "\udc80": r"\udc80",
    "\0\x7f\t": r"\x00\x7f\t",
}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_one_line(name):
    assert one_line(name) == NAMES[name] and one_line(name).isprintable()


def test_printable_keeps_lines():
    assert printable("a\n\tb\x1b[2J\r") == "a\n\tb\\x1b[2J\\r"


def test_shown_is_short():
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    assert len(shown("x" * 10**6)) < 210 and len(shown(nested)) < 100


def test_the_log_of_the_package_is_one_line_each(caplog):
    logging.getLogger("mono_quant_hf").warning("%s is left out", "a\n\x1b[31mb")
    assert caplog.records[-1].getMessage() == r"a\n\x1b[31mb is left out"
