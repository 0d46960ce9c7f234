"""What Numba has no words for: addresses, counters that threads share, the threads themselves; and how it compiles.

No memory is allocated by what is compiled here, nor counted: Numba is told to do without its runtime (`_nrt=False`), so
that a function that makes an array is not compiled at all.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .cache import Cache

CACHE = Cache()
OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
inline = numba.njit(**OPTIONS)  # compiled into its callers, and cached with them
inline_always = numba.njit(**OPTIONS, forceinline=True)  # where a call costs as much as what it does
inline_first = numba.njit(
    **OPTIONS, inline="always"
)  # by Numba, so that LLVM optimizes it in its caller alone
inline_summing = numba.njit(**OPTIONS, fastmath={"reassoc", "nsz", "contract"})  # in any order


def named(maker: Any, *made_of: Any) -> Callable[[Any], Any]:
    """Give a function that `maker` makes a name of its own, by what it is made of.

    What two processes compiled may meet in a third, which reads both from the cache. Numba tells functions of one name
    apart by a number that each process counts from the start, so that one entry would run what is another's.
    """

    def rename(function: Any) -> Any:
        parts = [getattr(part, "py_func", part) for part in made_of]
        names = [getattr(part, "__qualname__", str(part)) for part in parts]
        function.__qualname__ = f"{maker.__qualname__}({', '.join(names)}).{function.__name__}"
        return function

    return rename


def instruction(returns: Any, *takes: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function of these types for compiled code, made of one that writes its LLVM: (context, builder, *arguments)."""

    def decorate(generate: Callable[..., Any]) -> Any:
        def write(context, builder, signature, arguments):
            result = generate(context, builder, *arguments)
            return context.get_dummy_value() if result is None else result

        def define(*_):
            return returns(*takes), write

        names = ["typing_context", *(f"argument{i}" for i in range(len(takes)))]
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        define.__signature__ = Signature(parameters)
        return intrinsic(define)

    return decorate


# ---------------------------------------------------------------- addresses and bits

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF_FLOAT, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_OPAQUE = I8.as_pointer()


@intrinsic
def at(typing_context, dtype, address):
    """The numbers of this dtype in memory: `at(np.float32, address)[i]`."""
    pointer = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(pointer))

    return pointer(dtype, types.int64), generate


@intrinsic
def same_bits(typing_context, dtype, value):
    """The number of this dtype, as large as that of `value`, that has its bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[1], context.get_value_type(dtype.dtype))

    return dtype.dtype(dtype, value), generate


@instruction(types.int64, types.int64)
def take_next(context, builder, address):
    """The int64 at `address`, raised by one for whoever asks next."""
    where = builder.inttoptr(address, I64.as_pointer())
    return builder.atomic_rmw("add", where, ir.Constant(I64, 1), "monotonic")


@instruction(types.void, types.int64)
def prefetch(context, builder, address):
    """Ask for the cache line at `address`, without waiting."""
    function = ir.FunctionType(ir.VoidType(), [_OPAQUE, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    read, second_level, data = (ir.Constant(I32, value) for value in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, _OPAQUE), read, second_level, data])


# ---------------------------------------------------------------- threads


def in_each_thread(body: Any) -> Any:
    """run(launcher, work, threads): body(work) on each of so many threads, on this one alone if it is but one.

    The threads are those of torch itself: `launcher` is the address of GOMP_parallel(worker, work, threads, flags) in
    the OpenMP runtime that torch is linked to. A second pool would fight with torch's, whose threads spin for a while
    after each of their own loops.
    """

    @instruction(types.void, *[types.int64] * 3)
    def run(context, builder, launcher, work, threads):
        body.compile((types.int64,))
        compiled = body.overloads[(types.int64,)]
        context.add_linking_libs([compiled.library])
        kind = ir.FunctionType(ir.VoidType(), [_OPAQUE])
        worker = ir.Function(builder.module, kind, builder.module.get_unique_name("worker"))
        worker.linkage = "internal"
        inside = ir.IRBuilder(worker.append_basic_block())
        argument = inside.ptrtoint(worker.args[0], I64)
        context.call_internal_no_propagate(inside, compiled.fndesc, compiled.signature, [argument])
        inside.ret_void()
        launch = ir.FunctionType(ir.VoidType(), [kind.as_pointer(), _OPAQUE, I32, I32]).as_pointer()
        work = builder.inttoptr(work, _OPAQUE)
        with builder.if_else(builder.icmp_signed(">", threads, ir.Constant(I64, 1))) as (several, one):
            with several:
                arguments = [worker, work, builder.trunc(threads, I32), ir.Constant(I32, 0)]
                builder.call(builder.inttoptr(launcher, launch), arguments)
            with one:
                builder.call(worker, [work])

    return run
