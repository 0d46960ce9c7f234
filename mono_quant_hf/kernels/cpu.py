"""The compiled CPU kernels from Python's side: load them once, pass addresses, say what happened.

`float`: int8 codes (one token) or float16 weights, multiplied in float32 as they stream by.
`int16`: int8 codes by the tokens' values as codes of 16 bits, with a scale for each token.
`int8`: the same with codes of 8 bits, but for tokens whose values are far apart.
"""

import ctypes
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

log = logging.getLogger("mono_quant_hf")


@dataclass
class _Runtime:
    """What is known once the kernels were asked for: their module, what of it is compiled, or why there is none."""

    asked: bool = False
    compiled: ModuleType | None = None
    entries: dict[str, Callable[..., int]] = field(default_factory=dict)
    owners: list[object] = field(default_factory=list)  # of the entries' code
    missing: str = ""
    launcher: int = 0
    one_at_a_time: AbstractContextManager[object] | None = None
    forked: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


_runtime = _Runtime()


def _in_child() -> None:
    # The child of a fork has this thread alone: the others of the OpenMP team are gone, and waiting for them
    # would never end. A lock held by another thread at the fork would stay held, Python's of an import too.
    _runtime.forked = True
    if _runtime.lock.locked():
        _give_up("this process was forked while another thread compiled them")
        _runtime.asked = True
    _runtime.lock = threading.Lock()
    if _runtime.one_at_a_time is not None:
        _runtime.one_at_a_time = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def load() -> ModuleType | None:
    """The module of the kernels, of which nothing is compiled yet; None where they cannot be had."""
    if not _runtime.asked:
        with _runtime.lock:
            if not _runtime.asked:
                _load()
                _runtime.asked = True
    return _runtime.compiled


def ready(name: str) -> bool:
    """Whether an entry can be called: compiled, or read from the cache, when it is first asked for.

    Lines of log say which, and how long it took.
    """
    if name not in _runtime.entries and load() is not None:
        with _runtime.lock:
            if name not in _runtime.entries and _runtime.compiled is not None:
                # What is made here lives as long as the process, yet half of the time went into looking for garbage.
                collects = gc.isenabled()
                gc.disable()
                try:
                    _compile(name, _runtime.compiled)
                finally:
                    if collects:
                        gc.enable()
    return name in _runtime.entries


def compile_all() -> Path | None:
    """Every entry made `ready`: the folder of Numba's cache, or None where they are not compiled or not kept."""
    if (compiled := load()) is None or not all(ready(name) for name in compiled.ENTRIES):
        return None
    folder: Path | None = compiled.CACHE.folder
    return folder


def why_missing() -> str:
    """Why `load` gave None, for people."""
    return _runtime.missing


def _load() -> None:
    try:
        import numba

        if numba.config.DISABLE_JIT:
            _give_up("Numba's compiler is switched off (NUMBA_DISABLE_JIT)")
            return
        from . import compiled

        launcher, one_at_a_time = _launcher_of_torch(), None
        if not launcher:
            from .compiled import team

            launcher = team.LAUNCHER
            # Numba's workqueue layer ends the process when two threads use it at once, the others do not mind.
            one_at_a_time = threading.Lock()
    except (ImportError, OSError) as error:
        _give_up(f"Numba cannot be imported ({error})")
        return
    except Exception as error:  # whatever a compiler may say, or what an interrupted import left of it
        _give_up(_cannot_compile(error))
        return
    _runtime.launcher, _runtime.one_at_a_time, _runtime.compiled = launcher, one_at_a_time, compiled


def _compile(name: str, compiled: ModuleType) -> None:
    start = time.perf_counter()
    had_folder = compiled.CACHE.folder is not None
    compiled.CACHE.complete = True
    try:
        entry = compiled.ENTRIES[name].compiled(name)
    except Exception as error:  # whatever a compiler may say
        _give_up(_cannot_compile(error))
        return
    except BaseException:  # an interruption, after which Numba goes on with what it had half begun
        for module in [module for module in sys.modules if module.startswith(compiled.__name__)]:
            del sys.modules[module]
        _runtime.compiled, _runtime.asked = None, False
        raise
    seconds = time.perf_counter() - start
    if compiled.CACHE.folder is None:
        if had_folder or not _runtime.entries:
            log.warning(
                "The CPU kernels are compiled anew in every process: no folder of Numba's cache can be written. "
                "Set NUMBA_CACHE_DIR to one that can."
            )
    else:
        done = (
            "read from the cache" if compiled.CACHE.complete else "compiled, and cached for later processes,"
        )
        log.info("The CPU kernel %r was %s in %.1f s.", name, done, seconds)
    _runtime.owners.append(compiled)
    entries = compiled.ENTRIES
    _runtime.entries.update({known: entry for known in entries if entries[known] is entries[name]})


