"""JSON files of strangers: what is wrong with one is a sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .texts import one_line, shown

_NAMES: dict[type, str] = {dict: "object", list: "list"}
MOST_LEVELS = 100
"""Of objects and lists within each other. More is no model's file, and makes whatever walks through it run out of
stack."""


def read_json(file: str | Path, kinds: tuple[type, ...] = (dict,)) -> Any:
    """The object in a JSON file, or with other `kinds` also the list.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, is no UTF-8, names a key twice or is nested too deeply; the message names
            the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "config.json")
        ...     _ = file.write_text('{"a": 1, "a": 2}')
        ...     read_json(file)
        Traceback (most recent call last):
            ...
        ValueError: .../config.json is no valid JSON ('a' is in it twice); download or save it again.
    """
    try:
        content = json.loads(Path(file).read_bytes().decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise _damaged(file, "is nested too deeply") from None
    except ValueError as problem:
        raise _damaged(file, f"is no valid JSON ({problem})") from None
    if not isinstance(content, kinds):
        raise _damaged(file, f"holds no JSON {' or '.join(_NAMES[kind] for kind in kinds)}")
    level: list[Any] = [content]
    for _ in range(MOST_LEVELS):
        level = [child for item in level if isinstance(item, (dict, list)) for child in _children(item)]
        if not level:
            return content
    raise _damaged(file, "is nested too deeply")


def read_index(file: str | Path) -> dict[str, str]:
    """Which file each tensor is in, of the index of a checkpoint's shards: names of files beside the index.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no index, or names something else than a safetensors file beside it; the message names the
            file.
    """
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(file, "is no index of weights")
    for tensor, name in weight_map.items():
        if not tensor.isprintable():
            raise _damaged(file, f"names the tensor {shown(tensor)}, with characters that no name has,")
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or not name.endswith(".safetensors")
            or not {"/", "\\"}.isdisjoint(name)
        ):
            raise _damaged(
                file, f"says that {tensor[:200]} is in {shown(name)}, which is no safetensors file beside it"
            )
    return weight_map


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{shown(next(key for key in keys if keys.count(key) > 1))} is in it twice")
    return made


def _children(item: dict[str, Any] | list[Any]) -> Any:
    return item.values() if isinstance(item, dict) else item


def _damaged(file: str | Path, what: str) -> ValueError:
    return ValueError(one_line(f"{file} {what}; download or save it again."))
