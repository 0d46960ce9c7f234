"""int8 codes or float16 weights by float32: they become floats as they stream by."""

import numpy as np

from .instructions import at, inline, inline_summing, named
from .tiles import CODES, HALF, HALVES, ROWS, TOKENS, dots
from .workspace import LITTLE, Entry, begin, by_chunks, finish, lay_out, rows_in_chunk, widen, x_bytes, zero


@inline_summing
def _sum(x, k):
    values = at(np.float32, x)
    total = 0.0
    for i in range(k):
        total += np.float64(values[i])
    return total


@inline_summing
def plain_dot(w, x, k, zero_point):
    """One dot product as float arithmetic has it, NaN and infinity included."""
    codes, values = at(np.int8, w), at(np.float32, x)
    total = np.float32(0.0)
    for i in range(k):
        total += values[i] * (np.float32(codes[i]) - np.float32(zero_point))
    return np.float64(total)


def _by_rows(kind):
    add, w_bytes, codes = inline(dots(kind)), kind.w_bytes, kind == CODES

    @named(_by_rows, *kind)
    def body(a, first, last, sums):
        k, m, dot, totals = a.k, a.m, at(np.float32, sums), at(np.float64, a.sums)
        token = 0
        while token < m:
            tokens = TOKENS if m - token >= TOKENS else 1
            x = a.floats + 4 * k * token
            row = first
            while row < last:
                rows = ROWS if last - row >= ROWS else 1
                w = a.weight + w_bytes * k * row
                zero(sums, rows * tokens)
                add(rows, tokens, (w, w_bytes * k, x, 4 * k, k), sums)
                for r in range(rows):
                    for t in range(tokens):
                        total = np.float64(dot[t * rows + r])
                        if codes and a.zero_point != 0:
                            zero_point = np.float64(at(np.int8, a.zero_point)[row + r])
                            total -= zero_point * totals[token + t]
                            if not np.isfinite(total):
                                total = plain_dot(w + k * r, x + 4 * k * t, k, zero_point)
                        finish(a, row + r, token + t, total)
                row += rows
            token += tokens

    return by_chunks(body)


_codes_pass = _by_rows(CODES)
_halves_pass = _by_rows(HALVES) if HALF else _codes_pass


@Entry
def linear_floats(address, room, given):
    a = begin(address, room, given)
    if a.n * a.k * a.m < LITTLE:
        a.threads = 1
    missing = lay_out(a, 4 * ROWS * TOKENS, (x_bytes(a), 8 * a.m))
    if missing != 0:
        return missing
    for token in range(a.m):
        values = widen(a, token)
        if a.zero_point != 0:
            at(np.float64, a.sums)[token] = _sum(values, a.k)
    if a.scale == 0:
        _halves_pass(a, a.threads, a.n, rows_in_chunk(a, a.k, ROWS))
    else:
        _codes_pass(a, a.threads, a.n, rows_in_chunk(a, a.k, ROWS))
    return 0
