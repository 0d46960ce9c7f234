"""Matching module names against the patterns of a config, which may come from a stranger's config.json."""

from __future__ import annotations

import difflib
import fnmatch
import logging
import time
from collections.abc import Callable

# The standard library's re has no bound on time, and `(.*.*)*x` takes longer than the universe has.
import regex

logger = logging.getLogger("mono_quant_hf")

SECONDS = 1.0
"""For all that is slow to match, all patterns of a field together; what takes under `SLOW` does not count."""
SLOW = 0.01


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
        matches: Callable[[str, str, float], bool],
        aliases: Callable[[str], list[str]],
    ):
        self.field, self.patterns, self.matches, self.aliases = field, patterns, matches, aliases
        self.matched: set[str] = set()
        self.seconds = SECONDS

    def first_match(self, name: str) -> str | None:
        """The first pattern that matches a name; None if there is none.

        Raises:
            ValueError: a pattern takes too long.
        """
        hits = [pattern for pattern in self.patterns if self._hits(pattern, name)]
        self.matched.update(hits)
        return hits[0] if hits else None

    def warn_of_unmatched(self, names: list[str]) -> None:
        """Warn of each pattern that has matched nothing, nor matches any of `names`, and name the nearest of them."""
        for pattern in self.patterns:
            # A pattern may well name a module that holds no weight to quantize, such as a norm.
            if pattern not in self.matched and not any(self._hits(pattern, name) for name in names):
                near = _nearest(pattern, names)
                hint = f" Nearest names: {', '.join(near)}." if near else ""
                logger.warning("%s: %r matches no module.%s", self.field, pattern, hint)

    def _hits(self, pattern: str, name: str) -> bool:
        started = time.perf_counter()
        try:
            return any(self.matches(pattern, alias, self.seconds) for alias in self.aliases(name))
        except TimeoutError:
            raise ValueError(
                f"{self.field}: {pattern!r} takes too long to match {name!r}; simplify it."
            ) from None
        finally:
            spent = time.perf_counter() - started
            if spent > SLOW:
                self.seconds = max(self.seconds - spent, SLOW)


def matches_as_in_transformers(pattern: str, name: str, seconds: float) -> bool:
    """A name from the start, a regular expression from the start (both up to a dot or the end), or a suffix."""
    if name.endswith(pattern):
        return True
    bounded = rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"
    return regex.match(bounded, name, timeout=seconds) is not None


def matches_glob_or_regex(pattern: str, name: str, seconds: float) -> bool:
    """A glob on the whole name, or after `re:` a regular expression from its start."""
    if pattern.startswith("re:"):
        return regex.match(pattern.removeprefix("re:"), name, timeout=seconds) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _nearest(pattern: str, names: list[str], count: int = 3) -> list[str]:
    """Names that contain the pattern's text, else those that read most like it."""
    text = pattern.removeprefix("re:").strip("^$*.")
    containing = [name for name in names if text and text in name]
    return containing[:count] or difflib.get_close_matches(pattern, names, n=count, cutoff=0.3)
