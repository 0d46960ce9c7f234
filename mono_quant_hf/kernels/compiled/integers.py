"""int8 codes by the tokens' values as codes of their own, with a scale for each token; products are summed in integers.

The codes of a token are planes, each of which is a row to multiply by, with a step of its own: one of int16, or two of
int8, the second for what the first leaves; and as many more where its values are so far apart that a typical one would
keep too few bits. So a token's result depends on itself alone.
"""

import numpy as np

from .floats import plain_dot
from .instructions import at, inline, inline_always, inline_first, inline_summing, named, prefetch, same_bits
from .panels import PANEL_ROWS, PANEL_TOKENS, PANELS, UNIT, fill, multiply
from .tiles import BYTE_UNITS, BYTES, INT16, LANES, ROWS, TOKENS, dots, scale_dots, to_floats
from .workspace import (
    FLOAT32,
    LITTLE,
    Entry,
    begin,
    by_chunks,
    finish,
    lay_out,
    next_chunk,
    own_slice,
    passes,
    read_bias,
    rows_in_chunk,
    widen,
    write,
    x_bytes,
    zero,
)

# |codes of x| <= 32767 and |codes of w| <= 128, so 511 products fit one int32; lanes are added as floats.
_LARGEST = 32767
_LONGEST = 510 * LANES
LONGEST_OF_BYTES = 65_000  # the same for codes of x in 8 bits: so many products of 255 * 128 fit one int32
# Without VNNI the products of two codes are summed in int16, which holds those of int8 by 7 bits.
_LARGEST_BYTE = 127 if BYTE_UNITS else 63
_BASE = _LARGEST_BYTE + 1  # added to codes of int8, so that they are unsigned; and what a first plane counts
_SHIFT = 8 if BYTE_UNITS else 7
_LARGEST_OF_TWO = _LARGEST_BYTE * 2 * _BASE + _LARGEST_BYTE
# A typical entry of x under this many steps of its token's scale would lose accuracy (60 dB for a result made
# of typical entries alone, as 20 log10(256 * sqrt(12 * pi / 2))): such a token gets more planes of codes.
_FEWEST_STEPS = 256.0
_FEWEST_STEPS_OF_8_BITS = 5.0  # SmolLM2: 0.3 % of its perplexity, two planes for a quarter of its products
_REST = 0.51  # of a step: what is left of a value that was rounded to it, and a little more

BYTE_PRODUCTS = BYTE_UNITS  # without them two planes, which most tokens need, cost more than one of int16

_add_int16 = inline(dots(INT16))
_add_bytes = inline_always(dots(BYTES))  # a call with so many numbers costs as much as a short product

_FEWEST_TOKENS = 9  # for which a panel is repaid
_MOST_UNITS = (
    256  # of int16: 512 products of 128 * 32767 fit one int32; and a tile's x stays in the nearest cache
)
_fill_int16, _fill_bytes = inline(fill(2)), inline(fill(4))
_multiply_int16, _multiply_bytes = multiply(2), multiply(4)


# ---------------------------------------------------------------- the planes of x


def _rounding(integer, offset):
    @inline
    @named(_rounding, integer)
    def quantize(values, k, codes, inverse):
        """codes = round(values * inverse) + offset; the sum of the codes without the offset."""
        source, target = at(np.float32, values), at(integer, codes)
        total = np.int64(0)
        for i in range(k):
            code = np.int32(np.rint(source[i] * inverse))
            target[i] = integer(code + np.int32(offset))
            total += code
        return total

    return quantize


_quantize_int16 = _rounding(np.int16, 0)
_quantize_byte = _rounding(np.uint8, _BASE)


@inline
def _quantize_bytes(values, k, codes, stride, inverse):
    """2 * _BASE * high + low = round(values * inverse): two planes, and the sums of each."""
    source, high, low = at(np.float32, values), at(np.uint8, codes), at(np.uint8, codes + stride)
    highs, lows = np.int32(0), np.int32(0)
    for i in range(k):
        code = np.int32(np.rint(source[i] * inverse))
        first = (code + np.int32(_BASE)) >> np.int32(_SHIFT)
        second = code - (first << np.int32(_SHIFT))
        high[i], low[i] = np.uint8(first + np.int32(_BASE)), np.uint8(second + np.int32(_BASE))
        highs += first
        lows += second
    return np.int64(highs), np.int64(lows)


