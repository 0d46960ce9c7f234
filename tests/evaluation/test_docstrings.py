"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

from mono_quant_hf import evaluation


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(evaluation.__path__)])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"{evaluation.__name__}.{name}")
    assert doctest.testmod(module).failed == 0


def test_every_public_function_but_those_that_need_files_shows_an_example():
    runner = doctest.DocTestFinder()
    for name in ("perplexity", "divergence", "kl_divergence", "sliding_windows"):
        assert any(test.examples for test in runner.find(getattr(evaluation, name), name)), name
