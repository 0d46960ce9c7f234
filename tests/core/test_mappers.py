import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed
from hypothesis import given, settings
from hypothesis import strategies as st

from mono_quant_hf.core import calculate_scale_zp_per_channel, dequantize_codes, quantize_to_codes

AXES_AND_SHAPES = [
    ((7,), 0),
    ((5, 9), 0),
    ((5, 9), 1),
    ((5, 9), -1),
    ((4, 3, 2, 5), 0),
    ((4, 3, 2, 5), 2),
    ((2, 3, 4, 2, 2), -2),
]


def numpy_scale_zp(weight: np.ndarray, symmetric: bool, axis: int):
    """design: the range includes 0; (max - min) / 255 and round(-128 - min / scale), or absmax / 127."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    scales, zero_points = [], []
    for row in rows:
        low, high = np.float32(min(0, row.min())), np.float32(max(0, row.max()))
        scale = (
            np.float32(max(-low, high) / np.float32(127))
            if symmetric
            else np.float32((high - low) / np.float32(255))
        )
        scales.append(scale)
        zero_points.append(
            0 if symmetric else int(np.clip(np.rint(np.float32(-128) - low / scale), -128, 127))
        )
    return np.array(scales), np.array(zero_points)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "axis"), AXES_AND_SHAPES)
def test_agrees_with_numpy(shape, axis, symmetric):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.3
    scale, zero_point = calculate_scale_zp_per_channel(weight, symmetric=symmetric, axis=axis)
    expected_scale, expected_zero_point = numpy_scale_zp(weight.numpy(), symmetric, axis)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int64
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(zero_point.numpy(), expected_zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
def test_agrees_with_quantized_decomposed(symmetric):
    weight = torch.randn(16, 33, generator=torch.Generator().manual_seed(1))
    scale, zero_point = calculate_scale_zp_per_channel(weight, symmetric=symmetric)
    for row, (s, z) in enumerate(zip(scale, zero_point, strict=True)):
        choose = (
            torch.ops.quantized_decomposed.choose_qparams_symmetric
            if symmetric
            else torch.ops.quantized_decomposed.choose_qparams
        )
        limits = (-127, 127) if symmetric else (-128, 127)
        expected_scale, expected_zero_point = choose(weight[row], *limits, 1e-12, torch.int8)
        assert s == pytest.approx(float(expected_scale), rel=1e-6)
        assert z == expected_zero_point


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_float32_whatever_the_weight(dtype):
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(2)).to(dtype)
    scale, zero_point = calculate_scale_zp_per_channel(weight)
    expected_scale, expected_zero_point = calculate_scale_zp_per_channel(weight.float())
    assert torch.equal(scale, expected_scale) and torch.equal(zero_point, expected_zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        [5.0, 5.0, 5.0],
        [-5.0, -5.0],
        [3.0, 4.0, 5.0],
        [-0.1, -7.0],
        [2.5],
        [1e-30, -1e-30],
        [1e-42, 3e-45],
        [3e38, 1e30],
    ],
    ids=["constant", "negative constant", "positive", "negative", "one element", "tiny", "denormal", "huge"],
)
def test_awkward_channels_round_trip_within_half_a_step(row, symmetric):
    weight = torch.tensor([row])
    codes, scale, zero_point = quantize_to_codes(weight, symmetric=symmetric)
    error = (dequantize_codes(codes, scale, zero_point).double() - weight.double()).abs().max()
    assert error <= 0.5 * float(scale) * (1 + 1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_channel_is_exact_beside_others(symmetric):
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]])
    codes, scale, zero_point = quantize_to_codes(weight, symmetric=symmetric)
    assert torch.equal(dequantize_codes(codes, scale, zero_point)[0], torch.zeros(3))
    assert scale[0] == 1 and torch.isfinite(scale).all()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    symmetric=st.booleans(),
)
def test_every_weight_round_trips_within_half_a_step_and_zero_exactly(rows, symmetric):
    weight = torch.tensor(rows)
    codes, scale, zero_point = quantize_to_codes(weight, symmetric=symmetric)
    restored = dequantize_codes(codes, scale, zero_point).double()
    assert bool(((restored - weight.double()).abs() <= scale.double() * 0.5 * (1 + 1e-4)).all())
    assert bool((restored[weight == 0] == 0).all())
    if symmetric:
        assert int(codes.min()) >= -127


@pytest.mark.parametrize(
    ("tensor", "kwargs", "error", "words"),
    [
        (torch.tensor([[1.0, float("nan")]]), {}, ValueError, "1 NaN"),
        (torch.tensor([[1.0, float("inf"), float("-inf")]]), {}, ValueError, "2 infinite"),
        (torch.empty(0, 4), {}, ValueError, "no elements"),
        (torch.empty(4, 0), {}, ValueError, "no elements"),
        (torch.tensor(1.0), {}, ValueError, "scalar"),
        (torch.ones(2, 2), {"axis": 2}, ValueError, "axis 2"),
        (torch.ones(2, 2, dtype=torch.int8), {}, TypeError, "int8"),
        ([1.0], {}, TypeError, "list"),
        (torch.ones(2, 2), {"dtype": torch.quint8}, ValueError, "qint8"),
        (torch.tensor([[3e38, -3e38]]), {}, ValueError, "wider than float32"),
    ],
)
def test_bad_input_is_one_clear_error(tensor, kwargs, error, words):
    with pytest.raises(error, match=words):
        calculate_scale_zp_per_channel(tensor, **kwargs)
