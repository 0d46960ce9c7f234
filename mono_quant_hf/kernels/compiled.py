"""The inner loops, compiled by Numba for the processor they run on. All of them, in this one file: Numba's
cache on disk notices a change of the file a function stands in, and of no other.

Three levels, bottom up:

1. *tile*: the dot products of R rows of the weight with T rows of x, all kept in registers, written as LLVM
   vectors, since no loop that Numba accepts becomes `vpmaddwd` reliably;
2. *worker*: takes chunks of rows off a shared counter until none are left; one runs in each thread;
3. *entry*: what Python calls, with addresses as integers (unpacking arrays costs more than a small layer).

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

numba: Any = _numba  # a type checker cannot follow what these two make of a function
intrinsic: Any = _intrinsic

# ---------------------------------------------------------------- the processor

_TRIPLE, _CPU, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
_HAS = set(_FEATURES.split(","))  # what Numba compiles for, which its settings can make less than the host
X86 = _TRIPLE.startswith(("x86_64", "i686"))
VECTOR_BYTES = 64 if "+avx512bw" in _HAS else 32 if "+avx2" in _HAS else 16
HALF = "+f16c" in _HAS or _TRIPLE.startswith(("aarch64", "arm64"))  # float16 to float32 in hardware
_LANES = VECTOR_BYTES // 4
_ROWS = 4
_TOKENS = 4 if VECTOR_BYTES == 64 or not X86 else 2  # 4 x 4 accumulators need 32 registers, 4 x 2 need 16

# |codes of x| <= 32767 and |codes of w| <= 128, so 511 products fit one int32; lanes are added as floats.
LARGEST = 32767
_LONGEST = 510 * _LANES
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
_uint16_at, _float_at, _double_at = _pointer(types.uint16), _pointer(types.float32), _pointer(types.float64)


@intrinsic
def _next(typing_context, address):  # type: ignore[no-untyped-def]
    """The int64 at `address`, raised by one for whoever asks next."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", where, ir.Constant(_I64, 1), "monotonic")

    return types.int64(types.int64), generate


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


def _tile(kind: str, rows: int, tokens: int, lanes: int) -> Any:
    """out[r, t] += sum over k < steps * width of w[r, k] * x[t, k]; strides in bytes, `out` float32.

    `kind` names the two operands: "int8 int16" multiplies in integers, two products to a lane where the
    processor can (the caller keeps the sums within int32); "int8 float" and "half float" in float32.
    """
    paired = kind == "int8 int16" and X86 and lanes > 1
    width = lanes * (2 if paired else 1)
    multiply_add = {
        16: "llvm.x86.avx512.pmaddw.d.512",
        8: "llvm.x86.avx2.pmadd.wd",
        4: "llvm.x86.sse2.pmadd.wd",
    }
    integer = kind == "int8 int16"
    w_item, w_size = (ir.HalfType(), 2) if kind.startswith("half") else (_I8, 1)
    x_item, x_size = (_I16, 2) if integer else (_FLOAT, 4)
    sum_type = ir.VectorType(_I32 if integer else _FLOAT, lanes)
    float_type = ir.VectorType(_FLOAT, lanes)

    @intrinsic
    def tile(typing_context, w, w_stride, x, x_stride, steps, out):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            w, w_stride, x, x_stride, steps, out = args

            def load(base, index, item, size):  # type: ignore[no-untyped-def]
                address = builder.add(base, builder.mul(index, ir.Constant(_I64, width * size)))
                value = builder.load(builder.inttoptr(address, ir.VectorType(item, width).as_pointer()))
                value.align = size
                return value

            def widen(value):  # type: ignore[no-untyped-def]
                if integer:
                    return builder.sext(value, ir.VectorType(_I16 if paired else _I32, width))
                if value.type.element == _FLOAT:
                    return value
                convert = builder.fpext if w_size == 2 else builder.sitofp
                return convert(value, float_type)

            def accumulate(total, a, b):  # type: ignore[no-untyped-def]
                if paired:
                    pair = ir.VectorType(_I16, width)
                    function = ir.FunctionType(sum_type, [pair, pair])
                    product = cgutils.get_or_insert_function(builder.module, function, multiply_add[lanes])
                    return builder.add(total, builder.call(product, [a, b]))
                if integer:
                    return builder.add(total, builder.mul(a, b))
                return builder.fadd(total, builder.fmul(a, b, flags=["contract"]), flags=["contract"])

            def base(first, stride, count):  # type: ignore[no-untyped-def]
                return [builder.add(first, builder.mul(stride, ir.Constant(_I64, i))) for i in range(count)]

            w_rows, x_rows = base(w, w_stride, rows), base(x, x_stride, tokens)
            zero = ir.Constant(sum_type, None)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(tokens)] for _ in range(rows)]
            with cgutils.for_range(builder, steps) as loop:
                w_values = [widen(load(row, loop.index, w_item, w_size)) for row in w_rows]
                for t in range(tokens):
                    x_value = load(x_rows[t], loop.index, x_item, x_size)
                    x_value = x_value if paired else widen(x_value)
                    for r in range(rows):
                        total = builder.load(sums[r][t])
                        builder.store(accumulate(total, w_values[r], x_value), sums[r][t])
            across = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(_FLOAT, [_FLOAT, float_type]),
                f"llvm.vector.reduce.fadd.v{lanes}f32",
            )
            for r in range(rows):
                for t in range(tokens):
                    total = builder.load(sums[r][t])
                    if integer:
                        total = builder.sitofp(total, float_type)
                    where = builder.add(out, ir.Constant(_I64, 4 * (r * tokens + t)))
                    where = builder.inttoptr(where, _FLOAT.as_pointer())
                    total = builder.call(across, [ir.Constant(_FLOAT, -0.0), total], fastmath=["reassoc"])
                    builder.store(builder.fadd(builder.load(where), total), where)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return tile


