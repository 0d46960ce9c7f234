"""Numba's own threads in the place of torch's, where torch has no OpenMP runtime that can be called.

The threading layer is the one Numba is set to; it may fight with torch's threads (see `in_each_thread`), so this is
second choice.
"""

import numba
from llvmlite import ir
from numba import types

from .instructions import CACHE, I8, instruction


@instruction(types.void, types.int64, types.int64)
def _call(context, builder, worker, work):
    """worker(work), on this thread alone."""
    opaque = I8.as_pointer()
    function = ir.FunctionType(ir.VoidType(), [opaque]).as_pointer()
    builder.call(builder.inttoptr(worker, function), [builder.inttoptr(work, opaque)])


@CACHE.compile(types.void(types.int64, types.int64, types.int64), parallel=True, error_model="numpy")
def _share(worker, work, threads):
    for _ in numba.prange(threads):
        _call(worker, work)


@numba.cfunc(types.void(types.int64, types.int64, types.uint32, types.uint32))
def _launch(worker, work, threads, flags):
    """The signature of GOMP_parallel."""
    _share(worker, work, threads)


LAUNCHER = _launch.address
CACHE.seal()
