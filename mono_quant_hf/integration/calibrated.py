"""The part of `quantize_model` that asks for more than the nearest codes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
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

from .apply import quantized_class_of
from .selection import Decision
from .tying import tied_modules

logger = logging.getLogger("mono_quant_hf")

DATA_FREE = "data-free"


def calibrated_codes(
    model: nn.Module,
    decisions: Mapping[str, Decision],
    calibration: Any,
    *,
    tokenizer: Any,
    sampling: Sampling | None,
    compensation: Compensation | None,
    resume_folder: str | os.PathLike[str] | None,
    progress: bool,
) -> dict[str, QuantizedModule]:
    """Quantized twins of those modules whose codes calibration has a say in, which weights that are shared are not.

    Args:
        model: float; on return, and whatever happens, it is as it was before.
        decisions: `{name: decision}` of the modules to quantize.
        calibration, tokenizer, sampling, compensation, resume_folder, progress: as in `quantize_model`.

    Returns:
        `{name: twin}`.
    """
    shared = {name for group in tied_modules(model) for name in group}
    targets: dict[str, QuantizedModule] = {}
    for name, decision in decisions.items():
        if decision.weights != "int8" or name in shared:
            continue
        module = model.get_submodule(name)
        target = quantized_class_of(module, decision).empty_like(
            module, decision.weights, bool(decision.symmetric), name, activations=decision.activations
        )
        if rounds_with_moments(target):
            targets[name] = target
    if isinstance(calibration, str) and calibration == DATA_FREE:
        for name, target in targets.items():
            balance(model.get_submodule(name), target)
        return targets
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
    return targets