_WIDE = 2 * _LANES if X86 else _LANES  # how many k one step of an integer tile takes
_int_4t, _int_41 = _tile("int8 int16", _ROWS, _TOKENS, _LANES), _tile("int8 int16", _ROWS, 1, _LANES)
_int_42 = _tile("int8 int16", _ROWS, 2, _LANES)
_int_11, _int_tail = _tile("int8 int16", 1, 1, _LANES), _tile("int8 int16", 1, 1, 1)
_code_41, _code_11 = _tile("int8 float", _ROWS, 1, _LANES), _tile("int8 float", 1, 1, _LANES)
_code_tail = _tile("int8 float", 1, 1, 1)
if HALF:
    _half_4t, _half_41 = _tile("half float", _ROWS, _TOKENS, _LANES), _tile("half float", _ROWS, 1, _LANES)
    _half_11, _half_tail = _tile("half float", 1, 1, _LANES), _tile("half float", 1, 1, 1)

# ---------------------------------------------------------------- compiling

CACHED = True


def _compile(kind: Any, *args: Any, **options: Any) -> Any:
    """`numba.njit` or `numba.cfunc` with the cache on disk, or without it where no folder can be written."""

    def decorate(function: Any) -> Any:
        global CACHED
        options.update(error_model="numpy")
        if kind is numba.njit:
            options.update(nogil=True)
        try:
            return kind(*args, cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            CACHED = False
            return kind(*args, **options)(function)

    return decorate


def _inline(function: Any) -> Any:
    return _compile(numba.njit)(function)


_worker = _compile(numba.cfunc, types.void(types.voidptr))

# ---------------------------------------------------------------- what a worker is told: int64 slots

(
    _COUNTER,  # next chunk of rows
    _PREPARED,  # next token to prepare
    _CHUNK,  # rows in a chunk
    _N,
    _K,
    _M,
    _WEIGHT,  # addresses from here on; 0: there is none
    _SCALE,
    _ZERO_POINT,
    _BIAS,
    _BIAS_DTYPE,
    _X,  # as given
    _DTYPE,  # of x and of the result
    _OUT,
    _FLOATS,  # x in float32 [M, K]
    _SUMS,  # of the rows of x, or of their codes: float64 [2 M]
    _CODES,  # of x: int16 [2 M, K]; rows M to 2 M are second planes
    _STEPS,  # the scale of each row of codes: float32 [2 M]; a second plane of 0 is not there, a first of -1
    _SLOTS,  # has no codes (NaN, infinite or tiny values) and is computed in floats
) = range(19)


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
def _widen(a, token):  # type: ignore[no-untyped-def]
    """Row `token` of x in float32: the address of it."""
    k = a[_K]
    floats = a[_FLOATS] + 4 * k * token
    if a[_DTYPE] != FLOAT32:
        source, target = _uint16_at(a[_X] + 2 * k * token), _int32_at(floats)
        for i in range(k):
            target[i] = np.int32(np.int32(source[i]) << np.int32(16))
    return floats


@_compile(numba.njit, fastmath={"reassoc", "nsz", "contract"})
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


@_compile(numba.njit, fastmath={"reassoc", "nsz", "contract"})
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
    a = numba.carray(work, (_SLOTS,), np.int64)
    counter = a.ctypes.data + 8 * _PREPARED
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
    """sums[r, t] = w[r] . x[t], int8 by int16, `_LONGEST` products at a time."""
    _zero(sums, rows * tokens)
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
                    place = sums + 4 * (r * tokens + t)
                    _int_tail(w + done + k * r, 0, x + 2 * (done + k * t), 0, begin - done, place)


@_inline
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
def _finish_integers(a, first, rows, token, tokens, sums, extra):  # type: ignore[no-untyped-def]
    k, m = a[_K], a[_M]
    steps, totals, dots = _float_at(a[_STEPS]), _double_at(a[_SUMS]), _float_at(sums)
    for r in range(rows):
        row = first + r
        zero_point = np.int64(0)
        if a[_ZERO_POINT] != 0:
            zero_point = np.int64(_int8_at(a[_ZERO_POINT])[row])
        for i in range(tokens):
            t = token + i
            step = steps[t]
            if step < np.float32(0.0):
                total = _plain_dot(a[_WEIGHT] + k * row, a[_FLOATS] + 4 * k * t, k, zero_point)
            else:
                total = (np.float64(dots[r * tokens + i]) - zero_point * totals[t]) * np.float64(step)
                if steps[m + t] > np.float32(0.0):
                    _integer_dots(1, 1, a[_WEIGHT] + k * row, a[_CODES] + 2 * k * (m + t), k, extra)
                    left = np.float64(_float_at(extra)[0]) - zero_point * totals[m + t]
                    total += left * np.float64(steps[m + t])
            _finish(a, row, t, total)


@_worker
def _int16_worker(work):  # type: ignore[no-untyped-def]
    a = numba.carray(work, (_SLOTS,), np.int64)
    n, k, m, chunk = a[_N], a[_K], a[_M], a[_CHUNK]
    scratch = np.empty(_ROWS * _TOKENS + 1, np.float32)
    sums = scratch.ctypes.data
    extra = sums + 4 * _ROWS * _TOKENS
    counter = a.ctypes.data + 8 * _COUNTER
    while True:
        first = _next(counter) * chunk
        if first >= n:
            return
        last = min(first + chunk, n)
        whole = first + (last - first) // _ROWS * _ROWS
        token = 0
        while token < m:  # a tile's rows of x stay in the nearest cache while the chunk passes by
            tokens = _TOKENS if m - token >= _TOKENS else 2 if m - token >= 2 else 1
            x = a[_CODES] + 2 * k * token
            for row in range(first, whole, _ROWS):
                _integer_dots(_ROWS, tokens, a[_WEIGHT] + k * row, x, k, sums)
                _finish_integers(a, row, _ROWS, token, tokens, sums, extra)
            for row in range(whole, last):
                for i in range(tokens):
                    _integer_dots(1, 1, a[_WEIGHT] + k * row, x + 2 * k * i, k, sums)
                    _finish_integers(a, row, 1, token + i, 1, sums, extra)
            token += tokens


@_worker
def _float_worker(work):  # type: ignore[no-untyped-def]
    """int8 codes by float32."""
    a = numba.carray(work, (_SLOTS,), np.int64)
    n, k, m, chunk = a[_N], a[_K], a[_M], a[_CHUNK]
    scratch = np.empty(_ROWS, np.float32)
    sums = scratch.ctypes.data
    counter = a.ctypes.data + 8 * _COUNTER
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
                    total = np.float64(scratch[r])
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
        a = numba.carray(work, (_SLOTS,), np.int64)
        n, k, m, chunk = a[_N], a[_K], a[_M], a[_CHUNK]
        scratch = np.empty(_ROWS * _TOKENS, np.float32)
        sums = scratch.ctypes.data
        counter = a.ctypes.data + 8 * _COUNTER
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
                            place = r * tokens + i
                            if done < k:
                                at_w, at_x = w + 2 * (k * r + done), x + 4 * (k * i + done)
                                _half_tail(at_w, 0, at_x, 0, k - done, sums + 4 * place)
                            _finish(a, row + r, token + i, np.float64(scratch[place]))
                    row += rows
                token += tokens


@_worker
def _expand_worker(work):  # type: ignore[no-untyped-def]
    a = numba.carray(work, (_SLOTS,), np.int64)
    n, k, chunk = a[_N], a[_K], a[_CHUNK]
    counter = a.ctypes.data + 8 * _COUNTER
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


@_worker
def _tokens_worker(work):  # type: ignore[no-untyped-def]
    """Rows of float32 to int8 codes with a scale and the sum of the codes each."""
    a = numba.carray(work, (_SLOTS,), np.int64)
    k, m = a[_K], a[_M]
    steps, sums = _float_at(a[_STEPS]), _double_at(a[_SUMS])
    counter = a.ctypes.data + 8 * _PREPARED
    while True:
        token = _next(counter)
        if token >= m:
            return
        values, codes = _float_at(a[_FLOATS] + 4 * k * token), _int8_at(a[_CODES] + k * token)
        bits, _ = _size(a[_FLOATS] + 4 * k * token, k)
        largest = _bits_to_float(bits)
        step = largest / np.float32(127.0)
        steps[token] = step
        inverse = np.float32(0.0)
        if largest >= np.float32(1e-30) and bits < 0x7F800000:
            inverse = np.float32(1.0) / step
        total = np.int32(0)
        if bits < 0x7F800000:
            for i in range(k):
                code = np.int32(np.rint(values[i] * inverse))
                codes[i] = np.int8(code)
                total += code
        else:  # NaN or infinite: so is the step, and the result of this token
            for i in range(k):
                codes[i] = np.int8(0)
        sums[token] = np.float64(total)


@_worker
def _scaled_worker(work):  # type: ignore[no-untyped-def]
    """out[token, row] += (products - zero_point * sum of the token's codes) * scale * step + bias."""
    a = numba.carray(work, (_SLOTS,), np.int64)
    n, m = a[_N], a[_M]
    steps, sums, scale = _float_at(a[_STEPS]), _double_at(a[_SUMS]), _float_at(a[_SCALE])
    zero_points, bias = _int8_at(a[_ZERO_POINT]), _float_at(a[_BIAS])
    counter = a.ctypes.data + 8 * _COUNTER
    while True:
        token = _next(counter)
        if token >= m:
            return
        products, out = _int32_at(a[_WEIGHT] + 4 * n * token), _float_at(a[_OUT] + 4 * n * token)
        step, total = steps[token], np.int32(sums[token])
        if a[_ZERO_POINT] != 0:
            for row in range(n):
                corrected = np.int32(products[row] - np.int32(np.int32(zero_points[row]) * total))
                out[row] += np.float32(corrected) * (scale[row] * step)
        else:
            for row in range(n):
                out[row] += np.float32(products[row]) * (scale[row] * step)
        if a[_BIAS] != 0:
            for row in range(n):
                out[row] += bias[row]


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
    a = numba.carray(work, (_SLOTS,), np.int64)
    n, k, chunk = a[_N], a[_K], a[_CHUNK]
    counter = a.ctypes.data + 8 * _COUNTER
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


@_inline
def _run(launcher, worker, a, threads):  # type: ignore[no-untyped-def]
    if threads <= 1:
        _call(worker, a.ctypes.data)
    else:
        _fork_join(launcher, worker, a.ctypes.data, threads)


@_inline
def _chunk(n, row_bytes, threads):  # type: ignore[no-untyped-def]
    rows = min(64, _NEAR // max(row_bytes, 1), n // (4 * threads)) // _ROWS * _ROWS
    return max(rows, _ROWS)


@_inline
def _begin(n, k, m, weight, scale, zero_point, bias, bias_dtype, x, dtype, out):  # type: ignore[no-untyped-def]
    a = np.empty(_SLOTS, np.int64)
    a[_COUNTER], a[_PREPARED], a[_N], a[_K], a[_M] = 0, 0, n, k, m
    a[_WEIGHT], a[_SCALE], a[_ZERO_POINT] = weight, scale, zero_point
    a[_BIAS], a[_BIAS_DTYPE], a[_X], a[_DTYPE], a[_OUT] = bias, bias_dtype, x, dtype, out
    return a


@_compile(numba.njit, types.void(*[types.int64] * 15))
def linear_int16(  # type: ignore[no-untyped-def]
    launcher, prepare, worker, threads, n, k, m, weight, scale, zero_point, bias, bias_dtype, x, dtype, out
):
    a = _begin(n, k, m, weight, scale, zero_point, bias, bias_dtype, x, dtype, out)
    codes, steps, sums = (
        np.empty(2 * m * k, np.int16),
        np.empty(2 * m, np.float32),
        np.empty(2 * m, np.float64),
    )
    floats = np.empty(m * k if dtype != FLOAT32 else 0, np.float32)
    a[_CODES], a[_STEPS], a[_SUMS] = codes.ctypes.data, steps.ctypes.data, sums.ctypes.data
    a[_FLOATS] = floats.ctypes.data if dtype != FLOAT32 else x
    _run(launcher, prepare, a, threads if m * k > _LITTLE else 1)
    if n * k * m < _LITTLE:
        threads = 1
    a[_CHUNK] = _chunk(n, k, threads)
    _run(launcher, worker, a, threads)
    # read after the threads are done, so that the arrays live as long
    a[_COUNTER] = codes.size + steps.size + sums.size + floats.size


@_compile(numba.njit, types.void(*[types.int64] * 14))
def linear_float(  # type: ignore[no-untyped-def]
    launcher, worker, threads, n, k, m, weight, scale, zero_point, bias, bias_dtype, x, dtype, out
):
    a = _begin(n, k, m, weight, scale, zero_point, bias, bias_dtype, x, dtype, out)
    sums = np.empty(m, np.float64)
    floats = np.empty(m * k if dtype != FLOAT32 else 0, np.float32)
    a[_SUMS] = sums.ctypes.data
    a[_FLOATS] = floats.ctypes.data if dtype != FLOAT32 else x
    for token in range(m):
        values = _widen(a, token)
        if zero_point != 0:
            sums[token] = _sum(values, k)
    if n * k * m < _LITTLE:
        threads = 1
    a[_CHUNK] = _chunk(n, k, threads)
    _run(launcher, worker, a, threads)
    a[_COUNTER] = sums.size + floats.size


@_compile(numba.njit, types.void(*[types.int64] * 9))
def expand(launcher, worker, threads, n, k, weight, scale, zero_point, out):  # type: ignore[no-untyped-def]
    a = _begin(n, k, 0, weight, scale, zero_point, 0, 0, 0, 0, out)
    if n * k < _LITTLE // 4:
        threads = 1
    a[_CHUNK] = _chunk(n, 4 * k, threads)
    _run(launcher, worker, a, threads)


@_compile(numba.njit, types.void(*[types.int64] * 9))
def quantize_tokens(launcher, worker, threads, k, m, values, codes, steps, sums):  # type: ignore[no-untyped-def]
    a = _begin(0, k, m, 0, 0, 0, 0, 0, 0, 0, 0)
    a[_FLOATS], a[_CODES], a[_STEPS], a[_SUMS] = values, codes, steps, sums
    _run(launcher, worker, a, threads if m * k > _LITTLE else 1)


@_compile(numba.njit, types.void(*[types.int64] * 12))
def add_scaled(  # type: ignore[no-untyped-def]
    launcher, worker, threads, n, m, products, scale, zero_point, bias, steps, sums, out
):
    a = _begin(n, 0, m, products, scale, zero_point, bias, 0, 0, 0, out)
    a[_STEPS], a[_SUMS] = steps, sums
    _run(launcher, worker, a, threads if m * n > _LITTLE else 1)


@_compile(numba.njit, types.void(*[types.int64] * 9))
def encode(launcher, worker, threads, n, k, weight, codes, scale, zero_point):  # type: ignore[no-untyped-def]
    a = _begin(n, k, 0, 0, scale, zero_point, 0, 0, weight, 0, codes)
    if n * k < _LITTLE // 4:
        threads = 1
    a[_CHUNK] = _chunk(n, 4 * k, threads)
    _run(launcher, worker, a, threads)


PREPARE, INT16, FLOAT, EXPAND, TOKENS, SCALED, ENCODE = (
    worker.address
    for worker in (
        _prepare,
        _int16_worker,
        _float_worker,
        _expand_worker,
        _tokens_worker,
        _scaled_worker,
        _encode_worker,
    )
)
HALVES = _half_worker.address if HALF else 0
