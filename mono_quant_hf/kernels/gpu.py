"""Launches the Triton kernels: products by int8 codes and float16 weights, of which little is expanded in memory.

They run where Triton does and tensor cores take bfloat16: CUDA from sm_80 on, ROCm, XPU. Triton is imported with the
first product. Nothing is tuned at run time: `TILES` says how a product is cut up, and may be changed before the first.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .portable import part_of, row_blocks, without_autocast

HALVES = (torch.bfloat16, torch.float16)
MANY_TOKENS = 512
"""From here on arithmetic is the limit, not memory: torch's own matmul on expanded rows is left to do it."""
FEWEST_INT8_TOKENS = 17
"""With fewer, memory is the limit and rounding x gains nothing."""
MANY_ROWS = 8192
"""Of a weight: fewer are cut into narrower tiles, so that there are enough of them for a GPU's processors."""

SHARED_BYTES = 96 << 10
"""Of shared memory: what a program may take on every card from sm_80 on."""


@dataclass(frozen=True)
class Tile:
    """The part of a product that one program computes, and what Triton needs to know to compile it."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3

    def options(self, x_bytes: int, weight_bytes: int, shared: int = SHARED_BYTES) -> dict[str, Any]:
        """Of a launch: as many stages as there is shared memory for, by the bytes of an element of x and the weight."""
        of_one = self.k * (x_bytes * self.m + weight_bytes * self.n)
        return {"num_warps": self.warps, "num_stages": max(min(self.stages, shared // of_one), 1)}


TILES: dict[str, list[tuple[int, Tile, Tile]]] = {
    "cuda": [
        (16, Tile(16, 32, 256, 4, 4), Tile(16, 64, 256, 4, 3)),
        (32, Tile(32, 32, 256, 4, 4), Tile(32, 64, 128, 8, 3)),
        (64, Tile(32, 32, 256, 2, 4), Tile(64, 64, 128, 4, 4)),
        (128, Tile(64, 32, 128, 4, 4), Tile(128, 64, 64, 4, 4)),
        (256, Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 3)),
    ],
    "hip": [
        (16, Tile(16, 64, 128, 4, 2), Tile(16, 64, 128, 4, 2)),
        (32, Tile(32, 64, 128, 4, 2), Tile(32, 64, 128, 4, 2)),
        (128, Tile(64, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2)),
    ],
}
"""By backend: up to so many tokens, such a tile, and such where there are `MANY_ROWS`; the last for all above.

The first was measured on an H100; `xpu` is cut up as it, and the second is not measured.
"""
INT8_TILES: dict[str, list[tuple[int, Tile, Tile]]] = {
    "cuda": [
        (32, Tile(32, 64, 128, 4, 4), Tile(32, 64, 128, 4, 4)),
        (128, Tile(64, 64, 128, 4, 4), Tile(64, 128, 128, 4, 4)),
        (512, Tile(64, 128, 128, 4, 4), Tile(128, 128, 128, 8, 3)),
        (1024, Tile(128, 128, 128, 8, 3), Tile(128, 128, 128, 8, 3)),
    ],
    "hip": [
        (32, Tile(32, 64, 64, 4, 2), Tile(32, 64, 64, 4, 2)),
        (128, Tile(64, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2)),
    ],
}
"""The same for int8 activations; by architecture where it has tiles of its own."""
INT8_TILES["sm_90"] = [*INT8_TILES["cuda"][:-1], (1024, Tile(128, 256, 128, 8, 3), Tile(128, 256, 128, 8, 3))]
VECTOR_TILE = Tile(1, 4, 1024, 4, 2)
EXPANSION_TILE = Tile(1, 16, 1024, 8, 1)
GROUP_M = 8
MOST_LAUNCHES = 4096
"""That are remembered, each of some shape."""
CHECKED = {"debug": True, "sanitize_overflow": False}
"""Options with which an index past the table stops the program, as torch's own look-up does."""


@torch.compiler.assume_constant_result  # not of the cached function itself, into which a compiler would look
def why_missing(device: torch.device) -> str:
    """Why a device has no Triton kernels; empty where it has them."""
    return _why_missing(device)


