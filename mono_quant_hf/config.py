"""`MonoQuantConfig`: what to quantize and how, as plain data that lives in a model's config.json."""

import base64
import copy
import difflib
import re
from collections.abc import Callable, Collection
from math import prod
from typing import Any

import regex
from transformers.utils.quantization_config import QuantizationConfigMixin

from .names import ACTIVATION_TYPES, OF_ONE_SAVE, OVERRIDE_WEIGHT_TYPES, QUANT_METHOD, WEIGHT_TYPES
from .texts import shown

FORMAT_VERSION = 1
"""Version of the tensors on disk. A checkpoint of a newer version is refused rather than misread."""

XXH3 = "xxh3:"
"""Before checksums, the hash that they are made by."""

MOST_PATTERNS, MOST_CHARACTERS = 10_000, 1_000_000
MOST_CHARACTERS_OF_EXPRESSIONS, MOST_REPETITIONS = 20_000, 10_000
LITERAL = re.compile(r"[\w.-]+")
"""A pattern that is a plain name, which is matched without being compiled."""


class _Method(str):
    """Its `value` is what diffusers asks for, whose own methods are members of an Enum."""

    @property
    def value(self) -> str:
        return str(self)


class MonoQuantConfig(QuantizationConfigMixin):
    """How `from_pretrained` and `quantize_model` quantize a model's weights.

    Every field is checked when it is set, here or later.

    Args:
        weights: `"int8"` (codes with a float32 scale per output channel) or `"float16"` (a cast).
        symmetric: int8 only. False, the default, adds an int8 zero-point per output channel and uses all 256 codes;
            True keeps 0 at code 0, which other engines read more readily.
        activations: `"int8"` also rounds what goes into matrix products to int8 while the model runs, with a scale for
            each token: faster for many tokens where the processor or the GPU multiplies int8
            (elsewhere nothing changes, and one line of log says so), for a little accuracy. int8 weights only.
        modules_to_not_convert: names of modules to leave in float, in addition to those that always are (the output
            head, and what is tied to it or to an embedding). As everywhere in transformers, a name matches from the
            start (`"model.layers.0"`), as a regular expression from the start, or as a suffix (`"down_proj"`).
        module_overrides: `{pattern: {"weights": ..., "symmetric": ..., "activations": ...}}` for single modules; the
            first pattern that matches decides. A pattern is a glob on the full module name (`"model.layers.*.mlp.*"`),
            or with `re:` in front a regular expression on it. `weights` is `"int8"`, `"float16"` or `"float"` (leave
            alone).
        quantize_embeddings: quantize the input embedding, per row, and the output head too; where they share one
            weight they still do. Off by default: it is the part that costs the most accuracy for what it saves. Any
            other embedding is then quantized if `module_overrides` names it.
        checksums: a checksum of every tensor that was saved with this config; set by `save_pretrained`, compared on
            loading.
        format_version: version of the format on disk; set by the package.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.

    Example:
        >>> MonoQuantConfig().weights, MonoQuantConfig(weights="float16").to_dict()["weights"]
        ('int8', 'float16')
        >>> MonoQuantConfig(weights="int7")
        Traceback (most recent call last):
            ...
        ValueError: MonoQuantConfig: weights='int7' is not supported; choose one of 'int8', 'float16'.
    """

    quant_method = _Method(QUANT_METHOD)  # type: ignore[assignment]  # a string, as third parties have

    weights: str
    symmetric: bool
    activations: str | None
    modules_to_not_convert: list[str] | None
    module_overrides: dict[str, dict[str, Any]] | None
    quantize_embeddings: bool
    checksums: str | None
    format_version: int

    def __init__(
        self,
        /,
        weights: str = "int8",
        symmetric: bool = False,
        activations: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        module_overrides: dict[str, dict[str, Any]] | None = None,
        quantize_embeddings: bool = False,
        checksums: str | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ):
        # config.json carries the method beside the fields; anything else here is a mistake.
        quant_method = unknown.pop("quant_method", QUANT_METHOD)
        if quant_method != QUANT_METHOD:
            raise ValueError(f"MonoQuantConfig: quant_method is {QUANT_METHOD!r}, not {shown(quant_method)}.")
        if unknown:
            raise TypeError(_describe_unknown(sorted(unknown)[0], format_version))
        self.weights = weights
        self.symmetric = symmetric
        self.activations = activations
        if activations is not None and weights != "int8":
            raise ValueError(
                f"MonoQuantConfig: activations={shown(activations)} needs weights='int8', not {shown(weights)}; "
                "leave one out."
            )
        self.modules_to_not_convert = modules_to_not_convert
        self.module_overrides = module_overrides
        self.quantize_embeddings = quantize_embeddings
        self.checksums = checksums
        self.format_version = format_version

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in FIELDS:
            raise AttributeError(_describe_unknown(name, FORMAT_VERSION))
        super().__setattr__(name, FIELDS[name](name, value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MonoQuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable, compared by value

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or `quant_method`; transformers asks a config as it would ask the dictionary in a config.json."""
        return self.to_dict().get(name, default)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a config of the dictionary in a config.json; `kwargs` that name fields replace its values."""
        known = {name: value for name, value in kwargs.items() if name in FIELDS}
        config = cls(**{**config_dict, **known})
        unused = {name: value for name, value in kwargs.items() if name not in FIELDS}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The whole config as JSON data, `quant_method` included."""
        return {"quant_method": QUANT_METHOD, **copy.deepcopy(self.__dict__)}

    def as_code(self) -> str:
        """The call that makes this config, without what is of one save.

        Example:
            >>> MonoQuantConfig(symmetric=True, checksums=None).as_code()
            "MonoQuantConfig(weights='int8', symmetric=True)"
        """
        usual = MonoQuantConfig()
        settings = (
            f"{name}={getattr(self, name)!r}"
            for name in FIELDS
            if name == "weights" or (name not in OF_ONE_SAVE and getattr(self, name) != getattr(usual, name))
        )
        return f"MonoQuantConfig({', '.join(settings)})"


def _describe_unknown(name: str, format_version: Any) -> str:
    near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    newer = isinstance(format_version, int) and format_version > FORMAT_VERSION
    remedy = "upgrade mono_quant_hf, the config is of a newer version" if newer else f"{hint}the fields are"
    fields = "" if newer else " " + ", ".join(FIELDS)
    return f"MonoQuantConfig has no field {shown(name)}; {remedy}{fields}."


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(
                f"MonoQuantConfig: {name} must be a string, not {type(value).__name__} ({shown(value)})."
            )
        if value not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ValueError(
                f"MonoQuantConfig: {name}={shown(value)} is not supported; choose one of {choices}."
            )
        return value

    return check


def _one_of_or_none(*allowed: str) -> Callable[[str, Any], str | None]:
    check = _one_of(*allowed)
    return lambda name, value: None if value is None else check(name, value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"MonoQuantConfig: {name} must be True or False, not {shown(value)}.")
    return value


def _module_names(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(
            f"MonoQuantConfig: {name} must be a list of module names or None, not {shown(value)}."
        )
    for item in value:
        if not isinstance(item, str) or not item:
            raise TypeError(
                f"MonoQuantConfig: {name} holds {shown(item)}; every entry must be a non-empty module name."
            )
    _not_too_many(name, value)
    for item in value:
        _compiles(name, item, item)
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def _overrides(name: str, value: Any) -> dict[str, dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise TypeError(
            f"MonoQuantConfig: {name} must be a dict of pattern to settings or None, not {shown(value)}."
        )
    for pattern in value:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(
                f"MonoQuantConfig: {name} has the key {shown(pattern)}; a key is a module name pattern."
            )
    _not_too_many(name, value)
    for pattern, override in value.items():
        if pattern.startswith("re:"):
            _compiles(name, pattern, pattern.removeprefix("re:"))
        if not isinstance(override, dict):
            raise TypeError(
                f"MonoQuantConfig: {name}[{shown(pattern)}] must be a dict of settings, not {shown(override)}."
            )
        for setting, chosen in override.items():
            if setting not in OVERRIDE_FIELDS:
                allowed = ", ".join(OVERRIDE_FIELDS)
                raise ValueError(
                    f"MonoQuantConfig: {name}[{shown(pattern)}] sets {shown(setting)}; it may set {allowed}."
                )
            OVERRIDE_FIELDS[setting](f"{name}[{shown(pattern)}][{shown(setting)}]", chosen)
        if override.get("activations") is not None and override.get("weights", "int8") != "int8":
            raise ValueError(
                f"MonoQuantConfig: {name}[{shown(pattern)}] sets activations, which need weights='int8', not "
                f"{shown(override['weights'])}; leave one out."
            )
    return copy.deepcopy(value)


def _not_too_many(name: str, patterns: Collection[str]) -> None:
    """A config may be a stranger's, and expressions of megabytes take minutes and gigabytes to compile."""
    characters = sum(map(len, patterns))
    if len(patterns) > MOST_PATTERNS or characters > MOST_CHARACTERS:
        raise ValueError(
            f"MonoQuantConfig: {name} holds {len(patterns):,} patterns of {characters:,} characters; at most "
            f"{MOST_PATTERNS:,} of {MOST_CHARACTERS:,} are allowed, use fewer that match more."
        )
    characters = sum(len(pattern) for pattern in patterns if not LITERAL.fullmatch(pattern))
    if characters > MOST_CHARACTERS_OF_EXPRESSIONS:
        raise ValueError(
            f"MonoQuantConfig: {name} holds expressions and globs of {characters:,} characters; at most "
            f"{MOST_CHARACTERS_OF_EXPRESSIONS:,} are allowed, use simpler ones."
        )


def _compiles(name: str, pattern: str, expression: str) -> None:
    if LITERAL.fullmatch(expression):
        return
    counts = re.findall(r"\{([0-9]*),?([0-9]*)\}", expression)
    if prod(max(map(int, filter(None, pair)), default=1) or 1 for pair in counts) > MOST_REPETITIONS:
        # Counts within each other are written out when they are compiled.
        problem = f"its counts ask for more than {MOST_REPETITIONS:,} repetitions"
    elif re.search(r"\(\?[A-Za-z0-9]*x", expression):
        problem = "(?x) is not allowed"  # which hides a count
    else:
        try:
            regex.compile(expression)
            return
        except (regex.error, OverflowError, RecursionError) as error:
            problem = f"no valid regular expression: {error}"
    raise ValueError(f"MonoQuantConfig: {name} holds {shown(pattern)}, {problem}.")


def _checksums(name: str, value: Any) -> str | None:
    if value is None:
        return None
    try:
        parts = (
            value.removeprefix(XXH3).split(":") if isinstance(value, str) and value.startswith(XXH3) else []
        )
        valid = 1 <= len(parts) <= 3 and not any(len(base64.b64decode(p, validate=True)) % 8 for p in parts)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"MonoQuantConfig: {name} is no list of checksums; leave it to save_pretrained.")
    return str(value)


def _version(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"MonoQuantConfig: {name} must be an integer, not {shown(value)}.")
    if not 1 <= value <= FORMAT_VERSION:
        raise ValueError(
            f"MonoQuantConfig: {name}={value} is not one that this mono_quant_hf reads (1 to {FORMAT_VERSION}); "
            "upgrade mono_quant_hf to load a checkpoint of a newer version."
        )
    return value


OVERRIDE_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "weights": _one_of(*OVERRIDE_WEIGHT_TYPES),
    "symmetric": _boolean,
    "activations": _one_of_or_none(*ACTIVATION_TYPES),
}
FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "weights": _one_of(*WEIGHT_TYPES),
    "symmetric": _boolean,
    "activations": _one_of_or_none(*ACTIVATION_TYPES),
    "modules_to_not_convert": _module_names,
    "module_overrides": _overrides,
    "quantize_embeddings": _boolean,
    "checksums": _checksums,
    "format_version": _version,
}
