"""Windowing is plain integers: checked for every small length, window and stride, and drawn larger ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mono_quant_hf.evaluation import sliding_windows


@st.composite
def settings(draw):
    window = draw(st.integers(2, 40))
    return draw(st.integers(2, 300)), window, draw(st.integers(1, window))


@given(settings())
def test_every_token_but_the_first_is_scored_exactly_once_in_order(setting):
    length, window, stride = setting
    scored = [target for w in sliding_windows(length, window, stride) for target in w.targets]
    assert scored == list(range(1, length))


@given(settings())
def test_no_window_is_too_long_and_each_target_follows_its_position(setting):
    length, window, stride = setting
    for w in sliding_windows(length, window, stride):
        assert 1 <= w.stop - w.start <= window
        assert [w.start + p + 1 for p in w.positions] == list(w.targets)
        assert min(w.positions) >= 0 and max(w.positions) == w.stop - w.start - 1


@given(settings())
def test_context_is_that_of_the_documented_method(setting):
    """Window k covers [k * stride, k * stride + window), and the first that covers a token scores it."""
    length, window, stride = setting
    for w in sliding_windows(length, window, stride):
        for target in w.targets:
            number = max(
                0, -(-(target + 1 - window) // stride)
            )  # the first k with k * stride + window > target
            begin = number * stride
            # where windows do not overlap, the first token of one is told the last of the one before
            assert w.start == (begin - 1 if begin and stride == window else begin)


def test_a_text_that_fits_is_one_window():
    (only,) = sliding_windows(5, window=8, stride=4)
    assert (only.start, only.stop, list(only.targets)) == (0, 4, [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("length", "window", "stride", "message"),
    [
        (9, 4, 5, r"stride \(5\) is larger than window \(4\)"),
        (9, 4, 0, "stride is 0"),
        (9, 1, 1, "window is 1"),
        (1, 4, 2, "a sequence of 1 token"),
    ],
)
def test_errors(length, window, stride, message):
    with pytest.raises(ValueError, match=message):
        list(sliding_windows(length, window, stride))
