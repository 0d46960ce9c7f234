"""Run as a program: compiles every Triton kernel in every tile of the tables for a GPU that need not be here.

    python -m tests.kernels.triton_ahead sm_90

Prints a line for each and fails where one does not compile, spills registers, or keeps anything on the stack.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mono_quant_hf.kernels import gpu, triton_kernels

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""Bytes of shared memory that a program may take."""
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def tiles(table: list[tuple[int, gpu.Tile, gpu.Tile]]) -> list[gpu.Tile]:
    return list(dict.fromkeys(tile for _, *both in table for tile in both))


def configurations(architecture: str, backend: str) -> Iterator[tuple[Any, dict[str, Any], gpu.Tile, str]]:
    """Each kernel with its constants, its tile and the type of its weight, as `gpu` launches it."""
    flags = {"HAS_ZERO": True, "HAS_BIAS": True, "EVEN_K": True}
    for weight, scaled in (("i8", True), ("fp16", False)):
        given = {"HAS_SCALE": scaled, "HAS_ZERO": scaled}
        for kernel, tile, constants in (
            (triton_kernels.matvec, gpu.VECTOR_TILE, {"HAS_BIAS": True, "EVEN_K": True}),
            *(
                (triton_kernels.matmul, tile, {"HAS_BIAS": not grouped, "EVEN_K": True, "GROUPED": grouped})
                for tile in tiles(gpu.TILES.get(architecture) or gpu.TILES[backend])
                for grouped in (False, True)
            ),
            (triton_kernels.expand_rows, gpu.EXPANSION_TILE, {"LOOK_UP": False}),
            (triton_kernels.expand_rows, gpu.EXPANSION_TILE, {"LOOK_UP": True}),
        ):
            yield kernel, given | constants, tile, weight
    for tile in tiles(gpu.INT8_TILES.get(architecture) or gpu.INT8_TILES[backend]):
        yield triton_kernels.matmul_int8, flags, tile, "i8"
    yield triton_kernels.round_tokens, {"BLOCK_K": 1024}, gpu.Tile(1, 1, 1024), "i8"


def source(kernel: Any, constants: dict[str, Any], tile: gpu.Tile, weight: str, dtype: str) -> ASTSource:
    """A kernel for arguments of these types, aligned to 16 bytes as torch's are and those of layers mostly."""
    pointers = {
        "w_ptr": weight, "scale_ptr": "fp32", "zero_ptr": "i8", "step_ptr": "fp32", "sum_ptr": "i32",
        "codes_ptr": "i8", "ends_ptr": "i32", "indices_ptr": "i64",
    }  # fmt: skip
    if kernel is triton_kernels.matmul_int8:
        pointers["x_ptr"] = "i8"
    blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": gpu.GROUP_M}
    constants = blocks | constants
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(place,)] = constants[name]
            continue
        signature[name] = f"*{pointers.get(name, dtype)}" if name.endswith("_ptr") else "i32"
        if name not in ("M", "EXPERTS", "TABLE"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)


def cost(compiled: Any, backend: str) -> dict[str, int]:
    """Registers, and the bytes or registers that did not fit into them."""
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        keys = {
            "registers": "vgpr_count",
            "spills": "vgpr_spill_count",
            "stack": "private_segment_fixed_size",
        }
        return {name: int(re.findall(rf"\.{key}:\s*(\d+)", text)[0]) for name, key in keys.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    keys = {"registers": "REG", "spills": "LOCAL", "stack": "STACK"}
    return {name: int(re.findall(rf"\b{key}:(\d+)", text)[0]) for name, key in keys.items()}


def main(name: str, dtype: str = "bf16") -> int:
    gpu_target, bad = target(name), 0
    for kernel, constants, tile, weight in configurations(name, gpu_target.backend):
        ahead = source(kernel, constants, tile, weight, dtype)
        options = tile.options(
            1 if kernel is triton_kernels.matmul_int8 else 2,
            2 if weight == "fp16" else 1,
            SHARED.get(name, gpu.SHARED_BYTES),
        )
        if constants.get("LOOK_UP"):
            options |= gpu.CHECKED
        compiled = triton.compile(ahead, target=gpu_target, options=options)
        used = cost(compiled, gpu_target.backend)
        spilled = used["spills"] or used["stack"]
        bad += bool(spilled)
        grouped = " grouped" if constants.get("GROUPED") else ""
        print(
            f"{name} {kernel.__name__}{grouped} {weight} {tile.m}x{tile.n}x{tile.k} {used}{' SPILLS' * bool(spilled)}"
        )
    return bad


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
