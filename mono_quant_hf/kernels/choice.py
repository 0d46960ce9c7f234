"""Which way a product is computed: the one place that decides, and says why.

The setting `MONO_QUANT_KERNEL` (environment, read at import; `set_kernel`, `use_kernel` later) is "auto" or the
name of a way, which is then taken wherever it can be:

- `int16`: CPU, int8 codes: x in int16 with a scale for each token, products summed in integers; Numba
- `float`: CPU: int8 codes or float16 weights, turned to float32 as they stream by; Numba
- `blocks`: CPU: some rows at a time expanded to float32, torch's float32 matmul
- `triton`: CUDA, ROCm, XPU: codes and float16 weights become half precision within a kernel; from 512 tokens on, blocks
  of rows in memory, for torch's matmul
- `portable`: everywhere, in torch's own operations: expand, then torch's matmul
- `int8`: x in int8 too (VNNI, or Triton from 17 tokens on); only in layers that ask for int8 activations
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import cpu, gpu

log = logging.getLogger("mono_quant_hf")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("auto", "int16", "float", "blocks", "portable", "int8", "triton")


@dataclass(frozen=True, slots=True)
class Choice:
    """The `name` of a way of computing, and the `reason` it was chosen."""

    name: str
    reason: str


def _known(name: str, source: str) -> str:
    if name not in KERNELS:
        raise ValueError(f"{source} is {name!r}: it must be one of {', '.join(KERNELS)}")
    return name


_setting = _known(os.environ.get("MONO_QUANT_KERNEL", "auto"), "the environment variable MONO_QUANT_KERNEL")


def get_kernel() -> str:
    """The setting in force: "auto" or the name of a way.

    Example:
        >>> with use_kernel("blocks"):
        ...     get_kernel()
        'blocks'
    """
    return _setting


def set_kernel(name: str) -> None:
    """Take this way wherever it can be, in every thread; "auto" to choose by device, dtype and shape.

    Raises:
        ValueError: no such way.

    Example:
        >>> before = get_kernel()
        >>> set_kernel("portable")
        >>> get_kernel()
        'portable'
        >>> set_kernel(before)
    """
    global _setting
    _setting = _known(name, "the kernel")


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """`set_kernel` for the length of a `with` block.

    Example:
        >>> with use_kernel("portable"):
        ...     get_kernel()
        'portable'
    """
    before = get_kernel()
    set_kernel(name)
    try:
        yield
    finally:
        set_kernel(before)


def choose(x: Tensor, weight: Tensor, activations: str | None = None) -> Choice:
    """The way `linear(x, weight, ...)` is computed in eager mode, and why.

    Args:
        x: [..., K], floating.
        weight: [N, K], int8 or float16.
        activations: as given to `linear`.

    Example:
        >>> choose(torch.ones(1, 8, device="meta"), torch.ones(4, 8, dtype=torch.int8, device="meta"))
        Choice(name='portable', reason='the device is meta')
    """
    refused = ""
    if activations is not None:
        int8 = decide_int8_for(x, weight)
        if int8.name:
            return int8
        refused = f"no int8 activations, as {int8.reason}; "
    choice = decide_for(x, weight)
    return Choice(choice.name, refused + choice.reason)


def decide_for(x: Tensor, weight: Tensor, usual: bool = False) -> Choice:
    """`decide` for these operands: `usual` is what `operands.check` gave."""
    n, k = weight.shape
    tokens = x.numel() // k if k else 0
    device = "cpu" if usual or x.is_cpu else str(x.device)
    contiguous = usual or weight.is_contiguous()
    return decide(device, x.dtype, weight.dtype, tokens, contiguous, _is_small(n, k), _setting)


def decide_int8_for(x: Tensor, weight: Tensor) -> Choice:
    """`decide_int8` for these operands."""
    n, k = weight.shape
    tokens = x.numel() // k if k else 0
    return decide_int8(x.device.type, x.dtype, weight.dtype, tokens, n, k, _setting)


def _is_small(n: int, k: int) -> bool:
    """Whether calling a kernel takes longer than its arithmetic, in whichever way."""
    return n * k <= 4096


@lru_cache(maxsize=4096)
def decide(
    device: str,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    tokens: int,
    contiguous: bool,
    small: bool,
    setting: str,
) -> Choice:
    """`choose` by what it depends on."""
    on_cpu = device == "cpu"
    if setting == "portable":
        return Choice("portable", "it was asked for")
    if not on_cpu and (missing := gpu.why_missing(torch.device(device))):
        return Choice("portable", missing)
    if x_dtype not in (_FLOATS if on_cpu else gpu.HALVES):
        return Choice("portable", f"x is {x_dtype}")
    if weight_dtype not in (torch.int8, torch.float16):
        return Choice("portable", f"the weight is {weight_dtype}")
    if tokens == 0:
        return Choice("portable", "x is empty")
    if on_cpu and setting == "blocks":
        return Choice("blocks", "it was asked for")
    if not contiguous:
        return Choice("blocks" if on_cpu else "portable", "the weight has gaps in memory")
    if on_cpu:
        return _on_cpu(weight_dtype, tokens, small, setting)
    return _on_gpu(x_dtype, weight_dtype, tokens, setting)


@lru_cache(maxsize=4096)
def decide_int8(
    device: str,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    tokens: int,
    n: int,
    k: int,
    setting: str,
) -> Choice:
    """The way "int8" where int8 activations can be had and pay, else a Choice without a name, and the reason."""
    if weight_dtype != torch.int8:
        return Choice("", f"the weight is {weight_dtype}")
    if x_dtype not in _FLOATS:
        return Choice("", f"x is {x_dtype}")
    if setting not in ("auto", "int8"):
        return Choice("", f"{setting} was asked for")
    if device == "cpu":
        processor = cpu.load()
        if processor is None:
            return _no_gain(cpu.why_missing())
        if k > processor.LONGEST_OF_BYTES:
            return Choice("", f"{k} input features are too many for int32")
        if setting != "int8" and _is_small(n, k):
            return Choice("", "the weight is small")
        if setting != "int8" and not processor.BYTE_PRODUCTS:
            return _no_gain("this processor has no int8 matrix instructions")
        if not cpu.ready("int8"):
            return _no_gain(cpu.why_missing())
        return Choice("int8", "it was asked for" if setting == "int8" else "int8 products in hardware")
    if device == "cuda" and not gpu.why_missing(torch.device(device)):
        if x_dtype not in gpu.HALVES:
            return Choice("", f"x is {x_dtype}")
        if tokens < gpu.FEWEST_INT8_TOKENS:
            return Choice("", f"{tokens} tokens are fewer than {gpu.FEWEST_INT8_TOKENS}")
        return Choice("int8", "int8 products in hardware")
    if device == "meta":
        return Choice("", "the device is meta")
    return _no_gain(f"the device is {device}")


@lru_cache(maxsize=16)
def _no_gain(reason: str) -> Choice:
    log.warning("activations='int8' changes nothing here: %s. Activations stay in float.", reason)
    return Choice("", reason)


def _on_gpu(x_dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int, setting: str) -> Choice:
    if setting == "triton":
        return Choice("triton", "it was asked for")
    if weight_dtype == x_dtype:
        return Choice("portable", "the weight is as x, and torch's matmul takes it")
    if tokens < gpu.MANY_TOKENS:
        return Choice("triton", "memory is the limit, and codes are read as they are")
    if x_dtype == torch.float16:  # in which an expanded weight may lose its small values
        return Choice("portable", "many tokens in float16: torch's matmul on exact rows, scaled after it")
    return Choice("triton", "many tokens: rows are expanded in one pass, for torch's matmul")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=decide.cache_clear)
    os.register_at_fork(after_in_child=decide_int8.cache_clear)


def _on_cpu(weight_dtype: torch.dtype, tokens: int, small: bool, setting: str) -> Choice:
    choice = _wanted_on_cpu(weight_dtype, tokens, small, setting)
    if choice.name != "blocks" and not cpu.ready(choice.name):
        return Choice("blocks", cpu.why_missing())
    return choice


def _wanted_on_cpu(weight_dtype: torch.dtype, tokens: int, small: bool, setting: str) -> Choice:
    processor = cpu.load()
    if processor is None:
        return Choice("blocks", cpu.why_missing())
    codes = weight_dtype == torch.int8
    if not codes and not processor.HALF:
        return Choice("blocks", "this processor does not convert float16")
    if cpu.forked() and setting == "auto":
        # torch's own matmul waits for threads that stayed with the parent, where the parent had used them.
        way = "int16" if codes and tokens > 1 else "float"
        return Choice(way, "after a fork: one thread, and none of torch's")
    if setting == "float" or (setting == "int16" and codes):
        return Choice(setting, "it was asked for")
    if not codes:
        # Up to 1024 tokens measured at or over torch's float32 matmul; blocks were at 0.6 to 0.8 of it.
        return Choice("float", "float16 weights become float32 as they stream by")
    if tokens == 1 and processor.STREAMS_FLOATS:
        return Choice("float", "one token: memory is the limit, and float32 needs no codes of x")
    if small and tokens <= 64:
        return Choice("float", "a small weight: nothing to gain from codes of x")
    if processor.INTEGER_UNITS:
        return Choice("int16", "int16 products outrun float32 ones here")
    if tokens <= 8:
        return Choice("int16", "a few tokens: memory is the limit")
    return Choice("blocks", "many tokens, and no fast int16 products here")
