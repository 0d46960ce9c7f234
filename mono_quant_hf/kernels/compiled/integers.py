"""int8 codes by the tokens' values as codes of their own, with a scale for each token; products are summed in integers.

Codes of x have 16 bits; or 8, but for the few columns of outliers (int8 activations).
"""

import numpy as np

from .floats import plain_dot
from .instructions import at, inline, inline_always, inline_summing, prefetch, same_bits
from .tiles import BYTES, INT16, LANES, NOTHING, ROWS, TOKENS, dots, scale_dots
from .workspace import (
    FLOAT32,
    LITTLE,
    begin,
    by_chunks,
    entry,
    lay_out,
    next_chunk,
    own_slice,
    passes,
    read_bias,
    rows_in_chunk,
    widen,
    widen_row,
    write,
    x_bytes,
    zero,
)

# |codes of x| <= 32767 and |codes of w| <= 128, so 511 products fit one int32; lanes are added as floats.
_LARGEST = 32767
_LONGEST = 510 * LANES
# The same for codes of x in 8 bits: k products of up to 255 * 128, and k / 32 of up to 32767 * 128, in int32 lanes.
LONGEST_BYTES = 13_000 * LANES
# A typical entry of x under this many steps of its token's scale would lose accuracy (60 dB for a result made
# of typical entries alone, as 20 log10(256 * sqrt(12 * pi / 2))): such a token gets a second plane of codes.
_FEWEST_STEPS = 256.0
_PEAK_COLUMNS = 256  # of x, whose peaks a worker finds at once

_add_int16 = inline(dots(INT16))
_add_bytes = inline_always(dots(BYTES, INT16))  # a call with so many numbers costs as much as a short product
_FEW_WIDE = INT16.wide


# ---------------------------------------------------------------- the codes of x: 16 bits


def _rounding(integer, offset, sum_type):
    @inline
    def quantize(values, k, codes, inverse):
        """codes = round(values * inverse) + offset; the sum of the codes without the offset."""
        source, target = at(np.float32, values), at(integer, codes)
        total = sum_type(0)
        for i in range(k):
            code = np.int32(np.rint(source[i] * inverse))
            target[i] = integer(code + np.int32(offset))
            total += code
        return total

    return quantize


_quantize = _rounding(np.int16, 0, np.int64)
_quantize_bytes = _rounding(np.uint8, 128, np.int32)


@inline
def _quantize_rest(values, k, codes, step, rest, rest_step):
    """The second plane: what `codes` left of `values`, at most half a step, as codes of its own."""
    source, first, target = at(np.float32, values), at(np.int16, codes), at(np.int16, rest)
    inverse = np.float32(1.0) / rest_step
    total = np.int64(0)
    for i in range(k):
        # in float64, where code * step is exact
        left = np.float64(source[i]) - np.float64(first[i]) * np.float64(step)
        code = np.int32(np.rint(np.float32(left) * inverse))
        target[i] = np.int16(code)
        total += code
    return total


