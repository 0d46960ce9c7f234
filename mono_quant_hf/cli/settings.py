"""How to quantize, as options of the command line: every field of `MonoQuantConfig` that a user sets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mono_quant_hf.json_files import read_json
from mono_quant_hf.names import (
    ACTIVATION_TYPES,
    OF_ONE_SAVE,
    OVERRIDE_WEIGHT_TYPES,
    QUANT_METHOD,
    WEIGHT_TYPES,
)

from .errors import CommandError

if TYPE_CHECKING:
    from mono_quant_hf import MonoQuantConfig

_FIELDS = {
    "weights": "weights",
    "symmetric": "symmetric",
    "activations": "activations",
    "embeddings": "quantize_embeddings",
    "skip": "modules_to_not_convert",
    "override": "module_overrides",
}
"""The field of the config that each option sets."""


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add the group of options that `settings` reads."""
    group = command.add_argument_group("how to quantize")
    group.add_argument("--weights", choices=WEIGHT_TYPES, help="storage of weights (int8)")
    group.add_argument("--symmetric", action="store_true", default=None, help="int8 without zero-points")
    group.add_argument(
        "--activations", choices=ACTIVATION_TYPES, help="round what goes into products too, as the model runs"
    )
    group.add_argument(
        "--embeddings", action="store_true", default=None, help="quantize embeddings and the output head too"
    )
    group.add_argument(
        "--skip", action="append", metavar="NAME", help="a module to leave in float; may be repeated"
    )
    group.add_argument(
        "--override",
        action="append",
        type=_override,
        metavar="PATTERN=HOW",
        help="for the modules whose names match: int8, float16 or float, and ',symmetric' after int8, such as "
        "'*.down_proj=float16'; may be repeated, and the first that matches decides",
    )
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="read these settings from JSON, such as the config.json of a quantized model; other options replace them",
    )


def settings_given(arguments: argparse.Namespace) -> bool:
    """Whether any option of the group was given."""
    return arguments.config is not None or any(getattr(arguments, name) is not None for name in _FIELDS)


def settings(arguments: argparse.Namespace) -> MonoQuantConfig:
    """The config that the options describe.

    Raises:
        CommandError: the options contradict each other, or the file of `--config` cannot be read.
        TypeError, ValueError: a setting in that file is wrong.
    """
    from mono_quant_hf import MonoQuantConfig

    fields = {} if arguments.config is None else _read(arguments.config)
    for name, field in _FIELDS.items():
        if (value := getattr(arguments, name)) is not None:
            fields[field] = dict(value) if name == "override" else value
    if fields.get("weights", "int8") != "int8":
        for name in ("symmetric", "activations"):
            if fields.get(name):
                raise CommandError(f"--{name} is for int8; leave it out with --weights {fields['weights']}.")
    return MonoQuantConfig(**fields)


def scheme(config: MonoQuantConfig) -> str:
    """How weights are stored: "int8", "int8 symmetric" or "float16"."""
    return config.weights + (" symmetric" if config.symmetric and config.weights == "int8" else "")


def described(config: MonoQuantConfig) -> str:
    """A config in a few words, such as "int8 symmetric, embeddings too"."""
    return scheme(config) + (", embeddings too" if config.quantize_embeddings else "")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file)
    except OSError as problem:
        raise CommandError(f"--config {file} cannot be read: {problem}") from problem
    found = found.get("quantization_config", found)
    if not isinstance(found, dict):
        raise CommandError(
            f'--config {file} holds no JSON object; give settings such as {{"symmetric": true}}.'
        )
    if (method := found.get("quant_method", QUANT_METHOD)) != QUANT_METHOD:
        raise CommandError(f"--config {file} is for the method {method!r}, not for {QUANT_METHOD!r}.")
    return {name: value for name, value in found.items() if name not in ("quant_method", *OF_ONE_SAVE)}


def _override(value: str) -> tuple[str, dict[str, Any]]:
    pattern, _, how = value.rpartition("=")
    weights, _, rest = how.partition(",")
    if not pattern or weights not in OVERRIDE_WEIGHT_TYPES or rest not in ("", "symmetric"):
        raise argparse.ArgumentTypeError(
            f"expected PATTERN=HOW with HOW one of {', '.join(OVERRIDE_WEIGHT_TYPES)} or int8,symmetric; got {value!r}"
        )
    return pattern, {"weights": weights} | ({"symmetric": True} if rest else {})
