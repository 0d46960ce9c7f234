"""Every public class and function has an example in its docstring, which runs and prints what it says."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import mono_quant_hf
from mono_quant_hf.modules import registry

SUBMODULES = [info.name for info in pkgutil.walk_packages(mono_quant_hf.__path__, "mono_quant_hf.")]
# Running the package is its command line; a plugin is imported by its engine, kernels of Triton where that is.
ELSEWHERE = ("mono_quant_hf.__main__", "mono_quant_hf.engines.", "mono_quant_hf.kernels.triton_")
MODULES = ["mono_quant_hf", *sorted(name for name in SUBMODULES if not name.startswith(ELSEWHERE))]


@pytest.fixture
def own_registry(monkeypatch):
    """A class that an example registers is not there for the tests to come."""
    monkeypatch.setattr(registry, "WEIGHT_AXES", registry.WEIGHT_AXES.copy())


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(
        module,
        extraglobs={"torch": torch},
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert result.failed == 0


def public_names():
    """`module.name` of the classes and functions of this package that a module lists in its `__all__`."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", []):
            item = getattr(module, name)
            ours = getattr(item, "__module__", "").startswith("mono_quant_hf")
            if ours and (inspect.isclass(item) or inspect.isroutine(item)):
                found.setdefault(item, f"{module.__name__}.{name}")
    return {name: item for item, name in found.items()}


def needs_example(item):
    """All but exceptions and dataclasses, which are shown by what raises, returns or takes them."""
    return not dataclasses.is_dataclass(item) and not (
        inspect.isclass(item) and issubclass(item, BaseException)
    )


PUBLIC = public_names()


def test_public_names_are_found():
    assert {"mono_quant_hf.push_to_hub", "mono_quant_hf.core.sqnr", "mono_quant_hf.hub.HubError"} <= {*PUBLIC}


@pytest.mark.parametrize("name", [name for name, item in PUBLIC.items() if needs_example(item)])
def test_public_docstring_has_an_example(name):
    _, _, block = (PUBLIC[name].__doc__ or "").partition("Example:\n")
    assert doctest.DocTestParser().get_examples(block), f"{name} has no Example in its docstring that runs"
