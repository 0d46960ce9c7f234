"""The inner loops, compiled by Numba for the processor they run on. All of them, in this one file: Numba's
cache on disk notices a change of the file a function stands in, and of no other.

No memory is allocated here, nor counted: Numba is told to compile without its runtime (`_nrt=False`), so that a
function that makes an array is not compiled at all. All scratch stands in one *workspace*, which the caller owns for
the length of the call (see cpu.py); `_lay_out` is the only place that divides it.

Three levels, bottom up:

1. *tile*: the dot products of R rows of the weight with T rows of x, all kept in registers, written as LLVM
   vectors, since no loop that Numba accepts becomes `vpmaddwd` reliably;
2. *worker*: takes chunks of rows off a shared counter until none are left; one runs in each thread;
3. *entry*: what Python calls, with addresses as integers (unpacking arrays costs more than a small layer). It gives
   the bytes that its workspace must have, and has done nothing, where the one it was given is too small; else 0.

The threads are those of torch itself: the entry calls the same OpenMP runtime torch is linked to. A second
pool would fight with torch's, whose threads spin for a while after each of their own loops.
"""

from typing import Any

import numba as _numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _intrinsic

from .compile_cache import Cache

numba: Any = _numba  # a type checker cannot follow what these two make of a function
intrinsic: Any = _intrinsic

# ---------------------------------------------------------------- the processor

_TRIPLE, _CPU, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
_HAS = set(_FEATURES.split(","))  # what Numba compiles for, which its settings can make less than the host
X86 = _TRIPLE.startswith(("x86_64", "i686"))
VECTOR_BYTES = 64 if "+avx512bw" in _HAS else 32 if "+avx2" in _HAS else 16
HALF = "+f16c" in _HAS or _TRIPLE.startswith(("aarch64", "arm64"))  # float16 to float32 in hardware
_LANES = VECTOR_BYTES // 4
BYTE_UNITS = (VECTOR_BYTES == 64 and "+avx512vnni" in _HAS) or (VECTOR_BYTES == 32 and "+avxvnni" in _HAS)
_ROWS = 4
_TOKENS = 4 if VECTOR_BYTES == 64 or not X86 else 2  # 4 x 4 accumulators need 32 registers, 4 x 2 need 16

# |codes of x| <= 32767 and |codes of w| <= 128, so 511 products fit one int32; lanes are added as floats.
LARGEST = 32767
_LONGEST = 510 * _LANES
# The same for codes of x in 8 bits: k products of up to 255 * 128, and k / 32 of up to 32767 * 128, in int32 lanes.
LONGEST_BYTES = 13_000 * _LANES
# A typical entry of x under this many steps of its token's scale would lose accuracy (60 dB for a result made
# of typical entries alone, as 20 log10(256 * sqrt(12 * pi / 2))): such a token gets a second plane of codes.
_FEWEST_STEPS = 256.0

FLOAT32, BFLOAT16 = 0, 1  # how the dtype of x, of the bias and of the result is told to an entry


# ---------------------------------------------------------------- addresses, shared counters, threads

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()


def _pointer(dtype: Any) -> Any:
    @intrinsic
    def pointer(typing_context, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), generate

    return pointer


_int8_at, _int16_at, _int32_at = _pointer(types.int8), _pointer(types.int16), _pointer(types.int32)
_int64_at, _uint8_at = _pointer(types.int64), _pointer(types.uint8)
_uint16_at, _float_at, _double_at = _pointer(types.uint16), _pointer(types.float32), _pointer(types.float64)


