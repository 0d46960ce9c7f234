"""Matching module names against the patterns of a config, which may come from a stranger's config.json."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import logging
from collections.abc import Callable, Sequence
from time import thread_time

# The standard library's re has no bound on time, and `(.*.*)*x` takes longer than the universe has.
import regex

from mono_quant_hf.config import LITERAL
from mono_quant_hf.texts import shown

logger = logging.getLogger("mono_quant_hf")

SECONDS = 5.0
"""Of processor time, for all patterns of a config with all modules of a model; usual ones take milliseconds."""
MOST_HINTS = 5
"""Patterns without a match that are warned of one by one."""
LONGEST_HINT = 200
"""Characters of a pattern that is compared with all names to find those that are near."""

Matcher = Callable[[str], bool]


class TooSlow(Exception):
    """The processor time for matching is used up."""


class Stopwatch:
    """Processor time that matching takes, of this thread alone: a busy machine makes no pattern slow."""

    def __init__(self) -> None:
        self.left = SECONDS
        self._end = 0.0

    def matches(self, matcher: Matcher, names: Sequence[str]) -> bool:
        """Whether any of the names matches.

        Raises:
            TooSlow: all the time is used up.
        """
        if self.left <= 0:
            raise TooSlow
        self._end = thread_time() + self.left
        try:
            return any(map(matcher, names))
        finally:
            self.left = self._end - thread_time()

    def expression(self, pattern: str) -> Matcher:
        """A regular expression that is matched from the start of a name, until the time is used up."""
        compiled = regex.compile(pattern)

        def matcher(name: str) -> bool:
            while (left := self._end - thread_time()) > 0:
                # regex counts what other threads of the process take too, so one that timed out may have time left.
                with contextlib.suppress(TimeoutError):
                    return compiled.match(name, timeout=left) is not None
            raise TooSlow

        return matcher


class Aliases:
    """The names a module goes by: its own, and that with the base model's prefix added or taken away.

    A checkpoint of `LlamaForCausalLM` speaks of `model.layers.0`, of `LlamaModel` the same module is `layers.0`.
    """

    def __init__(self, base_model_prefix: str):
        self.prefix = f"{base_model_prefix}." if base_model_prefix else ""

    def __call__(self, name: str) -> list[str]:
        if not self.prefix:
            return [name]
        other = name.removeprefix(self.prefix) if name.startswith(self.prefix) else self.prefix + name
        return [name, other]


class PatternTracker:
    """Matches patterns against module names and remembers which patterns never matched."""

    def __init__(
        self,
        field: str,
        patterns: list[str],
        matcher_of: Callable[[str, Stopwatch], Matcher],
        aliases: Callable[[str], list[str]],
        stopwatch: Stopwatch,
    ):
        self.field, self.aliases, self.stopwatch = field, aliases, stopwatch
        self.matchers = {pattern: matcher_of(pattern, stopwatch) for pattern in patterns}
        self.matched: set[str] = set()

    def first_match(self, name: str) -> str | None:
        """The first pattern that matches a name; None if there is none.

        Raises:
            ValueError: the patterns take too long.
        """
        aliases = self.aliases(name)
        hits = [pattern for pattern in self.matchers if self._hits(pattern, aliases)]
        self.matched.update(hits)
        return hits[0] if hits else None

    def warn_of_unmatched(self, names: list[str]) -> None:
        """Warn of each pattern that has matched nothing, nor matches any of `names`, and name the nearest of them."""
        aliases = [alias for name in names for alias in self.aliases(name)]
        # A pattern may well name a module that holds no weight to quantize, such as a norm.
        unmatched = [p for p in self.matchers if p not in self.matched and not self._hits(p, aliases)]
        for pattern in unmatched[:MOST_HINTS]:
            near = _nearest(pattern, names)
            hint = f" Nearest names: {', '.join(near)}." if near else ""
            logger.warning("%s: %s matches no module.%s", self.field, shown(pattern), hint)
        if len(unmatched) > MOST_HINTS:
            logger.warning(
                "%s: %s more patterns match no module.", self.field, f"{len(unmatched) - MOST_HINTS:,}"
            )

    def _hits(self, pattern: str, aliases: Sequence[str]) -> bool:
        try:
            return self.stopwatch.matches(self.matchers[pattern], aliases)
        except (TooSlow, MemoryError):  # a recursive pattern has no end in memory, or none in time
            raise ValueError(
                f"{self.field}: {shown(pattern)} takes too long to match, alone or with the other patterns; simplify "
                "it, or use fewer."
            ) from None


def as_in_transformers(pattern: str, stopwatch: Stopwatch) -> Matcher:
    """A name from the start, a regular expression from the start (both up to a dot or the end), or a suffix."""
    if LITERAL.fullmatch(pattern):
        return lambda name: name.endswith(pattern) or _begins(name, pattern)
    expression = stopwatch.expression(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
    return lambda name: name.endswith(pattern) or expression(name)


def glob_or_expression(pattern: str, stopwatch: Stopwatch) -> Matcher:
    """A glob on the whole name, or after `re:` a regular expression from its start."""
    if pattern.startswith("re:"):
        return stopwatch.expression(pattern.removeprefix("re:"))
    if LITERAL.fullmatch(pattern):
        return pattern.__eq__
    return stopwatch.expression(fnmatch.translate(pattern))


def _begins(name: str, pattern: str) -> bool:
    """What the expression of a literal pattern does, without one: a dot is any character, as it is there."""
    end = len(pattern)
    return (
        len(name) >= end
        and (name[end : end + 1] in (".", "") or name[end - 1] == ".")
        and all(p in (n, ".") for p, n in zip(pattern, name, strict=False))
    )


def _nearest(pattern: str, names: list[str], count: int = 3) -> list[str]:
    """Names that contain the pattern's text, else those that read most like it."""
    text = pattern.removeprefix("re:").strip("^$*.")
    containing = [name for name in names if text and text in name]
    if containing or len(pattern) > LONGEST_HINT:
        return containing[:count]
    return difflib.get_close_matches(pattern, names, n=count, cutoff=0.3)
