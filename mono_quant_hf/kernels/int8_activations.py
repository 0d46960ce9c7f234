"""int8 weights by int8 activations: x is rounded to int8 while the layer runs, with a scale for each token.

A few input columns with the largest values stay out of it, as in LLM.int8() (Dettmers et al. 2022, section 3.2); there
they are those past a threshold, here a fixed share of the columns, so that every shape is known beforehand and nothing
waits for a device to count them. A CPU with VNNI multiplies by a kernel of ours, which gives the outliers codes of 16
bits; elsewhere they are multiplied in float and the rest by `torch._int_mm`, which is oneDNN's on a CPU and cuBLAS's on
CUDA.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import cpu, portable
from .operands import Column, is_plain
from .portable import without_autocast

LARGEST = 127
LONGEST = 1 << 16
"""The most input features: products and corrections of that many codes still fit an int32."""
FEWEST_TOKENS = 17
"""With fewer, memory is the limit and rounding x gains nothing; also the fewest that cuBLAS takes."""


def outlier_columns(k: int) -> int:
    """How many of `k` input columns are no int8: one in 32, in whole vectors of 32.

    What it costs SmolLM2 (k = 576 and 1536) in perplexity is a row of `examples/benchmark.py --text-file`.
    """
    return min(k, max(32, k // 1024 * 32))


@lru_cache(maxsize=4)
def _torch_has(*units: str) -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.mkldnn.is_available() and any(capabilities.get(unit) for unit in units)


def has_units() -> bool:
    """Whether this CPU multiplies int8 in hardware, and our kernel or torch uses it."""
    compiled = cpu.load()
    if compiled is None:
        return _torch_has("avx512_vnni", "amx_int8")
    return compiled.BYTE_UNITS or _torch_has("amx_int8")


def by_kernel(k: int) -> bool:
    """Whether a CPU computes it by the compiled kernel: not where it has matrix units (AMX), which oneDNN uses."""
    compiled = cpu.load()
    if compiled is None or k > compiled.LONGEST_BYTES:
        return False
    return not _torch_has("amx_int8") and outlier_columns(k) % 32 == 0


def is_exact(k: int) -> bool:
    """Whether the integer products of a CPU are exact: oneDNN's saturate in 16 bits where there is no VNNI."""
    return by_kernel(k) or _torch_has("avx512_vnni", "amx_int8")


def linear(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Column, bias: Column) -> Tensor:
    """`x Wᵀ + b` with x rounded per token but for its outlier columns, in x's dtype. No gradient.

    Args:
        x: [..., K], any floating dtype; a token with NaN or infinite values has such a result, and it alone.
        weight: int8 [N, K]; `scale` float32 and `zero_point` int8 [N, 1], or None.
        bias: [N] floating, or None.
    """
    n, k = weight.shape
    columns = outlier_columns(k)
    if x.is_cpu and is_plain(x, weight, scale, zero_point, bias) and by_kernel(k):
        return cpu.linear("int8", x, weight.contiguous(), scale, zero_point, bias, outlier_columns=columns)
    with without_autocast(x.device):
        values = x.reshape(-1, k).float()
        outliers = values.abs().nan_to_num(0.0, 0.0, 0.0).amax(0).topk(columns).indices
        few = portable.expand(weight.index_select(1, outliers), scale, zero_point)
        out = values.index_select(1, outliers) @ few.t()
        out = _add_scaled(out, values.index_fill(1, outliers, 0.0), weight, scale, zero_point, bias)
        return out.to(x.dtype).reshape(*x.shape[:-1], n)


def _add_scaled(
    out: Tensor, values: Tensor, weight: Tensor, scale: Tensor, zero_point: Column, bias: Column
) -> Tensor:
    """`out` and the integer part, in torch's own operations, which a compiler fuses."""
    steps = values.abs().amax(1, keepdim=True) / LARGEST
    codes = (values / steps.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    products = torch._int_mm(codes, weight.t()).float()
    if zero_point is not None:
        products = products - codes.sum(1, keepdim=True).float() * zero_point.t().float()
    out = out + products * (steps * scale.t())
    return out if bias is None else out + bias.float()
