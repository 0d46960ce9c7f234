"""Putting quantized modules in the place of float ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn


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
