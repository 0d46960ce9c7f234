"""What a real reader of Markdown makes of names that want to be more."""

import random

import pytest

from mono_quant_hf.hub.markdown import code_span, fenced, phrase, picture

PARTS = [
    "`",
    "``",
    "|",
    "\\",
    "<script>",
    "[a](http://b)",
    "![x](http://c)",
    "\n",
    " ",
    "_",
    "*",
    "&lt;",
    "#",
    ">",
    "a",
]


def test_names_stay_names():
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    rng = random.Random(0)
    for _ in range(500):
        name = "".join(rng.choices(PARTS, k=rng.randint(1, 8)))
        page = (
            f"| a | b |\n| --- | --- |\n| {code_span(name)} | {phrase(name)} |\n\n{picture(name, name)}\n\n"
            f"{fenced(name)}\n\n# {phrase(name)}\n"
        )
        seen = reader.render(page)
        assert "<script" not in seen and "<a " not in seen, page
        assert (seen.count("<img"), seen.count("<td>"), seen.count("<h1>")) == (1, 2, 1), page