@intrinsic
def _next(typing_context, address):  # type: ignore[no-untyped-def]
    """The int64 at `address`, raised by one for whoever asks next."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", where, ir.Constant(_I64, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _prefetch(typing_context, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line at `address`, without waiting."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        opaque = _I8.as_pointer()
        function = ir.FunctionType(ir.VoidType(), [opaque, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        read, second_level, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], opaque), read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _call(typing_context, worker, work):  # type: ignore[no-untyped-def]
    """worker(work), on this thread alone."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        opaque = _I8.as_pointer()
        function = ir.FunctionType(ir.VoidType(), [opaque])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [builder.inttoptr(args[1], opaque)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _fork_join(typing_context, launcher, worker, work, threads):  # type: ignore[no-untyped-def]
    """GOMP_parallel(worker, work, threads, 0): worker(work) on each thread of torch's OpenMP team."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        opaque = _I8.as_pointer()
        function = ir.FunctionType(ir.VoidType(), [opaque, opaque, _I32, _I32])
        launcher, worker, work, threads = args
        builder.call(
            builder.inttoptr(launcher, function.as_pointer()),
            [
                builder.inttoptr(worker, opaque),
                builder.inttoptr(work, opaque),
                builder.trunc(threads, _I32),
                ir.Constant(_I32, 0),
            ],
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def _bits_to_float(typing_context, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def _float_to_bits(typing_context, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), generate


# ---------------------------------------------------------------- tiles


_MULTIPLY_ADD = {  # by the products that are summed in a lane, and the lanes
    (2, 16): "llvm.x86.avx512.pmaddw.d.512",
    (2, 8): "llvm.x86.avx2.pmadd.wd",
    (2, 4): "llvm.x86.sse2.pmadd.wd",
    (4, 16): "llvm.x86.avx512.vpdpbusd.512",
    (4, 8): "llvm.x86.avx512.vpdpbusd.256",
}


def _is_integer(kind: str) -> bool:
    return kind in ("int8 int16", "int8 uint8")


def _in_a_lane(kind: str, lanes: int) -> int:
    """How many products one instruction sums in each lane."""
    if lanes == 1 or not X86 or not _is_integer(kind):
        return 1
    return 4 if kind == "int8 uint8" and BYTE_UNITS else 2


def _add_products(  # type: ignore[no-untyped-def]
    builder, kind: str, lanes: int, sums, w, w_stride, x, x_stride, steps
) -> None:
    """sums[t][r] += products of row r of the weight by row t of x, a vector of `lanes`; see `_tile`."""
    together = _in_a_lane(kind, lanes)
    width, tokens, rows = lanes * together, len(sums), len(sums[0])
    integer = _is_integer(kind)
    w_item, w_size = (ir.HalfType(), 2) if kind.startswith("half") else (_I8, 1)
    x_item, x_size = {"int16": (_I16, 2), "uint8": (_I8, 1), "float": (_FLOAT, 4)}[kind.split()[1]]
    sum_type = ir.VectorType(_I32 if integer else _FLOAT, lanes)

    def load(base, index, item, size):  # type: ignore[no-untyped-def]
        address = builder.add(base, builder.mul(index, ir.Constant(_I64, width * size)))
        value = builder.load(builder.inttoptr(address, ir.VectorType(item, width).as_pointer()))
        value.align = size
        return value

    def widen(value, signed=True):  # type: ignore[no-untyped-def]
        if together == 4:
            return builder.bitcast(value, sum_type)
        if integer:
            extend = builder.sext if signed else builder.zext
            return extend(value, ir.VectorType(_I16 if together == 2 else _I32, width))
        if value.type.element == _FLOAT:
            return value
        return (builder.fpext if w_size == 2 else builder.sitofp)(value, sum_type)

    def accumulate(total, a, b):  # type: ignore[no-untyped-def]
        if together > 1:
            operands = [total, b, a] if together == 4 else [a, b]
            function = ir.FunctionType(sum_type, [operand.type for operand in operands])
            name = _MULTIPLY_ADD[together, lanes]
            function = cgutils.get_or_insert_function(builder.module, function, name)
            product = builder.call(function, operands)
            return product if together == 4 else builder.add(total, product)
        if integer:
            return builder.add(total, builder.mul(a, b))
        return builder.fadd(total, builder.fmul(a, b, flags=["contract"]), flags=["contract"])

    def base(first, stride, count):  # type: ignore[no-untyped-def]
        return [builder.add(first, builder.mul(stride, ir.Constant(_I64, i))) for i in range(count)]

    w_rows, x_rows = base(w, w_stride, rows), base(x, x_stride, tokens)
    with cgutils.for_range(builder, steps) as loop:
        w_values = [widen(load(row, loop.index, w_item, w_size)) for row in w_rows]
        for t in range(tokens):
            x_value = widen(load(x_rows[t], loop.index, x_item, x_size), signed=kind != "int8 uint8")
            for r in range(rows):
                builder.store(accumulate(builder.load(sums[t][r]), w_values[r], x_value), sums[t][r])


def _across(builder, vectors):  # type: ignore[no-untyped-def]
    """One vector with the sum of each of `vectors`: a power of two of them, and no more than each has lanes."""
    count, lanes = len(vectors), vectors[0].type.count

    def neighbours(a, b):  # type: ignore[no-untyped-def]
        index = ir.VectorType(_I32, lanes)
        even, odd = (
            builder.shuffle_vector(a, b, ir.Constant(index, list(range(first, 2 * lanes, 2))))
            for first in (0, 1)
        )
        return builder.fadd(even, odd)

    while len(vectors) > 1:
        vectors = [neighbours(*vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    total = vectors[0]
    while lanes > count:
        lanes //= 2
        total = neighbours(total, total)
    return total


def _tile(kinds: tuple[str, ...], rows: int, tokens: int, lanes: int) -> Any:
    """out[t, r] += sum over k < steps * width of w[r, k] * x[t, k]; strides in bytes, `out` float32.

    A kind names the two operands: "int8 int16" and "int8 uint8" multiply in integers, two or four products to a
    lane where the processor can (the caller keeps the sums within int32); "int8 float" and "half float" in float32.
    With two kinds there are two sets of operands, summed together before they are added up across the lanes.
    """
    integer = _is_integer(kinds[0])
    float_type = ir.VectorType(_FLOAT, lanes)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        zero = ir.Constant(ir.VectorType(_I32 if integer else _FLOAT, lanes), None)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(rows)] for _ in range(tokens)]
        for i, kind in enumerate(kinds):
            _add_products(builder, kind, lanes, sums, *args[5 * i : 5 * i + 5])
        flat = [builder.load(total) for of_token in sums for total in of_token]
        if integer:
            flat = [builder.sitofp(total, float_type) for total in flat]
        for i in range(0, len(flat), lanes):
            totals = _across(builder, flat[i : i + lanes])
            where = builder.add(args[-1], ir.Constant(_I64, 4 * i))
            where = builder.inttoptr(where, totals.type.as_pointer())
            before = builder.load(where)
            before.align = 4
            builder.store(builder.fadd(before, totals), where).align = 4
        return context.get_dummy_value()

    if len(kinds) == 1:

        @intrinsic
        def tile(typing_context, w, w_stride, x, x_stride, steps, out):  # type: ignore[no-untyped-def]
            return types.void(*[types.int64] * 6), generate

    else:

        @intrinsic
        def tile(  # type: ignore[no-untyped-def]
            typing_context, w, w_stride, x, x_stride, steps, v, v_stride, y, y_stride, more_steps, out
        ):
            return types.void(*[types.int64] * 11), generate

    return tile


@intrinsic
def _scale_dots(typing_context, dots, rows, stride, total, step, out):  # type: ignore[no-untyped-def]
    """out[r] = (dots[r] - zero_point[r] * total) * step * scale[r] + bias[r] for `_ROWS` rows, in float64.

    `dots` and `out` are float32; scales, zero-points and biases are float64, `stride` bytes apart from `rows` on.
    Written as vectors, since LLVM must take `out` for something that the others may overlap.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        dots, rows, stride, total, step, out = args
        floats, doubles = ir.VectorType(_FLOAT, _ROWS), ir.VectorType(ir.DoubleType(), _ROWS)

        def load(address, kind, size):  # type: ignore[no-untyped-def]
            value = builder.load(builder.inttoptr(address, kind.as_pointer()))
            value.align = size
            return value

        def everywhere(value):  # type: ignore[no-untyped-def]
            one = builder.insert_element(ir.Constant(doubles, ir.Undefined), value, ir.Constant(_I32, 0))
            return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, _ROWS), [0] * _ROWS))

        scale = load(rows, doubles, 8)
        zero_point = load(builder.add(rows, stride), doubles, 8)
        bias = load(builder.add(builder.add(rows, stride), stride), doubles, 8)
        value = builder.fpext(load(dots, floats, 4), doubles)
        value = builder.fsub(value, builder.fmul(zero_point, everywhere(total)))
        value = builder.fadd(builder.fmul(value, builder.fmul(scale, everywhere(step))), bias)
        builder.store(builder.fptrunc(value, floats), builder.inttoptr(out, floats.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, types.float64, types.float64, types.int64), generate


_INT16, _BYTES_AND_INT16 = ("int8 int16",), ("int8 uint8", "int8 int16")
_FLOATS_BY_CODES, _FLOATS_BY_HALVES = ("int8 float",), ("half float",)
_WIDE, _WIDEST = (_LANES * _in_a_lane(kind, _LANES) for kind in ("int8 int16", "int8 uint8"))  # k of one step
_int_4t, _int_42, _int_41 = (_tile(_INT16, _ROWS, tokens, _LANES) for tokens in (_TOKENS, 2, 1))
_int_11, _int_tail = (_tile(_INT16, 1, 1, lanes) for lanes in (_LANES, 1))
_byte_4t, _byte_42, _byte_41 = (_tile(_BYTES_AND_INT16, _ROWS, tokens, _LANES) for tokens in (_TOKENS, 2, 1))
_byte_11, _byte_tail = (_tile(_BYTES_AND_INT16, 1, 1, lanes) for lanes in (_LANES, 1))
_code_41, _code_11 = (_tile(_FLOATS_BY_CODES, rows, 1, _LANES) for rows in (_ROWS, 1))
_code_tail = _tile(_FLOATS_BY_CODES, 1, 1, 1)
if HALF:
    _half_4t, _half_41 = (_tile(_FLOATS_BY_HALVES, _ROWS, tokens, _LANES) for tokens in (_TOKENS, 1))
    _half_11, _half_tail = (_tile(_FLOATS_BY_HALVES, 1, 1, lanes) for lanes in (_LANES, 1))

# ---------------------------------------------------------------- compiling

CACHE = Cache(__file__)
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
_inline = numba.njit(**_OPTIONS)  # compiled into its callers, and cached with them
_inline_reordered = numba.njit(**_OPTIONS, fastmath={"reassoc", "nsz", "contract"})
_worker = CACHE.compile(numba.cfunc, types.void(types.int64), **_OPTIONS)

# ---------------------------------------------------------------- the workspace: int64 slots, then the parts

(
    _COUNTER,  # the next chunk of rows, or token
    _WORKERS,  # how many have begun, each with a slice of its own
    _CHUNK,  # rows in a chunk
    _N,
    _K,
    _M,
    _FEW,  # how many columns of x are outliers, where the others are int8; 0: all codes are int16
    _WEIGHT,  # addresses of the caller's; 0: there is none
    _SCALE,
    _ZERO_POINT,
    _BIAS,
    _BIAS_DTYPE,
    _X,  # as given
    _DTYPE,  # of x and of the result
    _OUT,
    _SLICE_BYTES,  # of one worker's slice
    _SLICES,  # addresses of the parts of the workspace from here on: a slice for each worker
    _FLOATS,  # x in float32 [M, K]
    _SUMS,  # of the rows of x, or of their codes: float64 [2 M]
    _STEPS,  # the scale of each row of codes: float32 [2 M]; a second plane of 0 is not there, a first of -1
    # has no codes (NaN, infinite or tiny values) and is computed in floats
    _CODES,  # of x: int16 [2 M, K]; rows M to 2 M are second planes
    _COLUMNS,  # which are outliers: int64 [FEW]; `_CODES` is of them alone, [M, FEW], then
    _BYTES,  # the codes of the others, 128 added: uint8 [M + 1, K], 128 for outliers; the last row is all ones
    _PEAKS,  # the bits of the largest |x| of each column: int32 [K]
    _SLOTS,
) = range(25)
_LINE = 64  # bytes: what a part begins at a multiple of, so that no two workers write one line of the cache


@_inline
def _whole_lines(size):  # type: ignore[no-untyped-def]
    return (size + (_LINE - 1)) // _LINE * _LINE


@_inline
def _lay_out(workspace, room, threads, slice_bytes, sizes):  # type: ignore[no-untyped-def]
    """0, and the slots of the parts filled with addresses; or the bytes to have, where they are more than `room`.

    `sizes` are the bytes of the parts after the slices, in the order of their slots; what is left out has none.
    """
    slices = _whole_lines(8 * _SLOTS)
    parts = slices + threads * _whole_lines(slice_bytes)
    end = parts
    for size in sizes:
        end += _whole_lines(size)
    if end > room:
        return end
    a = _int64_at(workspace)
    a[_SLICE_BYTES], a[_SLICES] = _whole_lines(slice_bytes), workspace + slices
    place = workspace + parts
    for i in range(len(sizes)):
        a[_SLICES + 1 + i] = place
        place += _whole_lines(sizes[i])
    return 0


@_inline
def _own_slice(work):  # type: ignore[no-untyped-def]
    """The address of scratch that no other worker has."""
    a = _int64_at(work)
    return a[_SLICES] + a[_SLICE_BYTES] * _next(work + 8 * _WORKERS)


@_inline
def _read(address, index, dtype):  # type: ignore[no-untyped-def]
    if dtype == FLOAT32:
        return _float_at(address)[index]
    return _bits_to_float(np.int32(np.int32(_uint16_at(address)[index]) << np.int32(16)))


@_inline
def _write(address, index, value, dtype):  # type: ignore[no-untyped-def]
    if dtype == FLOAT32:
        _float_at(address)[index] = value
        return
    bits = np.int64(_float_to_bits(value)) & 0xFFFFFFFF
    if value != value:
        bits |= 0x400000  # stays a NaN when cut
    else:
        bits += 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    _uint16_at(address)[index] = np.uint16(bits >> 16)


@_inline
def _widen_row(halves, count, floats):  # type: ignore[no-untyped-def]
    """bfloat16 to float32."""
    source, target = _uint16_at(halves), _int32_at(floats)
    for i in range(count):
        target[i] = np.int32(np.int32(source[i]) << np.int32(16))


@_inline
def _widen(a, token):  # type: ignore[no-untyped-def]
    """Row `token` of x in float32: the address of it."""
    k = a[_K]
    floats = a[_FLOATS] + 4 * k * token
    if a[_DTYPE] != FLOAT32:
        _widen_row(a[_X] + 2 * k * token, k, floats)
    return floats


@_inline_reordered
def _sum(x, k):  # type: ignore[no-untyped-def]
    values = _float_at(x)
    total = 0.0
    for i in range(k):
        total += np.float64(values[i])
    return total


@_inline
def _quantize(values, k, codes, step):  # type: ignore[no-untyped-def]
    """codes = round(values / step); the sum of the codes."""
    source, target = _float_at(values), _int16_at(codes)
    inverse = np.float32(1.0) / step
    total = np.int64(0)
    for i in range(k):
        code = np.int32(np.rint(source[i] * inverse))
        target[i] = np.int16(code)
        total += code
    return total


@_inline
def _quantize_rest(values, k, codes, step, rest, rest_step):  # type: ignore[no-untyped-def]
    """The second plane: what `codes` left of `values`, at most half a step, as codes of its own."""
    source, first, target = _float_at(values), _int16_at(codes), _int16_at(rest)
    inverse = np.float32(1.0) / rest_step
    total = np.int64(0)
    for i in range(k):
        # in float64, where code * step is exact
        left = np.float64(source[i]) - np.float64(first[i]) * np.float64(step)
        code = np.int32(np.rint(np.float32(left) * inverse))
        target[i] = np.int16(code)
        total += code
    return total


@_inline_reordered
def _size(x, k):  # type: ignore[no-untyped-def]
    """(bits of the largest |x|, sum of |x|). As integers, absolute floats keep their order, NaN on top."""
    bits, values = _int32_at(x), _float_at(x)
    most = np.int32(0)
    total = np.float32(0.0)
    for i in range(k):
        most = max(most, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
        total += abs(values[i])
    return most, total


@_inline
def _prepare_codes(a, token):  # type: ignore[no-untyped-def]
    k, m = a[_K], a[_M]
    values = _widen(a, token)
    steps, sums = _float_at(a[_STEPS]), _double_at(a[_SUMS])
    bits, total = _size(values, k)
    largest = _bits_to_float(bits)
    steps[m + token] = np.float32(0.0)
    codes = a[_CODES] + 2 * k * token
    if bits == 0:
        steps[token], sums[token] = np.float32(0.0), 0.0
        target = _int16_at(codes)
        for i in range(k):
            target[i] = np.int16(0)
        return
    if bits >= 0x7F800000 or largest < np.float32(1e-25):
        steps[token] = np.float32(-1.0)
        return
    step = largest / np.float32(LARGEST)
    steps[token] = step
    sums[token] = np.float64(_quantize(values, k, codes, step))
    if k > 1 and (total - largest) / np.float32(k - 1) < np.float32(_FEWEST_STEPS) * step:
        rest_step = step * np.float32(0.51 / LARGEST)
        steps[m + token] = rest_step
        sums[m + token] = np.float64(_quantize_rest(values, k, codes, step, codes + 2 * k * m, rest_step))


@_worker
def _prepare(work):  # type: ignore[no-untyped-def]
    a = _int64_at(work)
    counter = work + 8 * _COUNTER
    while True:
        token = _next(counter)
        if token >= a[_M]:
            return
        _prepare_codes(a, token)


@_inline
def _zero(sums, count):  # type: ignore[no-untyped-def]
    values = _float_at(sums)
    for i in range(count):
        values[i] = np.float32(0.0)


@_inline
def _integer_dots(rows, tokens, w, x, k, sums):  # type: ignore[no-untyped-def]
    """sums[t, r] += w[r] . x[t], int8 by int16, `_LONGEST` products at a time."""
    begin = 0
    while begin < k:
        length = min(_LONGEST, k - begin)
        steps = length // _WIDE
        if rows == 1:
            _int_11(w + begin, k, x + 2 * begin, 2 * k, steps, sums)
        elif tokens == _TOKENS:
            _int_4t(w + begin, k, x + 2 * begin, 2 * k, steps, sums)
        elif tokens == 2:
            _int_42(w + begin, k, x + 2 * begin, 2 * k, steps, sums)
        else:
            _int_41(w + begin, k, x + 2 * begin, 2 * k, steps, sums)
        done = begin + steps * _WIDE
        begin += length
        if done < begin:
            for r in range(rows):
                for t in range(tokens):
                    place = sums + 4 * (t * rows + r)
                    _int_tail(w + done + k * r, 0, x + 2 * (done + k * t), 0, begin - done, place)


@numba.njit(**_OPTIONS, fastmath={"reassoc", "contract"})
def _plain_dot(w, x, k, zero_point):  # type: ignore[no-untyped-def]
    """One dot product as float arithmetic has it, NaN and infinity included."""
    codes, values = _int8_at(w), _float_at(x)
    total = np.float32(0.0)
    for i in range(k):
        total += values[i] * (np.float32(codes[i]) - np.float32(zero_point))
    return np.float64(total)


@_inline
def _finish(a, row, token, total):  # type: ignore[no-untyped-def]
    """Scale, add the bias, write: y[token, row] of a dot product with (code - zero-point)."""
    if a[_SCALE] != 0:
        total *= np.float64(_float_at(a[_SCALE])[row])
    value = np.float32(total)
    if a[_BIAS] != 0:
        value += _read(a[_BIAS], row, a[_BIAS_DTYPE])
    _write(a[_OUT], token * a[_N] + row, value, a[_DTYPE])


@_inline
def _finish_dots(a, first, rows, t, sums, extra):  # type: ignore[no-untyped-def]
    """`_finish` for some rows and one token, which may have a second plane, or no codes at all."""
    k, m = a[_K], a[_M]
    steps, totals, dots = _float_at(a[_STEPS]), _double_at(a[_SUMS]), _float_at(sums)
    for r in range(rows):
        row = first + r
        zero_point = np.int64(0)
        if a[_ZERO_POINT] != 0:
            zero_point = np.int64(_int8_at(a[_ZERO_POINT])[row])
        if steps[t] < np.float32(0.0):
            total = _plain_dot(a[_WEIGHT] + k * row, a[_FLOATS] + 4 * k * t, k, zero_point)
        else:
            total = (np.float64(dots[r]) - zero_point * totals[t]) * np.float64(steps[t])
            if steps[m + t] > np.float32(0.0):
                _zero(extra, 1)
                _integer_dots(1, 1, a[_WEIGHT] + k * row, a[_CODES] + 2 * k * (m + t), k, extra)
                left = np.float64(_float_at(extra)[0]) - zero_point * totals[m + t]
                total += left * np.float64(steps[m + t])
        _finish(a, row, t, total)


@_inline
def _tell_rows(a, first, last, rows):  # type: ignore[no-untyped-def]
    """Scale, zero-point and bias of some rows of the weight as float64 [3, chunk], for `_finish_tile`."""
    told, chunk = _double_at(rows), a[_CHUNK]
    for row in range(first, last):
        place = row - first
        told[place] = np.float64(_float_at(a[_SCALE])[row])
        told[chunk + place] = 0.0 if a[_ZERO_POINT] == 0 else np.float64(_int8_at(a[_ZERO_POINT])[row])
        told[2 * chunk + place] = 0.0 if a[_BIAS] == 0 else np.float64(_read(a[_BIAS], row, a[_BIAS_DTYPE]))


@_inline
def _finish_tile(a, row, token, dots, total, step, rows):  # type: ignore[no-untyped-def]
    """`_finish` for `_ROWS` rows and one token that has nothing special."""
    place = token * a[_N] + row
    if a[_DTYPE] == FLOAT32:
        _scale_dots(dots, rows, 8 * a[_CHUNK], total, step, a[_OUT] + 4 * place)
    else:
        _scale_dots(dots, rows, 8 * a[_CHUNK], total, step, dots)
        for r in range(_ROWS):
            _write(a[_OUT], place + r, _float_at(dots)[r], BFLOAT16)


@_inline
def _raise_peaks(peaks, bits, count):  # type: ignore[no-untyped-def]
    """peaks = max(peaks, bits of |x|), where x is a number."""
    source, target = _int32_at(bits), _int32_at(peaks)
    for i in range(count):
        size = np.int32(source[i] & np.int32(0x7FFFFFFF))
        target[i] = max(target[i], size if size < np.int32(0x7F800000) else np.int32(0))


@_worker
def _peaks_worker(work):  # type: ignore[no-untyped-def]
    a = _int64_at(work)
    k, m, chunk = a[_K], a[_M], a[_CHUNK]
    wide = _own_slice(work)
    counter = work + 8 * _COUNTER
    while True:
        first = _next(counter) * chunk
        if first >= k:
            return
        count = min(chunk, k - first)
        _zero(a[_PEAKS] + 4 * first, count)
        for token in range(m):
            bits = a[_X] + 4 * (token * k + first)
            if a[_DTYPE] != FLOAT32:
                bits = wide
                _widen_row(a[_X] + 2 * (token * k + first), count, bits)
            _raise_peaks(a[_PEAKS] + 4 * first, bits, count)


@_inline
def _choose_columns(a):  # type: ignore[no-untyped-def]
    """The `_FEW` columns with the largest peaks, in their order."""
    k, few, peaks, columns = a[_K], a[_FEW], _int32_at(a[_PEAKS]), _int64_at(a[_COLUMNS])
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


@_inline
def _quantize_bytes(values, k, codes, inverse):  # type: ignore[no-untyped-def]
    """codes = round(values * inverse) + 128; the sum of the codes without the 128."""
    source, target = _float_at(values), _uint8_at(codes)
    total = np.int32(0)
    for i in range(k):
        code = np.int32(np.rint(source[i] * inverse))
        target[i] = np.uint8(code + np.int32(128))
        total += code
    return total


@_inline
def _prepare_bytes(a, token, scratch):  # type: ignore[no-untyped-def]
    """One step for all codes of a token: int8 ones but for the outlier columns, whose codes have 16 bits."""
    k, few = a[_K], a[_FEW]
    values = _widen(a, token)
    steps, sums = _float_at(a[_STEPS]), _double_at(a[_SUMS])
    source, rest = _float_at(values), _float_at(scratch)
    columns, outliers = _int64_at(a[_COLUMNS]), _int16_at(a[_CODES] + 2 * few * token)
    for i in range(k):
        rest[i] = source[i]
    most = np.float32(0.0)
    for i in range(few):
        value = abs(source[columns[i]])
        most = value if value > most or value != value else most
        rest[columns[i]] = np.float32(0.0)
    bits, _ = _size(scratch, k)
    largest = _bits_to_float(bits)
    step = max(largest / np.float32(127.0), most / np.float32(LARGEST))
    steps[token] = np.float32(-1.0)
    if most != most or not np.isfinite(step) or (step < np.float32(1e-27) and step > np.float32(0.0)):
        return
    if largest > np.float32(0.0) and step * np.float32(63.0) > largest:
        return  # outliers so large that the rest would be left with less than 7 bits
    steps[token] = step
    inverse = np.float32(0.0) if step == np.float32(0.0) else np.float32(1.0) / step
    total = np.int64(0)
    for i in range(few):
        code = np.int32(np.rint(source[columns[i]] * inverse))
        outliers[i] = np.int16(code)
        total += code
    sums[token] = np.float64(total + _quantize_bytes(scratch, k, a[_BYTES] + k * token, inverse))


@_worker
def _bytes_worker(work):  # type: ignore[no-untyped-def]
    a = _int64_at(work)
    scratch = _own_slice(work)
    counter = work + 8 * _COUNTER
    while True:
        token = _next(counter)
        if token >= a[_M]:
            return
        _prepare_bytes(a, token, scratch)


@_inline
def _byte_dots(rows, tokens, w, x, k, few_w, few_x, few, sums):  # type: ignore[no-untyped-def]
    """sums[t, r] += w[r] . x[t], int8 by uint8, and of the outlier columns, a multiple of `_WIDE`, by int16."""
    steps, more = k // _WIDEST, few // _WIDE
    if rows == 1:
        _byte_11(w, k, x, k, steps, few_w, few, few_x, 2 * few, more, sums)
    elif tokens == _TOKENS:
        _byte_4t(w, k, x, k, steps, few_w, few, few_x, 2 * few, more, sums)
    elif tokens == 2:
        _byte_42(w, k, x, k, steps, few_w, few, few_x, 2 * few, more, sums)
    else:
        _byte_41(w, k, x, k, steps, few_w, few, few_x, 2 * few, more, sums)
    done = steps * _WIDEST
    if done < k:
        for r in range(rows):
            for t in range(tokens):
                place = sums + 4 * (t * rows + r)
                _byte_tail(w + done + k * r, 0, x + done + k * t, 0, k - done, 0, 0, 0, 0, 0, place)


@_inline
def _gather(a, first, last, few_weights, offsets):  # type: ignore[no-untyped-def]
    """The outlier columns of some rows of the weight; and what the 128 added to the codes of x make of each row."""
    k, few, columns = a[_K], a[_FEW], _int64_at(a[_COLUMNS])
    _zero(offsets, last - first)
    for row in range(first, last):
        codes, target = _int8_at(a[_WEIGHT] + k * row), _int8_at(few_weights + few * (row - first))
        for i in range(few):
            target[i] = codes[columns[i]]
        offset = offsets + 4 * (row - first)
        _byte_dots(1, 1, a[_WEIGHT] + k * row, a[_BYTES] + k * a[_M], k, 0, 0, 0, offset)
        _float_at(offset)[0] *= np.float32(-128.0)


@_inline
def _tile_dots(a, rows, tokens, row, token, few_weights, offset, sums):  # type: ignore[no-untyped-def]
    """sums[t, r] = w[row + r] . x[token + t], by the codes of x; `few_weights` and `offset` are from `_gather`."""
    k, few, w = a[_K], a[_FEW], a[_WEIGHT] + a[_K] * row
    if few == 0:
        _zero(sums, rows * tokens)
        _integer_dots(rows, tokens, w, a[_CODES] + 2 * k * token, k, sums)
        return
    target, source = _float_at(sums), _float_at(offset)
    for t in range(tokens):
        for r in range(rows):
            target[t * rows + r] = source[r]
    x, few_x = a[_BYTES] + k * token, a[_CODES] + 2 * few * token
    _byte_dots(rows, tokens, w, x, k, few_weights, few_x, few, sums)


@_inline
def _integer_slice(chunk, few):  # type: ignore[no-untyped-def]
    """Bytes of `_tell_rows`, of float32 offsets and sums and one sum more, and of the outlier columns of a chunk."""
    return 8 * 3 * chunk + 4 * (chunk + _ROWS * _TOKENS + 1) + few * chunk


@_worker
def _integer_worker(work):  # type: ignore[no-untyped-def]
    """int8 codes by the codes of x: int16 ones, or int8 ones with the few outlier columns as int16."""
    a = _int64_at(work)
    n, k, m, chunk, few = a[_N], a[_K], a[_M], a[_CHUNK], a[_FEW]
    told = _own_slice(work)  # see _integer_slice
    offsets = told + 8 * 3 * chunk
    sums = offsets + 4 * chunk
    extra = sums + 4 * _ROWS * _TOKENS
    few_weights = extra + 4
    steps, totals = _float_at(a[_STEPS]), _double_at(a[_SUMS])
    counter = work + 8 * _COUNTER
    following = _next(counter) * chunk
    while following < n:
        first, following = following, _next(counter) * chunk
        last = min(first + chunk, n)
        whole = first + (last - first) // _ROWS * _ROWS
        # a share of the next chunk is fetched from memory beside each tile of x
        wanted, wanted_end = a[_WEIGHT] + k * following, a[_WEIGHT] + k * min(following + chunk, n)
        share = (k * chunk * _TOKENS // m + 63) // 64 * 64
        _tell_rows(a, first, last, told)
        if few != 0:
            _gather(a, first, last, few_weights, offsets)
        token = 0
        while token < m:  # a tile's rows of x stay in the nearest cache while the chunk passes by
            tokens = _TOKENS if m - token >= _TOKENS else 2 if m - token >= 2 else 1
            for line in range(wanted, min(wanted + share, wanted_end), 64):
                _prefetch(line)
            wanted += share
            for row in range(first, whole, _ROWS):
                place = row - first
                _tile_dots(a, _ROWS, tokens, row, token, few_weights + few * place, offsets + 4 * place, sums)
                for i in range(tokens):
                    t, dots = token + i, sums + 4 * _ROWS * i
                    if steps[t] >= np.float32(0.0) and steps[m + t] == np.float32(0.0):
                        _finish_tile(a, row, t, dots, totals[t], np.float64(steps[t]), told + 8 * place)
                    else:
                        _finish_dots(a, row, _ROWS, t, dots, extra)
            for row in range(whole, last):
                place = row - first
                for t in range(token, token + tokens):
                    _tile_dots(a, 1, 1, row, t, few_weights + few * place, offsets + 4 * place, sums)
                    _finish_dots(a, row, 1, t, sums, extra)
            token += tokens


@_worker
def _float_worker(work):  # type: ignore[no-untyped-def]
    """int8 codes by float32."""
    a = _int64_at(work)
    n, k, m, chunk = a[_N], a[_K], a[_M], a[_CHUNK]
    sums = _own_slice(work)
    dots = _float_at(sums)
    counter = work + 8 * _COUNTER
    totals = _double_at(a[_SUMS])
    steps = k // _LANES
    done = steps * _LANES
    while True:
        first = _next(counter) * chunk
        if first >= n:
            return
        last = min(first + chunk, n)
        row = first
        while row < last:
            rows = _ROWS if last - row >= _ROWS else 1
            w = a[_WEIGHT] + k * row
            for token in range(m):
                x = a[_FLOATS] + 4 * k * token
                _zero(sums, rows)
                if rows == _ROWS:
                    _code_41(w, k, x, 0, steps, sums)
                else:
                    _code_11(w, k, x, 0, steps, sums)
                for r in range(rows):
                    if done < k:
                        _code_tail(w + k * r + done, 0, x + 4 * done, 0, k - done, sums + 4 * r)
                    total = np.float64(dots[r])
                    if a[_ZERO_POINT] != 0:
                        zero_point = np.float64(_int8_at(a[_ZERO_POINT])[row + r])
                        total -= zero_point * totals[token]
                        if not np.isfinite(total):
                            total = _plain_dot(w + k * r, x, k, zero_point)
                    _finish(a, row + r, token, total)
            row += rows


if HALF:

    @_worker
    def _half_worker(work):  # type: ignore[no-untyped-def]
        """float16 weights by float32."""
        a = _int64_at(work)
        n, k, m, chunk = a[_N], a[_K], a[_M], a[_CHUNK]
        sums = _own_slice(work)
        dots = _float_at(sums)
        counter = work + 8 * _COUNTER
        steps = k // _LANES
        done = steps * _LANES
        while True:
            first = _next(counter) * chunk
            if first >= n:
                return
            last = min(first + chunk, n)
            token = 0
            while token < m:
                row = first
                tokens = 1
                while row < last:
                    rows = _ROWS if last - row >= _ROWS else 1
                    tokens = _TOKENS if m - token >= _TOKENS else 1
                    w, x = a[_WEIGHT] + 2 * k * row, a[_FLOATS] + 4 * k * token
                    _zero(sums, rows * tokens)
                    if rows == 1:
                        for i in range(tokens):
                            _half_11(w, 2 * k, x + 4 * k * i, 4 * k, steps, sums + 4 * i)
                    elif tokens == _TOKENS:
                        _half_4t(w, 2 * k, x, 4 * k, steps, sums)
                    else:
                        _half_41(w, 2 * k, x, 4 * k, steps, sums)
                    for r in range(rows):
                        for i in range(tokens):
                            place = i * rows + r
                            if done < k:
                                at_w, at_x = w + 2 * (k * r + done), x + 4 * (k * i + done)
                                _half_tail(at_w, 0, at_x, 0, k - done, sums + 4 * place)
                            _finish(a, row + r, token + i, np.float64(dots[place]))
                    row += rows
                token += tokens


@_worker
def _expand_worker(work):  # type: ignore[no-untyped-def]
    a = _int64_at(work)
    n, k, chunk = a[_N], a[_K], a[_CHUNK]
    counter = work + 8 * _COUNTER
    while True:
        first = _next(counter) * chunk
        if first >= n:
            return
        for row in range(first, min(first + chunk, n)):
            codes, out = _int8_at(a[_WEIGHT] + k * row), _float_at(a[_OUT] + 4 * k * row)
            scale = _float_at(a[_SCALE])[row]
            zero_point = np.int32(0)
            if a[_ZERO_POINT] != 0:
                zero_point = np.int32(_int8_at(a[_ZERO_POINT])[row])
            for i in range(k):
                out[i] = np.float32(np.int32(np.int32(codes[i]) - zero_point)) * scale


_MOST_KEY, _LEAST_KEY = 0x7F800000, -0x7F800001  # of the two infinities, see _ordered
_TINY = np.finfo(np.float32).tiny


@_inline
def _ordered(bits):  # type: ignore[no-untyped-def]
    """The bits of a float32 as an integer that is ordered as the floats are, NaN beyond infinity; and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@_inline
def _range(row, k):  # type: ignore[no-untyped-def]
    """The least and the largest of 0 and the floats of a row, as `_ordered` gives them."""
    bits = _int32_at(row)
    least = most = np.int32(0)
    for i in range(k):
        key = _ordered(bits[i])
        least, most = min(least, key), max(most, key)
    return least, most


@_inline
def _encode(row, k, codes, scale, zero_point, lowest):  # type: ignore[no-untyped-def]
    source, target = _float_at(row), _int8_at(codes)
    inverse = np.float32(1.0) / scale
    for i in range(k):
        step = np.float32(np.rint(source[i] * inverse) + zero_point)
        target[i] = np.int8(np.int32(min(max(step, lowest), np.float32(127.0))))


@_worker
def _encode_worker(work):  # type: ignore[no-untyped-def]
    """Float32 rows to codes, as core.quantize_to_codes, to the bit; the scale of a row without a range is NaN."""
    a = _int64_at(work)
    n, k, chunk = a[_N], a[_K], a[_CHUNK]
    counter = work + 8 * _COUNTER
    while True:
        first = _next(counter) * chunk
        if first >= n:
            return
        for index in range(first, min(first + chunk, n)):
            row = a[_X] + 4 * k * index
            least, most = _range(row, k)
            if most >= _MOST_KEY or least <= _LEAST_KEY:
                _float_at(a[_SCALE])[index] = np.float32(np.nan)
                continue
            low, high = _bits_to_float(_ordered(least)), _bits_to_float(_ordered(most))
            scale, zero_point, lowest = np.float32(1.0), np.float32(0.0), np.float32(-127.0)
            if a[_ZERO_POINT] == 0:
                if low != high:
                    scale = max(max(-low, high) / np.float32(127.0), _TINY)
            else:
                lowest = np.float32(-128.0)
                if low != high:
                    scale = max((high - low) / np.float32(255.0), _TINY)
                    zero_point = np.rint(np.float32(-128.0) - low / scale)
                    zero_point = min(max(zero_point, lowest), np.float32(127.0))
                _int8_at(a[_ZERO_POINT])[index] = np.int8(np.int32(zero_point))
            _float_at(a[_SCALE])[index] = scale
            _encode(row, k, a[_OUT] + k * index, scale, zero_point, lowest)


# ---------------------------------------------------------------- what Python calls

_LITTLE = 1 << 17  # multiply-adds that one thread finishes before a second could start
_NEAR = 1 << 18  # bytes of weight a chunk may take of a core's own cache
_PEAK_COLUMNS = 256  # of x, whose peaks a worker of `_peaks_worker` finds at once


@_inline
def _run(launcher, worker, work, threads):  # type: ignore[no-untyped-def]
    a = _int64_at(work)
    a[_COUNTER] = a[_WORKERS] = 0
    if threads <= 1:
        _call(worker, work)
    else:
        _fork_join(launcher, worker, work, threads)


@_inline
def _chunk(n, row_bytes, threads):  # type: ignore[no-untyped-def]
    rows = min(64, _NEAR // max(row_bytes, 1), n // (4 * threads)) // _ROWS * _ROWS
    return max(rows, _ROWS)


@_inline
def _tell(work, n, k, m, few, weight, scale, zero_point, bias, bias_dtype, x, dtype, out):  # type: ignore[no-untyped-def]
    a = _int64_at(work)
    a[_N], a[_K], a[_M], a[_FEW] = n, k, m, few
    a[_WEIGHT], a[_SCALE], a[_ZERO_POINT] = weight, scale, zero_point
    a[_BIAS], a[_BIAS_DTYPE], a[_X], a[_DTYPE], a[_OUT] = bias, bias_dtype, x, dtype, out
    if dtype == FLOAT32:
        a[_FLOATS] = x
    return a


@_inline
def _by_rows(work, room, launcher, worker, threads, n, k, weight, scale, zero_point, x, out):  # type: ignore[no-untyped-def]
    """A pass over the rows of a matrix, without scratch."""
    if n * k < _LITTLE // 4:
        threads = 1
    missing = _lay_out(work, room, 0, 0, (0,))
    if missing != 0:
        return missing
    a = _tell(work, n, k, 0, 0, weight, scale, zero_point, 0, 0, x, FLOAT32, out)
    a[_CHUNK] = _chunk(n, 4 * k, threads)
    _run(launcher, worker, work, threads)
    return 0


_DISPATCHERS: list[Any] = []  # own the compiled entries


def _entry(addresses_and_sizes: int) -> Any:
    """What the dispatcher would call, in a third of its time."""

    def decorate(function: Any) -> Any:
        signature = types.int64(*[types.int64] * addresses_and_sizes)
        dispatcher = CACHE.compile(numba.njit, signature, nogil=True, **_OPTIONS)(function)
        _DISPATCHERS.append(dispatcher)
        return dispatcher.overloads[signature.args].entry_point

    return decorate


@_entry(17)
def linear_int16(  # type: ignore[no-untyped-def]
    work,
    room,
    launcher,
    prepare,
    worker,
    threads,
    n,
    k,
    m,
    weight,
    scale,
    zero_point,
    bias,
    bias_dtype,
    x,
    dtype,
    out,
):
    if n * k * m < _LITTLE:
        threads = 1
    chunk = _chunk(n, k, threads)
    floats = 0 if dtype == FLOAT32 else 4 * m * k
    sizes = (floats, 8 * 2 * m, 4 * 2 * m, 2 * 2 * m * k)
    missing = _lay_out(work, room, threads, _integer_slice(chunk, 0), sizes)
    if missing != 0:
        return missing
    a = _tell(work, n, k, m, 0, weight, scale, zero_point, bias, bias_dtype, x, dtype, out)
    _run(launcher, prepare, work, threads if m * k > _LITTLE else 1)
    a[_CHUNK] = chunk
    _run(launcher, worker, work, threads)
    return 0


@_entry(16)
def linear_float(  # type: ignore[no-untyped-def]
    work, room, launcher, worker, threads, n, k, m, weight, scale, zero_point, bias, bias_dtype, x, dtype, out
):
    if n * k * m < _LITTLE:
        threads = 1
    floats = 0 if dtype == FLOAT32 else 4 * m * k
    missing = _lay_out(work, room, threads, 4 * _ROWS * _TOKENS, (floats, 8 * m))
    if missing != 0:
        return missing
    a = _tell(work, n, k, m, 0, weight, scale, zero_point, bias, bias_dtype, x, dtype, out)
    sums = _double_at(a[_SUMS])
    for token in range(m):
        values = _widen(a, token)
        if zero_point != 0:
            sums[token] = _sum(values, k)
    a[_CHUNK] = _chunk(n, k, threads)
    _run(launcher, worker, work, threads)
    return 0


@_entry(19)
def linear_int8(  # type: ignore[no-untyped-def]
    work,
    room,
    launcher,
    peaks_worker,
    prepare,
    worker,
    few,
    threads,
    n,
    k,
    m,
    weight,
    scale,
    zero_point,
    bias,
    bias_dtype,
    x,
    dtype,
    out,
):
    several = threads if m * k > _LITTLE else 1
    chunk = _chunk(n, k, threads)
    slice_bytes = max(_integer_slice(chunk, few), 4 * k, 4 * _PEAK_COLUMNS)
    floats = 0 if dtype == FLOAT32 else 4 * m * k
    sizes = (floats, 8 * 2 * m, 4 * 2 * m, 2 * m * few, 8 * few, (m + 1) * k, 4 * k)
    missing = _lay_out(work, room, threads, slice_bytes, sizes)
    if missing != 0:
        return missing
    a = _tell(work, n, k, m, few, weight, scale, zero_point, bias, bias_dtype, x, dtype, out)
    a[_CHUNK] = _PEAK_COLUMNS
    _run(launcher, peaks_worker, work, several)
    _choose_columns(a)
    ones, second_steps = _uint8_at(a[_BYTES] + m * k), _float_at(a[_STEPS] + 4 * m)
    for i in range(k):
        ones[i] = np.uint8(1)
    for token in range(m):
        second_steps[token] = np.float32(0.0)
    _run(launcher, prepare, work, several)
    a[_CHUNK] = chunk
    _run(launcher, worker, work, threads)
    return 0


@_entry(11)
def expand(work, room, launcher, worker, threads, n, k, weight, scale, zero_point, out):  # type: ignore[no-untyped-def]
    return _by_rows(work, room, launcher, worker, threads, n, k, weight, scale, zero_point, 0, out)


@_entry(11)
def encode(work, room, launcher, worker, threads, n, k, weight, codes, scale, zero_point):  # type: ignore[no-untyped-def]
    return _by_rows(work, room, launcher, worker, threads, n, k, 0, scale, zero_point, weight, codes)


PREPARE, INTEGERS, FLOAT, EXPAND, ENCODE, PEAKS, PREPARE_BYTES = (
    worker.address
    for worker in (
        _prepare,
        _integer_worker,
        _float_worker,
        _expand_worker,
        _encode_worker,
        _peaks_worker,
        _bytes_worker,
    )
)
HALVES = _half_worker.address if HALF else 0
CACHE.seal()