@inline
def _leave(values, k, step, rest):
    """rest = values - round(values / step) * step, exactly enough: in float64."""
    source, target = at(np.float32, values), at(np.float32, rest)
    inverse = _inverse(step)
    for i in range(k):
        code = np.float64(np.rint(source[i] * inverse))
        target[i] = np.float32(np.float64(source[i]) - code * np.float64(step))


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


def _each_token(body):
    body = inline_first(body)

    @named(_each_token, body)
    def tokens(a, first, last, own):
        for token in range(first, last):
            body(a, token, own)

    return by_chunks(tokens)


@_each_token
def _count_pass(a, token, own):
    """How many planes a token has; 0 where it has no codes: NaN, infinite or tiny values."""
    k = a.k
    planes = at(np.int64, a.planes)
    bits, total = _size(widen(a, token), k)
    largest = same_bits(np.float32, bits)
    at(np.float32, a.largest)[token] = largest
    planes[token] = 0
    if bits >= 0x7F800000 or (largest < np.float32(1e-25) and bits != 0):
        return
    typical = (total - largest) / np.float32(max(k - 1, 1))
    spread = k > 1 and typical < np.float32(_FEWEST_STEPS / _LARGEST) * largest
    if a.byte_planes == 0:
        planes[token] = 2 if spread else 1
    elif typical >= np.float32(_FEWEST_STEPS_OF_8_BITS / _LARGEST_BYTE) * largest:
        planes[token] = 1
    else:
        planes[token] = 2 if not spread else 4 if TOKENS == 4 else 0  # no tile holds four


@inline_first
def _place_planes(a):
    """The first plane of each token, those of many planes first, so that no tile holds a part of a token."""
    planes, starts = at(np.int64, a.planes), at(np.int64, a.starts)
    place = 0
    for step in range(3):
        count = 4 >> step
        for token in range(a.m):
            if planes[token] == count:
                starts[token] = place
                place += count
    a.rows = place
    a.without_codes = 0
    for token in range(a.m):
        a.without_codes += planes[token] == 0


@_each_token
def _codes_pass(a, token, rest):
    """The planes of a token, their steps and the sums of their codes; both then in steps of the first."""
    k, place = a.k, at(np.int64, a.starts)[token]
    values, largest = a.floats + 4 * k * token, at(np.float32, a.largest)[token]
    steps, sums, count = at(np.float64, a.steps), at(np.float64, a.sums), at(np.int64, a.planes)[token]
    if count == 0:
        return
    at(np.int64, a.tokens)[place] = token
    in_pairs = a.byte_planes != 0 and count > 1
    done = 0
    while done < count:
        plane = place + done
        codes = a.codes + a.stride * plane
        if in_pairs:
            step = largest / np.float32(_LARGEST_OF_TWO)
            high, low = _quantize_bytes(values, k, codes, a.stride, _inverse(step))
            steps[plane], steps[plane + 1] = 2.0 * _BASE * np.float64(step), np.float64(step)
            sums[plane], sums[plane + 1] = np.float64(high), np.float64(low)
            done += 2
        elif a.byte_planes != 0:
            step = largest / np.float32(_LARGEST_BYTE)
            steps[plane] = np.float64(step)
            sums[plane] = np.float64(_quantize_byte(values, k, codes, _inverse(step)))
            done += 1
        else:
            step = largest / np.float32(_LARGEST)
            steps[plane] = np.float64(step)
            sums[plane] = np.float64(_quantize_int16(values, k, codes, _inverse(step)))
            done += 1
        if done < count:
            _leave(values, k, step, rest)
            values, largest = rest, step * np.float32(_REST)
    first_step = steps[place] if steps[place] != 0.0 else 1.0
    total = 0.0
    for plane in range(place, place + count):
        for i in range(k if a.byte_planes != 0 else 2 * k, a.stride):
            at(np.uint8, a.codes + a.stride * plane)[i] = np.uint8(0)
        steps[plane] /= first_step
        total += sums[plane] * steps[plane]
    steps[place], sums[place] = first_step, total


# ---------------------------------------------------------------- products


@inline
def _tile_dots(a, rows, planes, row, plane, offsets, sums):
    """sums[p, r] = w[row + r] . codes of plane + p, exact where they are int8; `offsets` belong to the rows."""
    k, w = a.k, a.weight + a.k * row
    _begin_sums(a, rows, planes, offsets, sums)
    codes = a.codes + a.stride * plane
    if a.byte_planes != 0:
        _add_bytes(rows, planes, (w, k, codes, a.stride, k), sums)
        return
    for done in range(0, k, _LONGEST):  # int8 by int16, `_LONGEST` products at a time
        operands = (w + done, k, codes + 2 * done, a.stride, min(_LONGEST, k - done))
        _add_int16(rows, planes, operands, sums)