@lru_cache(maxsize=64)
def _why_missing(device: torch.device) -> str:
    if device.type not in ("cuda", "xpu"):
        return f"the device is {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return ""


@lru_cache(maxsize=64)
def _architecture(device: torch.device) -> tuple[str, ...]:
    """Keys of `TILES`, the first that is there counts."""
    if torch.version.hip is not None:
        return ("hip",)
    if device.type != "cuda":
        return ("cuda",)
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)), "cuda"


@lru_cache(maxsize=64)
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type != "cuda" or torch.version.hip is not None:
        return SHARED_BYTES
    return int(
        getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED_BYTES)
    )


def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


def _tile(
    table: dict[str, list[tuple[int, Tile, Tile]]], device: torch.device, tokens: int, rows: int
) -> Tile:
    tiles = next(table[key] for key in _architecture(device) if key in table)
    _, few, many = next((row for row in tiles if tokens <= row[0]), tiles[-1])
    return many if rows >= MANY_ROWS else few


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def _rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K] whose rows have no gaps; rows may lie apart."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its tensors are on."""
    kind: Any = torch.cuda if device.type == "cuda" else torch.get_device_module(device)
    if device.index in (None, kind.current_device()):
        return nullcontext()
    current: AbstractContextManager[object] = kind.device(device)
    return current


def _dense(*columns: Tensor | None) -> list[Tensor | None]:
    """Scale, zero-point and bias without gaps, as the kernels read them."""
    return [None if column is None else column.contiguous() for column in columns]


def _cut(kernel: str, given: dict[str, Any]) -> tuple[Tile, tuple[int, int, int]]:
    """How a launch is cut up: the part of one program, and how many programs there are."""
    n, k = given.get("N", 1), given["K"]
    if kernel == "round_tokens":
        return Tile(1, 1, 1024), (given["M"], 1, 1)
    if kernel == "matvec":
        return VECTOR_TILE, (_parts(n, VECTOR_TILE.n), 1, 1)
    if kernel == "expand_rows":
        return EXPANSION_TILE, (_parts(n, EXPANSION_TILE.n), _parts(k, EXPANSION_TILE.k), 1)
    m, experts = given["M"], given.get("EXPERTS", 0)
    table, device = TILES if kernel == "matmul" else INT8_TILES, given["w_ptr"].device
    tile = _tile(table, device, _parts(m, experts or 1), n * (experts or 1))
    tiles = _parts(m, tile.m) + min(m, experts)  # each expert may leave one tile half empty
    return tile, (tiles * _parts(n, tile.n), 1, 1)


FLAGS = {
    "scale_ptr": "HAS_SCALE", "zero_ptr": "HAS_ZERO", "bias_ptr": "HAS_BIAS",
    "ends_ptr": "GROUPED", "indices_ptr": "LOOK_UP",
}  # fmt: skip
"""Constants that say whether an argument is there."""

_launches: dict[tuple[object, ...], tuple[Any, tuple[object, ...], dict[str, object]]] = {}
"""What to call, and its last arguments, by everything on which they depend."""


