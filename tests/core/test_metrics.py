import math

import pytest
import torch

from mono_quant_hf.core import sqnr


def test_by_hand():
    reference = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    approximation = torch.tensor([[1.1, -2.0], [2.8, 0.5]])
    by_hand = 10 * math.log10((1 + 4 + 9 + 0.25) / (0.1**2 + 0.2**2))
    assert sqnr(reference, approximation) == pytest.approx(by_hand, abs=1e-5)


def test_equal_is_infinite_and_a_zero_reference_minus_infinite():
    ones = torch.ones(3)
    assert sqnr(ones, ones) == math.inf
    assert sqnr(torch.zeros(3), ones) == -math.inf


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        sqnr(torch.ones(2), torch.ones(3))
