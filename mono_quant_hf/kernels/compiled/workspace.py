"""The memory that a product works in: one piece, which the caller owns for the length of the call (see cpu.py).

It begins with numbers of eight bytes, the fields of `a` everywhere. `lay_out` is the only place that divides the rest.
"""

import numba
import numpy as np
from numba import types

from .instructions import (
    CACHE,
    OPTIONS,
    at,
    in_each_thread,
    inline,
    inline_always,
    inline_first,
    instruction,
    named,
    same_bits,
    take_next,
)

_GIVEN = (
    "launcher",  # the address of GOMP_parallel
    "threads",
    "n",
    "k",
    "m",
    "byte_planes",  # planes of int8 codes that a token of x has at least; 0: its codes are int16
    "weight",  # addresses of the caller's; 0: there is none
    "scale",
    "zero_point",
    "bias",
    "bias_dtype",
    "x",  # as given
    "dtype",  # of x and of the result
    "out",
)
_PARTS = (  # where they begin
    "slices",  # one for each worker
    "floats",  # x in float32 [M, K]
    "sums",  # of the rows of x, or of the codes of a token in steps of its first plane, where that is: float64
    "steps",  # the scale of the first plane of a token, and how it fits into that of each further one: float64
    "codes",  # planes of x, [planes, K]: int16, or uint8 with 128 added and a last one that is all ones
    "largest",  # |x| of a token: float32 [M]
    "planes",  # how many a token has: int64 [M]; none where it has no codes and is computed in floats
    "starts",  # the first plane of a token: int64 [M]
    "tokens",  # to which a plane belongs, of a token's first one: int64
)
_FIELDS = np.dtype(
    [
        (name, np.int64)
        for name in (
            *_GIVEN,
            *_PARTS,
            "slice_bytes",
            "address",  # of the workspace
            "room",  # its bytes
            "stride",  # bytes of a plane of codes
            "panels",  # whether the weight is turned into some
            "rows",  # of codes: the planes of all tokens
            "without_codes",  # how many tokens are computed in floats
            "chunk",  # rows, tokens or columns in a chunk
            "end",  # of them all
            "counter",  # the next chunk
            "workers",  # how many have begun, each with a slice of its own
        )
    ]
)
_FIELDS_BYTES = _FIELDS.itemsize
_FIRST_PART, _COUNTER, _WORKERS = (_FIELDS.fields[name][1] for name in ("slices", "counter", "workers"))
_RECORD = numba.from_dtype(_FIELDS)

FLOAT32, BFLOAT16 = 0, 1  # how the dtype of x, of the bias and of the result is told to an entry
LITTLE = 1 << 17  # multiply-adds that one thread finishes before a second could start
_NEAR = 1 << 18  # bytes of weight a chunk may take of a core's own cache
_LINE = 64  # bytes: what a part begins at a multiple of, so that no two workers write one line of the cache


@instruction(_RECORD, types.int64)
def _fields_at(context, builder, address):
    return builder.inttoptr(address, context.get_value_type(_RECORD))


class Entry:
    """What Python calls with the address of a workspace, its bytes (4096 or more), and a tuple: `_GIVEN`.

    All are numbers, since unpacking arrays costs more than a small layer. It gives the bytes that the workspace must
    have, and has done nothing, where the one it was given is too small; else 0.
    """

    def __init__(self, compute):
        self._compute = compute
        self._dispatcher = None  # owns what was compiled

    def compiled(self, name):
        """The function itself: what the dispatcher would call, in a third of its time. `name` is for people."""
        signature = types.int64(types.int64, types.int64, types.UniTuple(types.int64, len(_GIVEN)))
        if self._dispatcher is None:
            self._dispatcher = CACHE.compile(name, self._compute, signature, nogil=True, **OPTIONS)
        return self._dispatcher.overloads[signature.args].entry_point


@inline
def begin(address, room, given):
    """`a`, with what was given."""
    slots = at(np.int64, address)
    for i in range(len(given)):
        slots[i] = given[i]
    a = _fields_at(address)
    a.address, a.room = address, room
    return a


@inline
def _whole_lines(size):
    return (size + (_LINE - 1)) // _LINE * _LINE


