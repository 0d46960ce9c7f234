"""Rounding for the output: smaller error than the nearest codes, on the same grid."""

import itertools

import pytest
import torch

from mono_quant_hf.core import dequantize_codes, quantize_to_codes
from mono_quant_hf.core.rounding import round_balanced, round_compensated


def a_layer(channels=24, inputs=40, columns=400):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) + torch.ones(inputs, inputs)
    return weight, mixing @ torch.randn(inputs, columns, generator=generator)


def error(weight, codes, scale, zero_point, x):
    return float(((dequantize_codes(codes, scale, zero_point) - weight) @ x).norm() / (weight @ x).norm())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sweeps", [0, 1])
def test_compensated_rounding_lowers_the_error_of_the_output(symmetric, sweeps):
    weight, x = a_layer()
    codes, scale, zero_point = quantize_to_codes(weight, symmetric)
    better = round_compensated(weight, scale, zero_point, x @ x.T / x.shape[1], sweeps=sweeps)
    assert better.dtype == torch.int8
    assert error(weight, better, scale, zero_point, x) < 0.6 * error(weight, codes, scale, zero_point, x)
    assert not symmetric or int(better.min()) >= -127


def test_blocks_do_not_change_the_result():
    weight, x = a_layer()
    _, scale, zero_point = quantize_to_codes(weight)
    whole, in_blocks = (
        round_compensated(weight, scale, zero_point, x @ x.T, sweeps=2, block_size=size) for size in (64, 7)
    )
    assert float((whole != in_blocks).float().mean()) < 0.01  # ties alone


def test_compensated_rounding_finds_the_best_codes_of_a_small_row():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        weight = 3 * torch.randn(1, 4, generator=generator)
        factor = torch.randn(4, 4, generator=generator)
        hessian = factor @ factor.T + 0.5 * torch.eye(4)
        scale = torch.ones(1, 1)

        def loss(codes, weight=weight, hessian=hessian):
            difference = torch.as_tensor(codes, dtype=torch.float32) - weight
            return float(difference @ hessian @ difference.T)

        near = [(int(w.floor()), int(w.ceil())) for w in weight[0]]
        best = min(loss([codes]) for codes in itertools.product(*near))
        got = loss(round_compensated(weight, scale, None, hessian, damping=0.0).float())
        assert got <= loss(weight.round()) + 1e-5 and got <= 1.6 * best + 1e-5


def test_independent_inputs_get_the_nearest_codes():
    weight, _ = a_layer()
    codes, scale, zero_point = quantize_to_codes(weight)
    assert torch.equal(round_compensated(weight, scale, zero_point, torch.eye(40)), codes)


def test_an_input_that_is_always_zero_and_a_singular_hessian_are_no_problem():
    weight, x = a_layer()
    x[3] = 0
    x[5] = x[6]
    codes, scale, zero_point = quantize_to_codes(weight)
    few = x[:, :4]  # rank 4 of 40
    for damping in (0.0, 0.01):
        better = round_compensated(weight, scale, zero_point, few @ few.T, damping=damping)
        assert error(weight, better, scale, zero_point, few) < error(weight, codes, scale, zero_point, few)
        assert torch.equal(better[:, 3], codes[:, 3])


def test_groups_are_leading_dimensions():
    weight, x = a_layer()
    _, scale, zero_point = quantize_to_codes(weight)
    hessians = torch.stack([x @ x.T, torch.eye(40)])
    both = round_compensated(
        weight.expand(2, -1, -1), scale.expand(2, -1, -1), zero_point.expand(2, -1, -1), hessians
    )
    for n in range(2):
        assert torch.equal(both[n], round_compensated(weight, scale, zero_point, hessians[n]))


def test_a_hessian_that_does_not_fit_is_refused():
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match="shape"):
        round_compensated(weight, torch.ones(2, 1), None, torch.eye(4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        round_compensated(weight, torch.ones(2, 1), None, torch.full((3, 3), torch.nan))


@pytest.mark.parametrize("symmetric", [False, True])
def test_balanced_errors_sum_to_half_a_step_and_no_code_moves_further_than_its_neighbour(symmetric):
    weight = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    codes, scale, zero_point = quantize_to_codes(weight, symmetric)
    balanced = round_balanced(weight, scale, zero_point)
    steps = (dequantize_codes(balanced, scale, zero_point) - weight) / scale
    assert (
        float(steps.sum(1).abs().max())
        <= 0.5 + 1e-3
        < float(((dequantize_codes(codes, scale, zero_point) - weight) / scale).sum(1).abs().max())
    )
    assert float(steps.abs().max()) < 1 and int((balanced.int() - codes).abs().max()) == 1


def test_balanced_keeps_a_row_that_is_on_the_grid():
    weight = torch.tensor([[0.0, 1.0, -1.0, 127.0, -128.0]])
    assert round_balanced(weight, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int8)).tolist() == [
        [0, 1, -1, 127, -128]
    ]