def _launch(kernel: str, tensors: tuple[Tensor | None, ...], integers: tuple[int, ...]) -> None:
    """Run a kernel of `triton_kernels`, whose arguments are these tensors, these integers and then constants.

    What Triton compiled is called again without Triton's own look-up, which takes several times as long as a launch.
    """
    first: Any = tensors[0]
    dtypes: list[torch.dtype | None] = []
    addresses = 0
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        else:
            dtypes.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    aligned = addresses & 15 == 0
    key = (kernel, first.get_device(), *dtypes, *integers)
    with _on(first.device):
        if aligned and (found := _launches.get(key)) is not None:
            run, constants, named = found
            run(*tensors, *integers, *constants, **named)
            return
        function = getattr(_kernels(), kernel)
        given = dict(zip(function.arg_names, (*tensors, *integers), strict=False))
        tile, grid = _cut(kernel, given)
        values = {flag: given.get(name) is not None for name, flag in FLAGS.items()} | {
            "EVEN_K": given["K"] % tile.k == 0, "GROUP_M": GROUP_M,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        }  # fmt: skip
        values = {name: values[name] for name in function.arg_names if name in values}
        weight = given.get("w_ptr", first)
        options = tile.options(first.element_size(), weight.element_size(), _shared(first.device))
        if values.get("LOOK_UP"):
            options |= CHECKED
        compiled = function[grid](*tensors, *integers, **values, **options)
        if not aligned:
            return
        if len(_launches) >= MOST_LAUNCHES:
            _launches.clear()
        if first.is_cuda and torch.version.hip is None:
            _launches[key] = compiled[grid], tuple(values.values()), {}
        else:  # where Triton's look-up regards more than is known here
            _launches[key] = function[grid], (), values | options


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x Wᵀ + b` in x's dtype, sums in float32. No gradient.

    Args:
        x: bfloat16 or float16 [..., K].
        weight: int8 or float16 [N, K] without gaps; scale float32 and zero_point int8 [N, 1], or None.
        bias: [N] floating, or None.
    """
    scale, zero_point, bias = _dense(scale, zero_point, bias)
    flat, (n, k) = _rows(x), weight.shape
    m = flat.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m >= MANY_TOKENS:
        with without_autocast(x.device):
            for rows in row_blocks(n, k, x.dtype):
                part = expand(weight[rows], part_of(scale, rows), part_of(zero_point, rows), x.dtype).t()
                if bias is None:
                    torch.mm(flat, part, out=out[:, rows])
                else:
                    torch.addmm(bias[rows].to(x.dtype), flat, part, out=out[:, rows])
        return out.view(*x.shape[:-1], n)
    if m == 1:
        _launch("matvec", (flat, weight, scale, zero_point, bias, out), (n, k))
    else:
        tensors = (flat, weight, scale, zero_point, bias, None, out)
        _launch("matmul", tensors, (m, n, k, 0, flat.stride(0), n))
    return out.view(*x.shape[:-1], n)


def grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, ends: Tensor
) -> Tensor:
    """Rows of x, sorted by expert, by each one's weight, in one launch that waits for nothing.

    Args:
        x: bfloat16 or float16 [M, K].
        weight: int8 or float16 [experts, N, K] without gaps; scale and zero_point [experts, N, 1], or None.
        ends: int32 [experts]: where the rows of each end, in rising order; rows after the last are left zero.
    """
    scale, zero_point = _dense(scale, zero_point)
    flat, (experts, n, k) = _rows(x), weight.shape
    m = flat.shape[0]
    out = torch.zeros(m, n, dtype=x.dtype, device=x.device)
    tensors = (flat, weight, scale, zero_point, None, ends.contiguous(), out)
    _launch("matmul", tensors, (m, n, k, experts, flat.stride(0), n))
    return out


def linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x Wᵀ + b` with each token of x rounded to int8 by a scale of its own, products summed in integers."""
    columns = _dense(scale, zero_point, bias)
    flat, (n, k) = _rows(x), weight.shape
    m = flat.shape[0]
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    steps = torch.empty(m, dtype=torch.float32, device=x.device)
    sums = torch.empty(m, dtype=torch.int32, device=x.device)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _launch("round_tokens", (flat, codes, steps, sums), (m, k, flat.stride(0)))
    _launch("matmul_int8", (codes, steps, sums, weight, *columns, out), (m, n, k, n))
    return out.view(*x.shape[:-1], n)


def expand(
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    dtype: torch.dtype,
    indices: Tensor | None = None,
) -> Tensor:
    """The float weight [N, K], or the rows of it at integer `indices` [...], in one pass."""
    scale, zero_point, indices = _dense(scale, zero_point, indices)
    k = weight.shape[1]
    shape = (weight.shape[0],) if indices is None else indices.shape
    out = torch.empty(*shape, k, dtype=dtype, device=weight.device)
    _launch("expand_rows", (weight, scale, zero_point, indices, out), (out.numel() // k, k, weight.shape[0]))
    return out
