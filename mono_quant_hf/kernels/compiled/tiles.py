"""Dot products of some rows of the weight with some rows of x, all kept in the vector registers of this processor.

Written in LLVM, since no loop that Numba accepts becomes `vpmaddwd` reliably.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

from .instructions import DOUBLE, FLOAT, HALF_FLOAT, I8, I16, I32, I64, instruction, named

_TRIPLE, _CPU, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
_HAS = set(_FEATURES.split(","))  # what Numba compiles for, which its settings can make less than the host
X86 = _TRIPLE.startswith(("x86_64", "i686"))
VECTOR_BYTES = 64 if "+avx512bw" in _HAS else 32 if "+avx2" in _HAS else 16
HALF = "+f16c" in _HAS or _TRIPLE.startswith(("aarch64", "arm64"))  # float16 to float32 in hardware
# int8 by uint8 products are summed in fours (VNNI)
BYTE_UNITS = (VECTOR_BYTES == 64 and "+avx512vnni" in _HAS) or (VECTOR_BYTES == 32 and "+avxvnni" in _HAS)
INTEGER_UNITS = X86 and VECTOR_BYTES >= 32  # int16 products are summed in pairs, and outrun float32 ones
STREAMS_FLOATS = not X86 or VECTOR_BYTES != 32  # codes become floats as fast as memory delivers them
LANES = VECTOR_BYTES // 4
ROWS = 4
TOKENS = 4 if VECTOR_BYTES == 64 or not X86 else 2  # 4 x 4 accumulators need 32 registers, 4 x 2 need 16


class Kind(NamedTuple):
    """What is multiplied: items of the weight by those of x. Integers are summed in int32, which the caller heeds."""

    w: ir.Type
    x: ir.Type
    w_bytes: int
    x_bytes: int
    in_a_lane: int = 1
    """How many products one instruction sums in each lane."""

    @property
    def wide(self) -> int:
        """How many products one step of a tile takes."""
        return LANES * self.in_a_lane


INT16 = Kind(I8, I16, 1, 2, 2 if X86 else 1)
BYTES = Kind(I8, I8, 1, 1, 4 if BYTE_UNITS else INT16.in_a_lane)  # of x: unsigned
CODES = Kind(I8, FLOAT, 1, 4)
HALVES = Kind(HALF_FLOAT, FLOAT, 2, 4)

_MULTIPLY_ADD = {  # by the products that are summed in a lane, and the lanes
    (2, 16): "llvm.x86.avx512.pmaddw.d.512",
    (2, 8): "llvm.x86.avx2.pmadd.wd",
    (2, 4): "llvm.x86.sse2.pmadd.wd",
    (4, 16): "llvm.x86.avx512.vpdpbusd.512",
    (4, 8): "llvm.x86.avx512.vpdpbusd.256",
}
_OPERANDS = types.UniTuple(types.int64, 5)


def _load(builder, address, kind, align):
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _store(builder, value, address, align):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def call_vector(builder, name, returns, *operands):
    """An instruction of the processor that LLVM knows by this name."""
    function = ir.FunctionType(returns, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), operands)


def _add_products(builder, kind, lanes, sums, operands):
    """sums[t][r] += products of row r of the weight by row t of x, a vector of `lanes`; see `_tile`."""
    together = kind.in_a_lane if lanes > 1 else 1
    width, integer = lanes * together, kind.x != FLOAT
    sum_type = ir.VectorType(I32 if integer else FLOAT, lanes)
    w, w_stride, x, x_stride, steps = cgutils.unpack_tuple(builder, operands, 5)

    def rows_of(first, stride, count):
        return [builder.add(first, builder.mul(stride, ir.Constant(I64, i))) for i in range(count)]

    def vector(row, step, item, size, extend):
        address = builder.add(row, builder.mul(step, ir.Constant(I64, width * size)))
        value = _load(builder, address, ir.VectorType(item, width), size)
        if together == 4:
            return builder.bitcast(value, sum_type)
        if integer:
            return extend(value, ir.VectorType(I16 if together == 2 else I32, width))
        if item == FLOAT:
            return value
        return (builder.fpext if item == HALF_FLOAT else builder.sitofp)(value, sum_type)

    def accumulate(total, a, b):
        if together > 1:
            operands = [total, b, a] if together == 4 else [a, b]
            product = call_vector(builder, _MULTIPLY_ADD[together, lanes], sum_type, *operands)
            return product if together == 4 else builder.add(total, product)
        if integer:
            return builder.add(total, builder.mul(a, b))
        return builder.fadd(total, builder.fmul(a, b, flags=["contract"]), flags=["contract"])

    w_rows, x_rows = rows_of(w, w_stride, len(sums[0])), rows_of(x, x_stride, len(sums))
    with cgutils.for_range(builder, steps) as loop:
        w_values = [vector(row, loop.index, kind.w, kind.w_bytes, builder.sext) for row in w_rows]
        for x_row, of_token in zip(x_rows, sums, strict=True):
            extend = builder.zext if kind.x == I8 else builder.sext
            x_value = vector(x_row, loop.index, kind.x, kind.x_bytes, extend)
            for w_value, total in zip(w_values, of_token, strict=True):
                builder.store(accumulate(builder.load(total), w_value, x_value), total)


def _across(builder, vectors, add):
    """One vector with the sum of each of `vectors`: a power of two of them, and no more than each has lanes."""
    count, lanes = len(vectors), vectors[0].type.count

    def neighbours(a, b):
        index = ir.VectorType(I32, lanes)
        even, odd = (
            builder.shuffle_vector(a, b, ir.Constant(index, list(range(first, 2 * lanes, 2))))
            for first in (0, 1)
        )
        return add(even, odd)

    while len(vectors) > 1:
        vectors = [neighbours(*vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    total = vectors[0]
    while lanes > count:
        lanes //= 2
        total = neighbours(total, total)
    return total


def _tile(kind, rows, tokens, lanes):
    """out[t, r] += sum over k of w[r, k] * x[t, k], `out` of int32 where both have 8 bits, else of float32.

    Operands are the addresses and the strides, in bytes, of w and of x, and how many vectors of `lanes` are taken: (w,
    w_stride, x, x_stride, steps).
    """
    integer, exact = kind.x != FLOAT, kind is BYTES

    @instruction(types.void, _OPERANDS, types.int64)
    def tile(context, builder, operands, out):
        zero = ir.Constant(ir.VectorType(I32 if integer else FLOAT, lanes), None)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(rows)] for _ in range(tokens)]
        _add_products(builder, kind, lanes, sums, operands)
        flat = [builder.load(total) for of_token in sums for total in of_token]
        if integer and not exact:
            flat = [builder.sitofp(total, ir.VectorType(FLOAT, lanes)) for total in flat]
        add = builder.add if exact else builder.fadd
        for i in range(0, len(flat), lanes):
            totals = _across(builder, flat[i : i + lanes], add)
            where = builder.add(out, ir.Constant(I64, 4 * i))
            _store(builder, add(_load(builder, where, totals.type, 4), totals), where, 4)

    return tile


def dots(kind):
    """The function `add(rows, tokens, operands, sums)`: sums[t, r] += w[r] . x[t], as `_tile` has it.

    Args of it:
        rows, tokens: `ROWS` by `TOKENS`, 2 or 1; or 1 by any.
        operands: w, w_stride, x, x_stride (bytes), k.
    """
    wide, w_bytes, x_bytes = kind.wide, kind.w_bytes, kind.x_bytes
    full, two, one = (_tile(kind, ROWS, tokens, LANES) for tokens in (TOKENS, 2, 1))
    single, rest = (_tile(kind, 1, 1, lanes) for lanes in (LANES, 1))

    @named(dots, *kind)
    def add(rows, tokens, operands, sums):
        w, w_stride, x, x_stride, k = operands
        steps = k // wide
        if rows == 1:
            for t in range(tokens):
                single((w, w_stride, x + x_stride * t, x_stride, steps), sums + 4 * t)
        elif tokens == TOKENS:
            full((w, w_stride, x, x_stride, steps), sums)
        elif tokens == 2:
            two((w, w_stride, x, x_stride, steps), sums)
        else:
            one((w, w_stride, x, x_stride, steps), sums)
        done = steps * wide
        if done < k:
            w, x = w + w_bytes * done, x + x_bytes * done
            for r in range(rows):
                for t in range(tokens):
                    left = (w + w_stride * r, 0, x + x_stride * t, 0, k - done)
                    rest(left, sums + 4 * (t * rows + r))

    return add


@instruction(types.void, types.int64)
def to_floats(context, builder, numbers):
    """`ROWS` int32 become float32, where they are."""
    values = _load(builder, numbers, ir.VectorType(I32, ROWS), 4)
    _store(builder, builder.sitofp(values, ir.VectorType(FLOAT, ROWS)), numbers, 4)


@instruction(types.void, *[types.int64] * 3, types.float64, types.float64, types.int64)
def scale_dots(context, builder, dots, rows, stride, total, step, out):
    """out[r] = (dots[r] - zero_point[r] * total) * step * scale[r] + bias[r] for `ROWS` rows, in float64.

    `dots` and `out` are float32; scales, zero-points and biases are float64, `stride` bytes apart from `rows` on.
    Written as vectors, since LLVM must take `out` for something that the others may overlap.
    """
    floats, doubles = ir.VectorType(FLOAT, ROWS), ir.VectorType(DOUBLE, ROWS)

    def everywhere(value):
        one = builder.insert_element(ir.Constant(doubles, ir.Undefined), value, ir.Constant(I32, 0))
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, ROWS), [0] * ROWS))

    zero_points = builder.add(rows, stride)
    scale, zero_point, bias = (
        _load(builder, address, doubles, 8)
        for address in (rows, zero_points, builder.add(zero_points, stride))
    )
    value = builder.fpext(_load(builder, dots, floats, 4), doubles)
    value = builder.fsub(value, builder.fmul(zero_point, everywhere(total)))
    value = builder.fadd(builder.fmul(value, builder.fmul(scale, everywhere(step))), bias)
    _store(builder, builder.fptrunc(value, floats), out, 4)
