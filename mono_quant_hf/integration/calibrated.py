"""The part of `quantize_model` that asks for more than the nearest codes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mono_quant_hf.calibration import (
    Compensation,
    Sampling,
    balance,
    calibrate,
    calibration_batches,
    rounds_with_moments,
)
from mono_quant_hf.modules import QuantizedModule

from .replacement import giving, quantizing, replace_modules
from .selection import Decision

logger = logging.getLogger("mono_quant_hf")

DATA_FREE = "data-free"


def quantize_calibrated(
    model: nn.Module,
    decisions: Mapping[str, Decision],
    tied: Iterable[Iterable[str]],
    calibration: Any,
    *,
    tokenizer: Any,
    sampling: Sampling | None,
    compensation: Compensation | None,
    resume_folder: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[nn.Module, set[str]]:
    """Replace those modules whose codes calibration has a say in; the others are for the caller to quantize.

    An error or an interruption leaves the model as it was.

    Args:
        model: float.
        decisions: `{name: decision}` of the modules to quantize.
        tied: groups of names that share a weight, which get the codes of nearest rounding.
        calibration, tokenizer, sampling, compensation, resume_folder, progress: as in `quantize_model`.

    Returns:
        the model, and the names of the modules that are done.
    """
    shared = {name for group in tied for name in group}
    targets: dict[str, QuantizedModule] = {}
    for name, decision in decisions.items():
        if decision.weights != "int8" or name in shared:
            continue
        target = quantizing(decision, empty=True)(model.get_submodule(name))
        if rounds_with_moments(target):
            targets[name] = target
    if isinstance(calibration, str) and calibration == DATA_FREE:
        for name, target in targets.items():
            balance(model.get_submodule(name), target)
        return _replaced(model, targets), set(targets)
    if "" in targets:
        raise ValueError(
            "A model that is a single layer has nothing to calibrate with: wrap it in another module."
        )
    batches = calibration_batches(model, calibration, tokenizer, sampling, progress, resume_folder)
    missed = calibrate(
        model,
        targets,
        batches,
        compensation=compensation,
        resume_folder=resume_folder,
        progress=progress,
    )
    if missed:
        logger.warning(
            "No calibration sample came by %d of %d modules, which were rounded without data: %s.",
            len(missed),
            len(targets),
            ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else ""),
        )
    return _replaced(model, targets), set(targets)


def _replaced(model: nn.Module, targets: Mapping[str, QuantizedModule]) -> nn.Module:
    """All at once and last of all, so that a model is never left half quantized."""
    return replace_modules(model, {name: giving(target) for name, target in targets.items()})