@inline
def _begin_sums(a, rows, planes, offsets, sums):
    if a.byte_planes == 0:
        zero(sums, rows * planes)
        return
    target, source = at(np.int32, sums), at(np.int32, offsets)
    for p in range(planes):
        for r in range(rows):
            target[p * rows + r] = source[r]


@inline_first
def _tell_rows(a, first, last, told):
    """Scale, zero-point and bias of some rows of the weight as float64 [3, chunk], for `_finish`; then what the
    `_BASE` added to int8 codes of x makes of each row.
    """
    values, chunk = at(np.float64, told), a.chunk
    offsets = told + 8 * 3 * chunk
    for row in range(first, last):
        place = row - first
        values[place] = np.float64(at(np.float32, a.scale)[row])
        values[chunk + place] = 0.0 if a.zero_point == 0 else np.float64(at(np.int8, a.zero_point)[row])
        values[2 * chunk + place] = 0.0 if a.bias == 0 else np.float64(read_bias(a, row))
        if a.byte_planes != 0:
            offset = at(np.int32, offsets + 4 * place)
            offset[0] = 0
            ones = (a.weight + a.k * row, a.k, a.codes + a.stride * a.rows, a.k, a.k)
            _add_bytes(1, 1, ones, offsets + 4 * place)
            offset[0] *= np.int32(-_BASE)


@inline
def _finish(a, row, rows, wide, plane, planes, sums, told):
    """Scale, add the bias, write: y of so many rows, and of the tokens of some planes. `sums` are [planes, wide], of
    which this many are `rows`.
    """
    steps, totals, counts = at(np.float64, a.steps), at(np.float64, a.sums), at(np.int64, a.planes)
    whole = rows // ROWS * ROWS
    p = plane
    while p < plane + planes:
        token = at(np.int64, a.tokens)[p]
        count, step, total = counts[token], steps[p], totals[p]
        dots = sums + 4 * wide * (p - plane)
        if a.byte_planes != 0:
            for i in range(0, count * wide, ROWS):
                to_floats(dots + 4 * i)
        own = at(np.float32, dots)
        for i in range(1, count):
            for r in range(rows):
                own[r] += np.float32(np.float64(own[wide * i + r]) * steps[p + i])
        place = token * a.n + row
        in_place = a.dtype == FLOAT32
        for r in range(0, rows, ROWS):
            direct = in_place and r < whole
            target = a.out + 4 * (place + r) if direct else dots + 4 * r
            scale_dots(dots + 4 * r, told + 8 * r, 8 * a.chunk, total, step, target)
        for r in range(whole if in_place else 0, rows):
            write(a, place + r, own[r])
        p += count


@inline_first
def _without_codes(a, first, last):
    """Tokens that have none, in floats."""
    k, counts = a.k, at(np.int64, a.planes)
    for token in range(a.m):
        if counts[token] == 0:
            for row in range(first, last):
                zero_point = 0.0 if a.zero_point == 0 else np.float64(at(np.int8, a.zero_point)[row])
                finish(a, row, token, plain_dot(a.weight + k * row, a.floats + 4 * k * token, k, zero_point))


