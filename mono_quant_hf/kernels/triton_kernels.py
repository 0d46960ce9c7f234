"""Triton kernels for int8 codes [N, K] with a scale and zero-point for each row, and for float16 weights.

Nothing here knows torch: `gpu` launches them. N, K and M are run-time values, no sum is split over programs, and
nothing is added atomically: an output is one sum in one order, whatever else is in the batch.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(program, size_m, size_n, GROUP_M: tl.constexpr):
    """Which tile a program computes: GROUP_M tiles of tokens by all of the rows, so that both stay in the cache."""
    group = program // (GROUP_M * size_n)
    first = group * GROUP_M
    height = min(size_m - first, GROUP_M)
    within = program % (GROUP_M * size_n)
    return first + within % height, within // height


@triton.jit
def matvec(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    N, K,
    HAS_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program multiplies BLOCK_N rows by one token. Products and sums in float32."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_in = rows < N
    columns = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + rows[:, None].to(tl.int64) * K + columns[None, :]
    x_ptrs = x_ptr + columns
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if HAS_ZERO:
        zero = tl.load(zero_ptr + rows, mask=rows_in, other=0).to(tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, mask=rows_in[:, None], other=0)
        else:
            columns_in = columns < K - start
            x = tl.load(x_ptrs, mask=columns_in, other=0.0)
            w = tl.load(w_ptrs, mask=rows_in[:, None] & columns_in[None, :], other=0)
        wide = w.to(tl.float32)
        if HAS_ZERO:
            wide -= zero[:, None]
        total += wide * x.to(tl.float32)[None, :]
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    result = tl.sum(total, axis=1)
    if HAS_SCALE:
        result *= tl.load(scale_ptr + rows, mask=rows_in, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + rows, mask=rows_in, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, result.to(out_ptr.dtype.element_ty), mask=rows_in)


@triton.jit
def matmul(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, ends_ptr, out_ptr,
    M, N, K, EXPERTS, stride_xm, stride_om,
    HAS_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Tiles of tokens by rows. code - zero_point lies in [-255, 255], which is exact in bfloat16 and float16.

    GROUPED: the tokens are sorted by expert, those of expert e end before `ends[e]`, and w is [EXPERTS, N, K]. Which
    expert a tile belongs to is counted here, so that the host need not wait to know.
    """
    size_n = tl.cdiv(N, BLOCK_N)
    first = 0
    end = M
    expert = 0
    if GROUPED:
        tile_m = tl.program_id(0) // size_n
        tile_n = tl.program_id(0) % size_n
        place = -1
        begin = 0
        passed = 0
        for e in range(EXPERTS):
            stop = tl.load(ends_ptr + e).to(tl.int32)
            tiles = tl.cdiv(stop - begin, BLOCK_M)
            here = (tile_m >= passed) & (tile_m < passed + tiles)
            first = tl.where(here, begin + (tile_m - passed) * BLOCK_M, first)
            end = tl.where(here, stop, end)
            expert = tl.where(here, e, expert)
            place = tl.where(here, 0, place)
            passed += tiles
            begin = stop
        if place < 0:
            return
    else:
        tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), size_n, GROUP_M)
        first = tile_m * BLOCK_M
    tokens = first + tl.arange(0, BLOCK_M)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    tokens_in = tokens < end
    rows_in = rows < N
    of_expert = tl.cast(expert, tl.int64) * N + rows
    x_ptrs = x_ptr + tokens[:, None].to(tl.int64) * stride_xm + columns[None, :]
    w_ptrs = w_ptr + of_expert[None, :] * K + columns[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if HAS_ZERO:
        zero = tl.load(zero_ptr + of_expert, mask=rows_in, other=0).to(dtype)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=tokens_in[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=rows_in[None, :], other=0)
        else:
            columns_in = columns < K - start
            x = tl.load(x_ptrs, mask=tokens_in[:, None] & columns_in[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=rows_in[None, :] & columns_in[:, None], other=0)
        wide = w.to(dtype)
        if HAS_ZERO:
            wide -= zero[None, :]
        total = tl.dot(x, wide, total)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if HAS_SCALE:
        total *= tl.load(scale_ptr + of_expert, mask=rows_in, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + of_expert, mask=rows_in, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + tokens[:, None].to(tl.int64) * stride_om + rows[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=tokens_in[:, None] & rows_in[None, :])


@triton.jit
def round_tokens(x_ptr, codes_ptr, step_ptr, sum_ptr, M, K, stride_xm, BLOCK_K: tl.constexpr):
    """int8 codes of one of M tokens for each program, their step, and their sum, which a zero-point multiplies."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + token * stride_xm + start + columns, mask=columns < K - start, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    # A sum that is not finite where an element is not: a maximum over the block would lose a NaN.
    spoiled = tl.sum(largest * 0.0, axis=0)
    step = tl.max(largest, axis=0) / 127.0 + spoiled
    inverse = tl.where(step > 0.0, 1.0 / step, 0.0)
    total = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        inside = columns < K - start
        x = tl.load(x_ptr + token * stride_xm + start + columns, mask=inside, other=0.0).to(tl.float32)
        # To the nearest, ties to even: that is what adding 1.5 * 2^23 leaves of the fraction.
        codes = ((x * inverse + 12582912.0) - 12582912.0).to(tl.int8)
        total += codes.to(tl.int32)
        tl.store(codes_ptr + token * K + start + columns, codes, mask=inside)
    tl.store(step_ptr + token, step)
    tl.store(sum_ptr + token, tl.sum(total, axis=0))


@triton.jit
def matmul_int8(
    x_ptr, step_ptr, sum_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    M, N, K, stride_om,
    HAS_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Codes by codes, summed in int32: (products - sum(x) * zero_point) * step * scale + bias."""
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    tokens_in = tokens < M
    rows_in = rows < N
    x_ptrs = x_ptr + tokens[:, None].to(tl.int64) * K + columns[None, :]
    w_ptrs = w_ptr + rows[None, :].to(tl.int64) * K + columns[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=tokens_in[:, None], other=0)
            w = tl.load(w_ptrs, mask=rows_in[None, :], other=0)
        else:
            columns_in = columns < K - start
            x = tl.load(x_ptrs, mask=tokens_in[:, None] & columns_in[None, :], other=0)
            w = tl.load(w_ptrs, mask=rows_in[None, :] & columns_in[:, None], other=0)
        total = tl.dot(x, w, total, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if HAS_ZERO:
        sums = tl.load(sum_ptr + tokens, mask=tokens_in, other=0)
        zero = tl.load(zero_ptr + rows, mask=rows_in, other=0).to(tl.int32)
        total -= sums[:, None] * zero[None, :]
    steps = tl.load(step_ptr + tokens, mask=tokens_in, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=rows_in, other=0.0)
    result = total.to(tl.float32) * (steps[:, None] * scale[None, :])
    if HAS_BIAS:
        result += tl.load(bias_ptr + rows, mask=rows_in, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + tokens[:, None].to(tl.int64) * stride_om + rows[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=tokens_in[:, None] & rows_in[None, :])


@triton.jit
def expand_rows(
    w_ptr, scale_ptr, zero_ptr, indices_ptr, out_ptr, N, K, TABLE,
    HAS_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOOK_UP: tl.constexpr,
):  # fmt: skip
    """(codes - zero_point) * scale in one pass, of every row or (LOOK_UP) of those at N indices into TABLE rows."""
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows_in = places < N
    inside = rows_in[:, None] & (columns[None, :] < K)
    rows = places
    if LOOK_UP:
        rows = tl.load(indices_ptr + places, mask=rows_in, other=0)
        tl.device_assert((rows >= 0) & (rows < TABLE), "an index is past the rows of the table")
    wide = tl.load(w_ptr + rows[:, None].to(tl.int64) * K + columns[None, :], mask=inside, other=0).to(
        tl.float32
    )
    if HAS_ZERO:
        wide -= tl.load(zero_ptr + rows, mask=rows_in, other=0).to(tl.float32)[:, None]
    if HAS_SCALE:
        wide *= tl.load(scale_ptr + rows, mask=rows_in, other=0.0)[:, None]
    tl.store(
        out_ptr + places[:, None].to(tl.int64) * K + columns[None, :],
        wide.to(out_ptr.dtype.element_ty),
        mask=inside,
    )
