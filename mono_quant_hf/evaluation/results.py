"""What every result shares: a dictionary that JSON can hold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def jsonable(value: Any) -> Any:
    """`value` with numbers that JSON has no word for (nan, inf) as None, and containers converted in
    depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


class Result:
    """Base of the frozen result dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ready for `json.dumps`; nan and inf become None."""
        made: dict[str, Any] = jsonable(vars(self))
        return made


def safe_exp(value: float) -> float:
    """exp, infinite instead of an OverflowError."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def mean_and_standard_error(values: Any) -> tuple[float, float]:
    """Mean of a float64 tensor and s / sqrt(n), s with n - 1; the error is nan for a single value.

    The error takes the values as independent.  Tokens that follow each other are not quite, so it is a
    little too small for text.
    """
    count = values.numel()
    mean = float(values.mean())
    return mean, float(values.std(correction=1)) / math.sqrt(count) if count > 1 else math.nan


def aligned(titles: list[str], rows: list[list[str]], left: set[int]) -> str:
    """A table as text; the columns `left` are aligned on the left, others on the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n in left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [titles, *rows]
    )
