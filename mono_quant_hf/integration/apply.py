"""Doing to the modules of a model what was decided."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from mono_quant_hf.modules import QuantizedModule, quantized_class_for

from .selection import Decision, modules_that_say_dtype
from .tying import declare_tied_storage, share_storage, tied_modules

Change = Callable[[nn.Module, Decision], object]
"""Makes a float module the quantized one that was decided on."""


def change_modules(
    model: nn.Module, decisions: Iterable[Decision], change: Change, saying: Iterable[str] = ()
) -> None:
    """Change all modules that are to be quantized, one after the other; what is tied stays tied.

    Args:
        saying: names of modules that say the dtype, beside those of which it is known.
    """
    groups = tied_modules(model)
    chosen = {decision.module: decision for decision in decisions if decision.quantized}
    saying = {*saying, *modules_that_say_dtype(model, chosen)}
    for name, decision in chosen.items():
        change(model.get_submodule(name), decision)
    share_storage(model, groups)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in saying:
        # A damaged checkpoint may have lost the codes, or name a module that is not there.
        if isinstance(module := modules.get(name), QuantizedModule):
            module.say_dtype()
    if isinstance(model, PreTrainedModel):
        declare_tied_storage(model)


def make_room(module: nn.Module, decision: Decision, dtype: torch.dtype | None = None) -> QuantizedModule:
    """A `Change` that leaves room for codes which will be loaded.

    Args:
        dtype: that the weight shows; None for the one that it has.
    """
    return quantized_class_of(module, decision).make_room(
        module,
        decision.weights,
        bool(decision.symmetric),
        decision.module,
        activations=decision.activations,
        dtype=dtype,
    )


def quantize(module: nn.Module, decision: Decision) -> QuantizedModule:
    """A `Change` to the nearest codes."""
    return quantized_class_of(module, decision).quantize(
        module,
        decision.weights,
        bool(decision.symmetric),
        decision.module,
        activations=decision.activations,
    )


def quantized_class_of(module: nn.Module, decision: Decision) -> type[QuantizedModule]:
    """The class that a module gets.

    Raises:
        ValueError: there is none, though a checkpoint says that the module is quantized.
    """
    quantized_class = quantized_class_for(module)
    if quantized_class is None:
        raise ValueError(
            f"Expected {decision.module} to be a module that can be quantized, as it was when it was saved, got a "
            f"{type(module).__name__}; load the checkpoint with the class that was saved."
        )
    return quantized_class