@passes
def _products(a):
    n, k, m, chunk = a.n, a.k, a.rows, a.chunk
    told = own_slice(a)  # divided as `linear_integers` says
    offsets = told + 8 * 3 * chunk
    sums = offsets + 4 * chunk
    tokens = PANEL_TOKENS if a.panels != 0 else TOKENS
    following = next_chunk(a)
    while following < n:
        first, following = following, next_chunk(a)
        last = min(first + chunk, n)
        # a share of the next chunk is fetched from memory beside each tile of x
        wanted, wanted_end = a.weight + k * following, a.weight + k * min(following + chunk, n)
        share = (k * chunk * tokens // max(m, 1) + 63) // 64 * 64
        _tell_rows(a, first, last, told)
        if a.without_codes != 0:
            _without_codes(a, first, last)
        if a.panels != 0:
            _fill_panels(a, first, last, sums + 4 * chunk * PANEL_TOKENS)
        plane = np.int64(0)
        while plane < m:  # a tile's rows of x stay in the nearest cache while the chunk passes by
            for line in range(wanted, min(wanted + share, wanted_end), 64):
                prefetch(line)
            wanted += share
            if a.panels != 0:
                planes = min(PANEL_TOKENS, m - plane)
                _by_panels(a, first, last, plane, planes, offsets, sums, told)
            else:
                planes = TOKENS if m - plane >= TOKENS else 2 if m - plane >= 2 else 1
                _by_dots(a, first, last, plane, planes, offsets, sums, told)
            plane += planes


@inline_first
def _by_dots(a, first, last, plane, planes, offsets, sums, told):
    whole = first + (last - first) // ROWS * ROWS
    for row in range(first, whole, ROWS):
        _tile_dots(a, np.int64(ROWS), planes, row, plane, offsets + 4 * (row - first), sums)
        _finish(a, row, np.int64(ROWS), np.int64(ROWS), plane, planes, sums, told + 8 * (row - first))
    if whole < last:
        for p in range(planes):
            for row in range(whole, last):
                place = sums + 4 * (ROWS * p + row - whole)
                _tile_dots(a, np.int64(1), np.int64(1), row, plane + p, offsets + 4 * (row - first), place)
        _finish(a, whole, last - whole, np.int64(ROWS), plane, planes, sums, told + 8 * (whole - first))


@inline_first
def _fill_panels(a, first, last, panel):
    for row in range(first, last, PANEL_ROWS):
        rows = min(PANEL_ROWS, last - row)
        if a.byte_planes != 0:
            _fill_bytes(a.weight + a.k * row, a.k, rows, panel)
        else:
            _fill_int16(a.weight + a.k * row, a.k, rows, panel)
        panel += PANEL_ROWS * a.stride


@inline_first
def _by_panels(a, first, last, plane, planes, offsets, sums, told):
    """The same from the panels that stand after `sums`, [panels, tokens, rows of a panel]."""
    each = PANEL_TOKENS * PANEL_ROWS
    filled = sums + 4 * a.chunk * PANEL_TOKENS
    count = (last - first + PANEL_ROWS - 1) // PANEL_ROWS
    for i in range(count):
        _begin_sums(a, PANEL_ROWS, PANEL_TOKENS, offsets + 4 * PANEL_ROWS * i, sums + 4 * each * i)
    units = a.stride // UNIT
    for done in range(0, units, _MOST_UNITS):
        some = min(_MOST_UNITS, units - done)
        codes = a.codes + a.stride * plane + UNIT * done
        for i in range(count):
            panel = filled + PANEL_ROWS * (a.stride * i + UNIT * done)
            if a.byte_planes != 0:
                _multiply_bytes(panel, codes, a.stride, some, sums + 4 * each * i)
            else:
                _multiply_int16(panel, codes, a.stride, some, sums + 4 * each * i)
    for i in range(count):
        row = first + PANEL_ROWS * i
        rows = min(PANEL_ROWS, last - row)
        _finish(
            a, row, rows, np.int64(PANEL_ROWS), plane, planes, sums + 4 * each * i, told + 8 * PANEL_ROWS * i
        )


@Entry
def linear_integers(address, room, given):
    a = begin(address, room, given)
    k, m = a.k, a.m
    if a.n * k * m < LITTLE:
        a.threads = 1
    several = a.threads if m * k > LITTLE else 1
    code = 1 if a.byte_planes != 0 else 2
    a.stride = (code * k + UNIT - 1) // UNIT * UNIT
    a.panels = PANELS and m >= _FEWEST_TOKENS and a.n >= PANEL_ROWS
    # of `_tell_rows`, and the sums of a tile or of a chunk's panels, which follow; or the rest of a token's values
    if a.panels != 0:
        chunk = rows_in_chunk(a, a.stride, PANEL_ROWS)
        slice_bytes = chunk * (8 * 3 + 4 + 4 * PANEL_TOKENS + a.stride)
    else:
        chunk = rows_in_chunk(a, k, ROWS)
        slice_bytes = 8 * 3 * chunk + 4 * (chunk + ROWS * TOKENS)
    most = 2 if a.byte_planes == 0 else min(TOKENS, 4)
    planes = most * m + PANEL_TOKENS  # of which a last tile reads some that are of no token; one is of ones
    sizes = (x_bytes(a), 8 * most * m, 8 * most * m, a.stride * planes, 4 * m, 8 * m, 8 * m, 8 * most * m)
    missing = lay_out(a, max(slice_bytes, 4 * k), sizes)
    if missing != 0:
        return missing
    some = min(m // (4 * several) + 1, 16)
    _count_pass(a, several, m, some)
    _place_planes(a)
    _codes_pass(a, several, m, some)
    if a.byte_planes != 0:
        ones = at(np.uint8, a.codes + a.stride * a.rows)
        for i in range(k):
            ones[i] = np.uint8(1)
    _products(a, a.threads, a.n, chunk)
    return 0
