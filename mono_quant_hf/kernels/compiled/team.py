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


def _share(worker, work, threads):
    for _ in numba.prange(threads):
        _call(worker, work)


_SIGNATURE = types.void(types.int64, types.int64, types.int64)
_SHARED = CACHE.compile("threads", _share, _SIGNATURE, parallel=True, error_model="numpy")


@numba.cfunc(types.void(types.int64, types.int64, types.uint32, types.uint32))
def _launch(worker, work, threads, flags):
    """The signature of GOMP_parallel."""
    _SHARED(worker, work, threads)


LAUNCHER = _launch.address
