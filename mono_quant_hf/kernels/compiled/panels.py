"""Products of many tokens: rows of the weight are turned into a panel, whose lanes are rows, so that no sum runs across
a vector.

A panel holds `PANEL_ROWS` rows as [K / unit, PANEL_ROWS, unit]: a unit is four bytes, two codes as int16 or four as
int8. Codes of x stand in the same units, token by token, with zeros after the last.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .instructions import FLOAT, I8, I16, I32, I64, at, instruction, named
from .tiles import BYTE_UNITS, LANES, VECTOR_BYTES, X86, call_vector

PANELS = X86 and VECTOR_BYTES == 32  # where they are measured to gain
PANEL_ROWS = 2 * LANES
PANEL_TOKENS = (
    6 if VECTOR_BYTES == 32 else 12
)  # of the registers 2 are for each token, 2 for the weight, 2 for x and a product
UNIT = 4
_INTS, _SHORTS, _BYTES = (ir.VectorType(*kind) for kind in ((I32, LANES), (I16, 2 * LANES), (I8, 4 * LANES)))


def _load(builder, address, kind):
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = UNIT
    return value


def _store(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def _after(builder, address, count):
    return builder.add(address, ir.Constant(I64, count))


def _pick(builder, a, b, places):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(places)), places))


def _turned(builder, rows):
    """The columns of `LANES` vectors of as many int32: first within each 128 bits of four vectors, then those."""
    columns = [[None] * (LANES // 4) for _ in range(LANES)]
    for group in range(0, LANES, 4):
        a, b, c, d = rows[group : group + 4]
        for half in (0, 1):
            pairs = [
                _pick(builder, *two, _in_turns(1, half)) for two in ((a, b), (c, d))
            ]  # of a and b, of c and d: the columns 2 * half and 2 * half + 1
            for side in (0, 1):
                four = _pick(builder, *pairs, _in_turns(2, side))
                for quarter in range(LANES // 4):
                    own = range(4 * quarter, 4 * quarter + 4)
                    column = 4 * quarter + 2 * half + side
                    columns[column][group // 4] = _pick(builder, four, four, list(own))
    return [_joined(builder, parts) for parts in columns]


def _in_turns(count, half):
    """Places of `count` numbers of a vector and of another in turns, from one half of each 128 bits."""
    places = []
    for first in range(2 * half, LANES, 4):
        for place in range(first, first + 2, count):
            for vector in (0, LANES):
                places += range(vector + place, vector + place + count)
    return places


def _joined(builder, parts):
    while len(parts) > 1:
        both = list(range(2 * parts[0].type.count))
        parts = [_pick(builder, *parts[i : i + 2], both) for i in range(0, len(parts), 2)]
    return parts[0]


def fill(in_a_unit):
    """The function `fill(w, k, rows, panel)`: the panel of `rows` rows of k int8 without gaps, zeros for what lacks."""
    code, block = np.int16 if in_a_unit == 2 else np.int8, LANES * in_a_unit

    @instruction(types.void, *[types.int64] * 3)
    def turn(context, builder, w, k, panel):
        """`LANES` units of `PANEL_ROWS` whole rows."""
        codes = ir.VectorType(I8, block)
        for first in range(0, PANEL_ROWS, LANES):
            rows = []
            for row in range(first, first + LANES):
                address = builder.add(w, builder.mul(k, ir.Constant(I64, row)))
                value = builder.load(builder.inttoptr(address, codes.as_pointer()))
                value.align = 1
                if in_a_unit == 2:
                    value = builder.sext(value, ir.VectorType(I16, block))
                rows.append(builder.bitcast(value, _INTS))
            for unit, column in enumerate(_turned(builder, rows)):
                _store(builder, column, _after(builder, panel, UNIT * (PANEL_ROWS * unit + first)))

    @named(fill, in_a_unit)
    def fill_panel(w, k, rows, panel):
        whole = k // block * block if rows == PANEL_ROWS else 0
        for done in range(0, whole, block):
            turn(w + done, k, panel + UNIT // in_a_unit * PANEL_ROWS * done)
        source, target = at(np.int8, w), at(code, panel)
        for column in range(whole, -(-k // in_a_unit) * in_a_unit):
            place = column // in_a_unit * in_a_unit * PANEL_ROWS + column % in_a_unit
            for row in range(PANEL_ROWS):
                there = row < rows and column < k
                target[place + in_a_unit * row] = code(source[k * row + column]) if there else code(0)

    return fill_panel


def multiply(in_a_unit):
    """The function `(panel, x, x_stride, units, sums)`: sums[t, r] += panel row r . x row t for `PANEL_TOKENS` rows of
    x, of int16 to float32, of uint8 to int32. int32 must hold what is summed.
    """
    exact = in_a_unit == 4

    def accumulate(builder, total, codes, x):
        if exact and BYTE_UNITS:
            return call_vector(builder, "llvm.x86.avx512.vpdpbusd.256", _INTS, total, x, codes)
        if exact:  # pairs fit int16, see `_LARGEST_BYTE`
            pairs = [builder.bitcast(operand, _BYTES) for operand in (x, codes)]
            codes = call_vector(builder, "llvm.x86.avx2.pmadd.ub.sw", _SHORTS, *pairs)
            x = ir.Constant(_SHORTS, [1] * 2 * LANES)
        pairs = [builder.bitcast(operand, _SHORTS) for operand in (codes, x)]
        return builder.add(total, call_vector(builder, "llvm.x86.avx2.pmadd.wd", _INTS, *pairs))

    @instruction(types.void, *[types.int64] * 5)
    def tile(context, builder, panel, x, x_stride, units, sums):
        if not PANELS:
            return  # nothing calls it, and the processor has other instructions
        halves = range(0, PANEL_ROWS, LANES)
        zero = ir.Constant(_INTS, None)
        totals = [[cgutils.alloca_once_value(builder, zero) for _ in halves] for _ in range(PANEL_TOKENS)]
        tokens = [builder.add(x, builder.mul(x_stride, ir.Constant(I64, t))) for t in range(PANEL_TOKENS)]
        with cgutils.for_range(builder, units) as loop:
            place = builder.mul(loop.index, ir.Constant(I64, UNIT))
            step = builder.add(panel, builder.mul(loop.index, ir.Constant(I64, UNIT * PANEL_ROWS)))
            rows = [_load(builder, _after(builder, step, UNIT * first), _INTS) for first in halves]
            for token, of_token in zip(tokens, totals, strict=True):
                value = _everywhere(builder, builder.add(token, place))
                for codes, total in zip(rows, of_token, strict=True):
                    builder.store(accumulate(builder, builder.load(total), codes, value), total)
        for token, of_token in enumerate(totals):
            for first, total in zip(halves, of_token, strict=True):
                where = _after(builder, sums, UNIT * (PANEL_ROWS * token + first))
                value, add = builder.load(total), builder.add
                if not exact:
                    value, add = builder.sitofp(value, ir.VectorType(FLOAT, LANES)), builder.fadd
                _store(builder, add(_load(builder, where, value.type), value), where)

    return tile


def _everywhere(builder, address):
    """The unit at an address, in all lanes."""
    unit = builder.load(builder.inttoptr(address, I32.as_pointer()))
    unit.align = UNIT
    one = builder.insert_element(ir.Constant(_INTS, ir.Undefined), unit, ir.Constant(I32, 0))
    return _pick(builder, one, one, [0] * LANES)
