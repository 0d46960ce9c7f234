"""Numba's own threads in the place of torch's, where torch has no OpenMP runtime that can be called.

The threading layer is the one Numba is set to; it may fight with torch's threads (see compiled.py), so this
is second choice.
"""

from numba import types

from .compile_cache import Cache
from .compiled import _call, numba

_cache = Cache(__file__)


@_cache.compile(
    numba.njit, types.void(types.int64, types.int64, types.int64), parallel=True, error_model="numpy"
)
def _share(worker, work, threads):  # type: ignore[no-untyped-def]
    for _ in numba.prange(threads):
        _call(worker, work)


@_cache.compile(numba.cfunc, types.void(types.int64, types.int64, types.uint32, types.uint32))
def _launch(worker, work, threads, flags):  # type: ignore[no-untyped-def]
    """The signature of GOMP_parallel."""
    _share(worker, work, threads)


LAUNCHER = _launch.address
_cache.seal()
