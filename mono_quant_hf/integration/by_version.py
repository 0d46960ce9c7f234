"""What differs between the versions of transformers, each with the version from which on it can be deleted here."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.base import HfQuantizer

# transformers >= 5.22
WANTS_MODEL = "model" in signature(HfQuantizer.update_weight_conversions).parameters
"""Whether `HfQuantizer.update_weight_conversions` is given the model."""


def update_weight_conversions(quantizer: HfQuantizer, conversions: Any, model: Any) -> Any:
    """That of `HfQuantizer` itself."""
    arguments = {"model": model} if WANTS_MODEL else {}
    return HfQuantizer.update_weight_conversions(quantizer, conversions, **arguments)


# apply_renamings and apply_converters: transformers >= 5.22
def renamed(name: str, renamings: Iterable[WeightTransform]) -> str:
    """A name after each of the renamings in turn."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def converted(name: str, converters: Iterable[WeightTransform]) -> str:
    """A name after the first of the converters that it matches."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return target
    return name


# transformers >= 5.23
LOADER_CHECKS_SHAPES = Version(transformers.__version__).release >= (5, 23)
"""Whether the loader compares the shapes of tensors that a quantizer leaves to it, and knows what to ignore."""


def shapes_to_come(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of each parameter before loading, where the loader does not check it."""
    return {} if LOADER_CHECKS_SHAPES else {name: p.shape for name, p in model.named_parameters()}


def check_shapes(model: nn.Module, expected: dict[str, torch.Size]) -> None:
    """Compare `shapes_to_come` with what was loaded.

    Raises:
        ValueError: tensors of another shape were put in; names them.
    """
    found = {name: p.shape for name, p in model.named_parameters()}
    wrong = [
        f"{name} {list(shape)}, got {list(found[name])}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        raise ValueError(
            f"Expected {'; '.join(wrong)} in the checkpoint; load it with the config that it was saved with, or with "
            "transformers 5.23 or later, whose ignore_mismatched_sizes=True makes new weights of other shapes."
        )