def _cannot_compile(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"Numba cannot compile them here ({type(error).__name__}: {first})"


def _give_up(reason: str) -> None:
    _runtime.missing, _runtime.compiled = reason, None
    log.warning("No compiled CPU kernels: %s. Quantized layers work, but slower, by torch alone.", reason)


def _launcher_of_torch() -> int:
    """The address of GOMP_parallel in the OpenMP runtime torch uses (GNU's, LLVM's and Intel's have it)."""
    if not torch.backends.openmp.is_available():
        return 0
    try:
        # A symbol is looked up in the library and in those it is linked to.
        library = ctypes.CDLL(torch._C.__file__)
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0


def forked() -> bool:
    """Whether this process is the child of a fork, where a parallel matmul of torch may wait for ever."""
    return _runtime.forked


def _threads() -> int:
    return 1 if _runtime.forked else torch.get_num_threads()


_KEPT = 1 << 20  # bytes: a workspace of up to so many waits for the next call of its thread


class _Workspace(threading.local):
    """The scratch memory of this thread's calls, its address and its bytes: one tuple, so that whoever interrupts a
    call (a signal, a finalizer) may replace it, and the call goes on in what it holds.
    """

    def __init__(self) -> None:
        self.held = _allocate(4096)  # room for what is given, and for small products


def _allocate(size: int) -> tuple[Tensor, int, int]:
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return memory, memory.data_ptr(), size


_workspace = _Workspace()


def linear(
    way: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    usual: bool = False,
) -> Tensor:
    """`x Wᵀ + b` by the way "float", "int16" or "int8". No gradient; a weight [N, K] without gaps, on the CPU.

    The operands were checked; `usual` is what `operands.check` gave.
    """
    given = x.dtype
    if given is torch.float16:
        x = x.float()
    if not usual:
        x = x.contiguous()
        scale = None if scale is None else scale.float().contiguous()
        zero_point = None if zero_point is None else zero_point.contiguous()
        bias = None if bias is None else (bias if bias.dtype is torch.bfloat16 else bias.float()).contiguous()
    n = weight.shape[0]
    shape = x.shape  # two and three dimensions written out: unpacking takes as long again
    if len(shape) == 2:
        out = x.new_empty(shape[0], n)
    elif len(shape) == 3:
        out = x.new_empty(shape[0], shape[1], n)
    else:
        out = x.new_empty(*shape[:-1], n)
    if n:
        _enter(way, weight, scale, zero_point, bias, x, out)
    return out.to(given) if given is torch.float16 else out


def expand(weight: Tensor, scale: Tensor, zero_point: Tensor | None, out: Tensor) -> Tensor:
    """`(weight - zero_point) * scale` into `out`, float32: codes without gaps, a scale for each row."""
    _enter("expand", weight, scale, zero_point, None, None, out)
    return out


def encode(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    """Fill the codes, scales and zero-points of a float32 weight, all without gaps; a scale for each row.

    A scale that is not finite says that the row has no range; its codes are not written.
    """
    _enter("encode", weight, scale, zero_point, None, None, codes)


def _enter(
    name: str,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    out: Tensor,
) -> None:
    """Call the entry of this name in a workspace as large as it asks for. Every tensor is without gaps."""
    entry = _runtime.entries[name]  # as `ready` said
    n = weight.shape[0]
    k = weight.numel() // n
    given = (
        _runtime.launcher,
        _threads(),
        n,
        k,
        0 if x is None else x.numel() // k,
        1 if name == "int8" else 0,
        weight.data_ptr() or _no_memory("weight"),
        0 if scale is None else scale.data_ptr() or _no_memory("scale"),
        0 if zero_point is None else zero_point.data_ptr() or _no_memory("zero_point"),
        0 if bias is None else bias.data_ptr() or _no_memory("bias"),
        1 if bias is not None and bias.dtype is torch.bfloat16 else 0,
        0 if x is None else x.data_ptr() or _no_memory("input"),
        1 if x is not None and x.dtype is torch.bfloat16 else 0,
        out.data_ptr(),
    )
    memory, address, size = _workspace.held
    while True:
        if _runtime.one_at_a_time is None:
            needed = entry(address, size, given)
        else:
            with _runtime.one_at_a_time:
                needed = entry(address, size, given)
        if not needed:
            del memory  # lives until here, where the threads are done with it
            return
        memory, address, size = larger = _allocate(needed)
        if size <= _KEPT:
            _workspace.held = larger


def _no_memory(name: str) -> NoReturn:
    raise RuntimeError(
        f"Expected values behind the {name}, got a tensor that stands for them; clone it first."
    )
