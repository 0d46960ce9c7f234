"""Sizes in bytes, as people write them."""

from __future__ import annotations

import argparse
import re

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size(value: str) -> int:
    """The bytes of a size with a unit, such as "150MB"; the `type` of an option.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(
            f"{value!r} is not a size with a unit; write it as 150MB, 1.5GB or 120MiB"
        )
    return round(float(match[1]) * _UNITS[match[2]])
