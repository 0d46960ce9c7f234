"""Texts: from whatever holds them to sequences of token ids, and what of them is safe to print."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor


# Characters read per token wanted before the first try at tokenizing, and tokens wanted beyond the limit,
# so that the last row read cannot change how the tokens before the limit come out.
_CHARACTERS_PER_TOKEN = 8
_MARGIN = 32


def texts(source: Any, column: str = "text") -> Iterator[str]:
    """The texts in `source`, one at a time.

    Args:
        source: a str (the text itself), a `pathlib.Path` (a UTF-8 text file), an iterable of str, or a
            `datasets.Dataset` or `IterableDataset` (or any iterable of mappings), of which `column` is read.
            Rows that hold None are left out.
        column: the name of the column that holds the text.

    Raises:
        ValueError: the column is missing, or the dataset still has several splits.
        TypeError: something in it is no text.
    """
    if isinstance(source, str):
        yield source
        return
    if isinstance(source, Path):
        yield source.read_text(encoding="utf-8")
        return
    if isinstance(source, Mapping) and all(hasattr(split, "column_names") for split in source.values()):
        names = ", ".join(repr(name) for name in source)
        first = next(iter(source), "test")
        raise ValueError(f"the dataset has the splits {names}: pass one of them, such as dataset[{first!r}].")
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        raise TypeError(
            f"text_or_dataset is a {type(source).__name__}: pass a str, a list of str, a datasets.Dataset or "
            "a datasets.IterableDataset."
        )
    columns = getattr(source, "column_names", None)
    rows: Iterable[Any] = source
    if isinstance(columns, list):
        _check_column(column, columns)
        rows = cast(Any, source).select_columns([column])  # so that no image beside it is decoded
    for number, row in enumerate(rows):
        value = row
        if isinstance(row, Mapping):
            _check_column(column, row)
            value = row[column]
        if isinstance(value, str):
            yield value
        elif value is not None:
            where = f"row {number}" + (f" of column {column!r}" if isinstance(row, Mapping) else "")
            raise TypeError(f"{where} holds a {type(value).__name__}, not text (str).")


def _check_column(column: str, names: Iterable[Any]) -> None:
    if column not in names:
        listed = ", ".join(repr(name) for name in names)
        raise ValueError(f"the dataset has no column {column!r}: pass column= one of {listed}.")


def token_sequences(
    tokenizer: Any,
    source: Any,
    *,
    column: str = "text",
    separator: str | None = "\n\n",
    max_tokens: int | None = None,
    add_special_tokens: bool = True,
) -> list[Tensor]:
    """Tokenize `source` into one sequence, or into one for each text where `separator` is None.

    Args:
        tokenizer: a transformers tokenizer, or any callable of a str that returns `{"input_ids": [...]}`.
        source: see `texts`.
        column: see `texts`.
        separator: what joins the texts before they are tokenized.
        max_tokens: keep this many tokens, counted from the start; of a dataset no more rows are read than
            needed.
        add_special_tokens: let the tokenizer add its own (such as a first token, `<s>`).

    Returns:
        int64 tensors of shape [tokens].

    Raises:
        ValueError: there is no text, or `max_tokens` is below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, but it must be at least 1, or None for all.")
    rows = texts(source, column)
    if separator is None:
        sequences, left = [], max_tokens
        for text in rows:
            ids = _encode(tokenizer, text, add_special_tokens)[:left] if text else _ids([])
            sequences += [ids] if len(ids) else []
            left = None if left is None else left - len(ids)
            if left == 0:
                break
        if not sequences:
            raise ValueError("there is no text to evaluate: what was given is empty.")
        return sequences

    read: list[str] = []
    characters, wanted = 0, None if max_tokens is None else (max_tokens + _MARGIN) * _CHARACTERS_PER_TOKEN
    for text in rows:
        read.append(text)
        characters += len(text) + len(separator)
        if wanted is not None and max_tokens is not None and characters >= wanted:
            ids = _encode(tokenizer, separator.join(read), add_special_tokens)
            if len(ids) >= max_tokens + _MARGIN:
                return [ids[:max_tokens]]
            wanted *= 2
    if not any(read):
        raise ValueError("there is no text to evaluate: what was given is empty.")
    return [_encode(tokenizer, separator.join(read), add_special_tokens)[:max_tokens]]


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> Tensor:
    # verbose=False: a text longer than the model is the very point here, so no warning about it
    return _ids(
        tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)["input_ids"]
    )


def _ids(ids: Any) -> Tensor:
    import torch

    return torch.as_tensor(ids, dtype=torch.long).reshape(-1)


def special_frame(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The special tokens that the tokenizer puts before and after a text, such as [CLS] and [SEP]."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = _ids(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    before = special.index(0) if 0 in special else len(special)
    after = list(reversed(special)).index(0) if 0 in special else 0
    return ids[:before], ids[len(ids) - after :]


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200


def shown(value: Any) -> str:
    """A value that may be a stranger's as Python writes it, as far as it fits a line."""
    return _repr.repr(value)


def one_line(text: str) -> str:
    """The text with an escape for every character that cannot be seen: ends of lines, controls, directions of writing.

    Names of tensors, files and modules are a stranger's, and a terminal or a log does what such characters say.

    Example:
        >>> one_line("weight\\n\\x1b[31m"), one_line("größe\\u202e")
        ('weight\\\\n\\\\x1b[31m', 'größe\\\\u202e')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable(text: str) -> str:
    """The text with an escape for every character that cannot be seen, but with its lines and tabs."""
    return "".join(part if part in "\n\t" else one_line(part) for part in re.split(r"([\n\t])", text))


def log_in_one_line(record: logging.LogRecord) -> bool:
    """A filter of a logger: what it says is `one_line`."""
    record.msg, record.args = one_line(record.getMessage()), ()
    return True