@inline_summing
def _size(x, k):
    """(bits of the largest |x|, sum of |x|). As integers, absolute floats keep their order, NaN on top."""
    bits, values = at(np.int32, x), at(np.float32, x)
    most = np.int32(0)
    total = np.float32(0.0)
    for i in range(k):
        most = max(most, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
        total += abs(values[i])
    return most, total


@inline
def _inverse(step):
    return np.float32(0.0) if step == np.float32(0.0) else np.float32(1.0) / step


@by_chunks
def _int16_pass(a, token, _, own):
    k, m = a.k, a.m
    values, codes = widen(a, token), a.int16_codes + 2 * k * token
    steps, sums = at(np.float32, a.steps), at(np.float64, a.sums)
    bits, total = _size(values, k)
    largest = same_bits(np.float32, bits)
    steps[token], steps[m + token] = np.float32(-1.0), np.float32(0.0)
    if bits >= 0x7F800000 or (largest < np.float32(1e-25) and bits != 0):
        return
    step = largest / np.float32(_LARGEST)
    steps[token] = step
    sums[token] = np.float64(_quantize(values, k, codes, _inverse(step)))
    if k > 1 and (total - largest) / np.float32(k - 1) < np.float32(_FEWEST_STEPS) * step:
        rest_step = step * np.float32(0.51 / _LARGEST)
        steps[m + token] = rest_step
        sums[m + token] = np.float64(_quantize_rest(values, k, codes, step, codes + 2 * k * m, rest_step))


# ---------------------------------------------------------------- the codes of x: 8 bits, and 16 for outliers


@inline
def _raise_peaks(peaks, x, count):
    """peaks = max(peaks, bits of |x|), where x is a number."""
    source, target = at(np.int32, x), at(np.int32, peaks)
    for i in range(count):
        size = np.int32(source[i] & np.int32(0x7FFFFFFF))
        target[i] = max(target[i], size if size < np.int32(0x7F800000) else np.int32(0))


@by_chunks
def _peaks_pass(a, first, last, wide):
    count = last - first
    zero(a.peaks + 4 * first, count)
    for token in range(a.m):
        row = a.x + 4 * (token * a.k + first)
        if a.dtype != FLOAT32:
            row = wide
            widen_row(a.x + 2 * (token * a.k + first), count, row)
        _raise_peaks(a.peaks + 4 * first, row, count)


@inline
def _choose_columns(a):
    """The `FEW` columns with the largest peaks, in their order."""
    k, few, peaks, columns = a.k, a.few, at(np.int32, a.peaks), at(np.int64, a.columns)
    threshold = np.int32(0)  # the largest number that `few` peaks reach, found bit by bit
    for bit in range(30, -1, -1):
        higher = np.int32(threshold | np.int32(np.int32(1) << np.int32(bit)))
        reached = 0
        for i in range(k):
            reached += peaks[i] >= higher
        if reached >= few:
            threshold = higher
    ties = few
    for i in range(k):
        ties -= peaks[i] > threshold
    place = 0
    for i in range(k):
        if peaks[i] > threshold or (peaks[i] == threshold and ties > 0):
            ties -= peaks[i] == threshold
            columns[place] = i
            place += 1


@by_chunks
def _bytes_pass(a, token, _, scratch):
    """One step for all codes of a token: int8 ones but for the outlier columns, whose codes have 16 bits."""
    k, few = a.k, a.few
    values = widen(a, token)
    steps, sums = at(np.float32, a.steps), at(np.float64, a.sums)
    source, rest = at(np.float32, values), at(np.float32, scratch)
    columns, outliers = at(np.int64, a.columns), at(np.int16, a.int16_codes + 2 * few * token)
    for i in range(k):
        rest[i] = source[i]
    most = np.float32(0.0)
    for i in range(few):
        value = abs(source[columns[i]])
        most = value if value > most or value != value else most
        rest[columns[i]] = np.float32(0.0)
    bits, _ = _size(scratch, k)
    largest = same_bits(np.float32, bits)
    step = max(largest / np.float32(127.0), most / np.float32(_LARGEST))
    steps[token], steps[a.m + token] = np.float32(-1.0), np.float32(0.0)
    if most != most or not np.isfinite(step) or (step < np.float32(1e-27) and step > np.float32(0.0)):
        return
    if largest > np.float32(0.0) and step * np.float32(63.0) > largest:
        return  # outliers so large that the rest would be left with less than 7 bits
    steps[token] = step
    inverse, total = _inverse(step), np.int64(0)
    for i in range(few):
        code = np.int32(np.rint(source[columns[i]] * inverse))
        outliers[i] = np.int16(code)
        total += code
    sums[token] = np.float64(total + _quantize_bytes(scratch, k, a.byte_codes + k * token, inverse))


# ---------------------------------------------------------------- products


@inline
def _int16_dots(rows, tokens, w, x, k, sums):
    """sums[t, r] += w[r] . x[t], int8 by int16, `_LONGEST` products at a time."""
    for done in range(0, k, _LONGEST):
        operands = (w + done, k, x + 2 * done, 2 * k, min(_LONGEST, k - done))
        _add_int16(rows, tokens, operands, NOTHING, sums)


@inline
def _tile_dots(a, rows, tokens, row, token, chunk, sums):
    """sums[t, r] = w[row + r] . x[token + t] by the codes of x; `chunk` is what `_gather` made of the rows' chunk."""
    k, few, w = a.k, a.few, a.weight + a.k * row
    if few == 0:
        zero(sums, rows * tokens)
        _int16_dots(rows, tokens, w, a.int16_codes + 2 * k * token, k, sums)
        return
    first, offsets, few_weights = chunk
    target, source = at(np.float32, sums), at(np.float32, offsets + 4 * (row - first))
    for t in range(tokens):
        for r in range(rows):
            target[t * rows + r] = source[r]
    few_w, few_x = few_weights + few * (row - first), a.int16_codes + 2 * few * token
    more = (few_w, few, few_x, 2 * few, few // _FEW_WIDE)
    _add_bytes(rows, tokens, (w, k, a.byte_codes + k * token, k, k), more, sums)


@inline
def _gather(a, first, last, offsets, few_weights):
    """The outlier columns of some rows of the weight; and what the 128 added to the codes of x make of each row."""
    k, few, columns = a.k, a.few, at(np.int64, a.columns)
    zero(offsets, last - first)
    for row in range(first, last):
        w = a.weight + k * row
        codes, target = at(np.int8, w), at(np.int8, few_weights + few * (row - first))
        for i in range(few):
            target[i] = codes[columns[i]]
        offset = offsets + 4 * (row - first)
        _add_bytes(1, 1, (w, k, a.byte_codes + k * a.m, k, k), NOTHING, offset)
        at(np.float32, offset)[0] *= np.float32(-128.0)


@inline
def _tell_rows(a, first, last, rows):
    """Scale, zero-point and bias of some rows of the weight as float64 [3, chunk], for `_finish`."""
    told, chunk = at(np.float64, rows), a.chunk
    for row in range(first, last):
        place = row - first
        told[place] = np.float64(at(np.float32, a.scale)[row])
        told[chunk + place] = 0.0 if a.zero_point == 0 else np.float64(at(np.int8, a.zero_point)[row])
        told[2 * chunk + place] = 0.0 if a.bias == 0 else np.float64(read_bias(a, row))


@inline
def _special_dots(a, row, rows, t, sums, told, extra):
    """The dots of a token that has a second plane, or no codes at all, without the zero-points; their step."""
    k, m = a.k, a.m
    steps, totals, dots = at(np.float32, a.steps), at(np.float64, a.sums), at(np.float32, sums)
    step = np.float64(steps[t]) if steps[t] >= np.float32(0.0) else 1.0
    for r in range(rows):
        w, zero_point = a.weight + k * (row + r), at(np.float64, told)[a.chunk + r]
        if steps[t] < np.float32(0.0):
            dots[r] = np.float32(plain_dot(w, a.floats + 4 * k * t, k, zero_point))
        else:
            zero(extra, 1)
            _int16_dots(1, 1, w, a.int16_codes + 2 * k * (m + t), k, extra)
            left = np.float64(at(np.float32, extra)[0]) - zero_point * totals[m + t]
            total = np.float64(dots[r]) - zero_point * totals[t]
            dots[r] = np.float32(total + left * (np.float64(steps[m + t]) / step))
    return step


@inline
def _finish(a, row, rows, token, tokens, sums, told):
    """Scale, add the bias, write: y of `ROWS` rows or fewer, and of some tokens."""
    steps, totals = at(np.float32, a.steps), at(np.float64, a.sums)
    for t in range(token, token + tokens):
        dots, step, total = sums + 4 * ROWS * (t - token), np.float64(steps[t]), totals[t]
        if steps[t] < np.float32(0.0) or steps[a.m + t] != np.float32(0.0):
            step, total = _special_dots(a, row, rows, t, dots, told, sums + 4 * ROWS * TOKENS), 0.0
        place = t * a.n + row
        if a.dtype == FLOAT32 and rows == ROWS:
            scale_dots(dots, told, 8 * a.chunk, total, step, a.out + 4 * place)
        else:
            scale_dots(dots, told, 8 * a.chunk, total, step, dots)
            for r in range(rows):
                write(a, place + r, at(np.float32, dots)[r])


@passes
def _products(a):
    n, k, m, chunk = a.n, a.k, a.m, a.chunk
    told = own_slice(a)  # divided as `linear_integers` says
    offsets = told + 8 * 3 * chunk
    sums = offsets + 4 * chunk
    few_weights = sums + 4 * (ROWS * TOKENS + 1)
    following = next_chunk(a)
    while following < n:
        first, following = following, next_chunk(a)
        last = min(first + chunk, n)
        whole = first + (last - first) // ROWS * ROWS
        # a share of the next chunk is fetched from memory beside each tile of x
        wanted, wanted_end = a.weight + k * following, a.weight + k * min(following + chunk, n)
        share = (k * chunk * TOKENS // m + 63) // 64 * 64
        _tell_rows(a, first, last, told)
        if a.few != 0:
            _gather(a, first, last, offsets, few_weights)
        gathered = (first, offsets, few_weights)
        token = 0
        while token < m:  # a tile's rows of x stay in the nearest cache while the chunk passes by
            tokens = TOKENS if m - token >= TOKENS else 2 if m - token >= 2 else 1
            for line in range(wanted, min(wanted + share, wanted_end), 64):
                prefetch(line)
            wanted += share
            for row in range(first, whole, ROWS):
                _tile_dots(a, ROWS, tokens, row, token, gathered, sums)
                _finish(a, row, ROWS, token, tokens, sums, told + 8 * (row - first))
            if whole < last:
                for t in range(tokens):
                    for row in range(whole, last):
                        place = sums + 4 * (ROWS * t + row - whole)
                        _tile_dots(a, 1, 1, row, token + t, gathered, place)
                _finish(a, whole, last - whole, token, tokens, sums, told + 8 * (whole - first))
            token += tokens


@entry
def linear_integers(address, room, given):
    a = begin(address, room, given)
    k, m, few = a.k, a.m, a.few
    if a.n * k * m < LITTLE:
        a.threads = 1
    several = a.threads if m * k > LITTLE else 1
    chunk = rows_in_chunk(a, k)
    # of `_tell_rows`, of float32 offsets and sums and one sum more, and of the outlier columns of a chunk
    slice_bytes = 8 * 3 * chunk + 4 * (chunk + ROWS * TOKENS + 1) + few * chunk
    int16_codes, columns, byte_codes, peaks = 2 * 2 * m * k, 0, 0, 0
    if few != 0:
        slice_bytes = max(slice_bytes, 4 * k, 4 * _PEAK_COLUMNS)
        int16_codes, columns, byte_codes, peaks = 2 * m * few, 8 * few, (m + 1) * k, 4 * k
    sizes = (x_bytes(a), 8 * 2 * m, 4 * 2 * m, int16_codes, columns, byte_codes, peaks)
    missing = lay_out(a, slice_bytes, sizes)
    if missing != 0:
        return missing
    if few == 0:
        _int16_pass(a, several, m, 1)
    else:
        _peaks_pass(a, several, k, _PEAK_COLUMNS)
        _choose_columns(a)
        ones = at(np.uint8, a.byte_codes + m * k)
        for i in range(k):
            ones[i] = np.uint8(1)
        _bytes_pass(a, several, m, 1)
    _products(a, a.threads, a.n, chunk)
    return 0
