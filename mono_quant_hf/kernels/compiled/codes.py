"""Codes to floats and floats to codes, each row of the weight by itself."""

import numpy as np

from .instructions import at, inline, inline_first, named, same_bits
from .workspace import LITTLE, Entry, begin, by_chunks, lay_out, rows_in_chunk


def _by_rows(body):
    """The entry that calls body(a, row) for each row of the weight."""

    body = inline_first(body)

    @named(_by_rows, body)
    def some_rows(a, first, last, own):
        for row in range(first, last):
            body(a, row)

    run = by_chunks(some_rows)

    @inline_first
    @named(_by_rows, body)
    def compute(address, room, given):
        a = begin(address, room, given)
        if a.n * a.k < LITTLE // 4:
            a.threads = 1
        missing = lay_out(a, 0, (0,))
        if missing == 0:
            run(a, a.threads, a.n, rows_in_chunk(a, 4 * a.k, 1))
        return missing

    return compute


@_by_rows
def _expand(a, row):
    codes, out = at(np.int8, a.weight + a.k * row), at(np.float32, a.out + 4 * a.k * row)
    scale, zero_point = at(np.float32, a.scale)[row], np.int32(0)
    if a.zero_point != 0:
        zero_point = np.int32(at(np.int8, a.zero_point)[row])
    for i in range(a.k):
        out[i] = np.float32(np.int32(np.int32(codes[i]) - zero_point)) * scale


@Entry
def expand(address, room, given):
    """(weight - zero-point) * scale."""
    return _expand(address, room, given)


_MOST_KEY, _LEAST_KEY = 0x7F800000, -0x7F800001  # of the two infinities, see _ordered
_TINY = np.finfo(np.float32).tiny


@inline
def _ordered(bits):
    """The bits of a float32 as an integer that is ordered as the floats are, NaN beyond infinity; and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@inline
def _range(row, k):
    """The least and the largest of 0 and the floats of a row, as `_ordered` gives them."""
    bits = at(np.int32, row)
    least = most = np.int32(0)
    for i in range(k):
        key = _ordered(bits[i])
        least, most = min(least, key), max(most, key)
    return least, most


@inline
def _round(row, k, codes, scale, zero_point, lowest):
    source, target = at(np.float32, row), at(np.int8, codes)
    inverse = np.float32(1.0) / scale
    for i in range(k):
        step = np.float32(np.rint(source[i] * inverse) + zero_point)
        target[i] = np.int8(np.int32(min(max(step, lowest), np.float32(127.0))))


@_by_rows
def _encode(a, row):
    values = a.weight + 4 * a.k * row
    least, most = _range(values, a.k)
    if most >= _MOST_KEY or least <= _LEAST_KEY:
        at(np.float32, a.scale)[row] = np.float32(np.nan)
        return
    low, high = same_bits(np.float32, _ordered(least)), same_bits(np.float32, _ordered(most))
    scale, zero_point, lowest = np.float32(1.0), np.float32(0.0), np.float32(-127.0)
    if a.zero_point == 0:
        if low != high:
            scale = max(max(-low, high) / np.float32(127.0), _TINY)
    else:
        lowest = np.float32(-128.0)
        if low != high:
            scale = max((high - low) / np.float32(255.0), _TINY)
            zero_point = np.rint(np.float32(-128.0) - low / scale)
            zero_point = min(max(zero_point, lowest), np.float32(127.0))
        at(np.int8, a.zero_point)[row] = np.int8(np.int32(zero_point))
    at(np.float32, a.scale)[row] = scale
    _round(values, a.k, a.out + a.k * row, scale, zero_point, lowest)


@Entry
def encode(address, room, given):
    """Float32 rows to codes, as core.quantize_to_codes, to the bit; the scale of a row without a range is NaN."""
    return _encode(address, room, given)
