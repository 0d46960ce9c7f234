"""Putting quantized modules in the place of float ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from mono_quant_hf.modules import QuantizedModule, quantized_class_for

from .selection import Decision


def replace_modules(
    model: nn.Module,
    makers: Mapping[str, Callable[[nn.Module], nn.Module]],
    on_each: Callable[[str], None] | None = None,
) -> nn.Module:
    """Replace the named modules by what their maker makes of them, one after the other.

    A module that is known by several names is replaced under all of them by one and the same.

    Args:
        model: changed in place, unless the model itself (name `""`) is to be replaced.
        makers: `{module name: maker}`.
        on_each: called with the name after each replacement.

    Returns:
        The model, or what the maker of `""` made of it.
    """
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            if child is not None:
                parents.setdefault(id(child), []).append((parent, child_name))
    for name, make in makers.items():
        old = model.get_submodule(name)
        new = make(old)
        for parent, child_name in parents.get(id(old), ()):
            parent._modules[child_name] = new
        if name == "":
            model = new
        if on_each is not None:
            on_each(name)
    return model


def quantizing(decision: Decision, *, empty: bool = False) -> Callable[[nn.Module], QuantizedModule]:
    """A maker of the quantized module that was decided on, with the codes of the float one or with room for codes."""

    def make(module: nn.Module) -> QuantizedModule:
        quantized_class = quantized_class_for(module)
        assert quantized_class is not None
        make_twin = quantized_class.empty_like if empty else quantized_class.from_float
        return make_twin(
            module,
            decision.weights,
            bool(decision.symmetric),
            name=decision.module,
            activations=decision.activations,
        )

    return make


def giving(module: nn.Module) -> Callable[[nn.Module], nn.Module]:
    """A maker of what is made already."""
    return lambda _: module