@inline
def lay_out(a, slice_bytes, sizes):
    """0, and the parts in their places; or the bytes to have, where they are more than there is room for.

    `sizes` are the bytes of the parts after the slices, in their order; of what is left out there is none.
    """
    a.slice_bytes = _whole_lines(slice_bytes)
    place = _whole_lines(_FIELDS_BYTES)
    parts = at(np.int64, a.address + _FIRST_PART)
    parts[0] = a.address + place
    place += a.threads * a.slice_bytes
    for i in range(len(sizes)):
        parts[1 + i] = a.address + place
        place += _whole_lines(sizes[i])
    if a.dtype == FLOAT32:
        a.floats = a.x
    return place if place > a.room else 0


@inline
def own_slice(a):
    """The address of scratch that no other worker has."""
    return a.slices + a.slice_bytes * take_next(a.address + _WORKERS)


@inline
def next_chunk(a):
    """Where the next chunk begins that nobody has taken yet; past the end when all are."""
    return take_next(a.address + _COUNTER) * a.chunk


def passes(work):
    """The function `run(a, threads, end, chunk)`: work(a) in each thread, of which each takes chunks."""

    work = inline_first(work)

    @inline
    @named(passes, work)
    def worker(address):
        work(_fields_at(address))

    in_threads = in_each_thread(worker)

    @inline_first
    @named(passes, work)
    def run(a, threads, end, chunk):
        a.counter = a.workers = 0
        a.end, a.chunk = end, chunk
        in_threads(a.launcher, a.address, threads)

    return run


def by_chunks(body):
    """`passes` of the worker that calls body(a, first, last, own) for each of its chunks; `own` is its slice."""

    body = inline_first(body)

    @named(by_chunks, body)
    def work(a):
        end, chunk = a.end, a.chunk
        own = own_slice(a)
        while True:
            first = next_chunk(a)
            if first >= end:
                return
            body(a, first, min(first + chunk, end), own)

    return passes(work)


@inline
def rows_in_chunk(a, row_bytes, together):
    """So many that they stay in a core's own cache and the threads end at about the same time."""
    most = min(64, _NEAR // max(row_bytes, 1), a.n // (4 * a.threads))
    return max(most // together * together, together)


# ---------------------------------------------------------------- x, the bias and the result


@inline
def zero(floats, count):
    values = at(np.float32, floats)
    for i in range(count):
        values[i] = np.float32(0.0)


@inline
def widen_row(halves, count, floats):
    """bfloat16 to float32."""
    source, target = at(np.uint16, halves), at(np.int32, floats)
    for i in range(count):
        target[i] = np.int32(np.int32(source[i]) << np.int32(16))


@inline
def x_bytes(a):
    """What `widen` needs of the workspace."""
    return 0 if a.dtype == FLOAT32 else 4 * a.m * a.k


@inline
def widen(a, token):
    """Row `token` of x in float32: the address of it."""
    k = a.k
    floats = a.floats + 4 * k * token
    if a.dtype != FLOAT32:
        widen_row(a.x + 2 * k * token, k, floats)
    return floats


@inline
def read_bias(a, row):
    if a.bias_dtype == FLOAT32:
        return at(np.float32, a.bias)[row]
    return same_bits(np.float32, np.int32(np.int32(at(np.uint16, a.bias)[row]) << np.int32(16)))


@inline
def write(a, index, value):
    if a.dtype == FLOAT32:
        at(np.float32, a.out)[index] = value
        return
    bits = np.int64(same_bits(np.int32, value)) & 0xFFFFFFFF
    if value != value:
        bits |= 0x400000  # stays a NaN when cut
    else:
        bits += 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    at(np.uint16, a.out)[index] = np.uint16(bits >> 16)


@inline_always
def finish(a, row, token, total):
    """Scale, add the bias, write: y[token, row] of a dot product with (code - zero-point)."""
    if a.scale != 0:
        total *= np.float64(at(np.float32, a.scale)[row])
    value = np.float32(total)
    if a.bias != 0:
        value += read_bias(a, row)
    write(a, token * a.n + row, value)
