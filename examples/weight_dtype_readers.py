"""Which models of the installed transformers cast an input to the dtype of a weight, and whether each place is found.

    python examples/weight_dtype_readers.py [--all]

A line such as `pixel_values.to(self.patch_embedding.weight.dtype)`, or `next(self.tower.parameters()).dtype`, would
make an int8 image of the input of a quantized model. mono_quant_hf reads the source of a model's classes to keep such
modules in float, and this script compares what it finds in every modeling file with a plain search for the text.
"""

from __future__ import annotations

import argparse
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers

from mono_quant_hf.integration.weight_readers import reads_in_source

# A module's own weight is its own affair; that of a module inside it is not.
SUBMODULE = r"\w+(?:\.\w+|\[[^\]]*\])+"
OF_A_SUBMODULE = re.compile(rf"{SUBMODULE}\.weight\.dtype|next\({SUBMODULE}\.parameters\(\)\)\.dtype")


@dataclass(frozen=True)
class Place:
    """A line that reads the dtype of a weight of a submodule, and whether `reads_in_source` names it."""

    file: str
    line: int
    text: str
    found: bool
    handles_int8: bool


def modeling_files() -> list[Path]:
    return sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))


def places_in(path: Path) -> Iterator[Place]:
    """The places in a file, by a search for the text in its code."""
    source = path.read_text(encoding="utf-8")
    if not OF_A_SUBMODULE.search(source):
        return
    reads = {
        read.line: read for reads in reads_in_source(source).values() for read in reads if read.reads_dtype
    }
    for number, line in _code_lines(source):
        if OF_A_SUBMODULE.search(line):
            read = reads.get(number)
            yield Place(
                path.name, number, line.strip(), read is not None, read is not None and read.handles_int8
            )


def _code_lines(source: str) -> Iterator[tuple[int, str]]:
    """The lines that hold code, without comments and strings."""
    lines: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
            lines.setdefault(token.start[0], []).append(token.string)
    for number, tokens in lines.items():
        yield number, re.sub(r" ?([.()\[\]]) ?", r"\1", " ".join(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="print every place, not only those not found")
    arguments = parser.parse_args()
    files = modeling_files()
    places = [place for path in files for place in places_in(path)]
    for place in places:
        if arguments.all or not place.found:
            print(f"{'found ' if place.found else 'MISSED'} {place.file}:{place.line}  {place.text}")
    readers = {place.file for place in places}
    print(
        f"transformers {transformers.__version__}: {len(readers)} of {len(files)} modeling files read the dtype of a "
        f"submodule's weight, in {len(places)} places; {sum(place.found for place in places)} are found, "
        f"{sum(place.handles_int8 for place in places)} of which take care of int8 themselves."
    )


if __name__ == "__main__":
    main()
