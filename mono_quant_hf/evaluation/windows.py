"""Which tokens are fed together and which of them are scored: plain integers, no tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens `[start, stop)` are fed; tokens `[first_target, stop]` are scored, each by the one before it."""

    start: int
    stop: int
    first_target: int

    @property
    def positions(self) -> range:
        """Places in the fed tokens whose output predicts a scored token."""
        return range(self.first_target - 1 - self.start, self.stop - self.start)

    @property
    def targets(self) -> range:
        """Places in the sequence of the scored tokens, one for each of `positions`."""
        return range(self.first_target, self.stop + 1)


def check_window(window: int, stride: int) -> None:
    """Raise ValueError unless `window >= 2` and `1 <= stride <= window`."""
    if window < 2:
        raise ValueError(
            f"window is {window}, but it must be at least 2 tokens: one to read, one to predict."
        )
    if stride < 1:
        raise ValueError(f"stride is {stride}, but it must be at least 1 token.")
    if stride > window:
        raise ValueError(
            f"stride ({stride}) is larger than window ({window}), which would leave tokens out: "
            f"give a stride of {window} or less."
        )


def sliding_windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over a sequence of `length` tokens that score every token but the first exactly once.

    The k-th window covers tokens `[k * stride, k * stride + window)`, the last one is cut at the end of the
    sequence, and in each only the tokens that no earlier window scored are scored: the overlap is context
    alone.  That is the strided sliding window of "Perplexity of fixed-length models" (transformers
    documentation), with two details made exact.  The last token of a window is predicted but never
    read, so it is not fed.  And where `stride == window` leaves no overlap, one token of the window before is
    fed in its place, so that the first token of each window is scored too (in the documentation's
    code it is lost).  Never more than `window` tokens are fed.

    Args:
        length: tokens in the sequence, at least 2.
        window: tokens a window covers, at least 2.
        stride: tokens from one window to the next, from 1 to `window`.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> for w in sliding_windows(length=7, window=4, stride=2):
        ...     print("feed", list(range(w.start, w.stop)), "score", list(w.targets))
        feed [0, 1, 2] score [1, 2, 3]
        feed [2, 3, 4] score [4, 5]
        feed [4, 5] score [6]
    """
    check_window(window, stride)
    if length < 2:
        raise ValueError(f"a sequence of {length} token(s) has nothing to score: it must have at least 2.")
    scored_to = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield Window(start=min(begin, scored_to - 1), stop=end - 1, first_target=scored_to)
        scored_to = end
        if end == length:
            return


def chunks(length: int, window: int) -> Iterator[range]:
    """`range(length)` cut into pieces of `window`; the last may be shorter."""
    for begin in range(0, length, window):
        yield range(begin, min(begin + window, length))
