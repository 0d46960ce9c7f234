"""Every kernel once in each of its forms, to be watched by a tool that finds wrong reads and writes: `make memcheck`.

The kernels alone are imported, and with as few threads as show a race: valgrind makes all of it 50 times slower.
"""

import os
import sys
import types
from pathlib import Path

import torch

package = sys.modules["mono_quant_hf"] = types.ModuleType("mono_quant_hf")
package.__path__ = [os.environ.get("PACKAGE", str(Path(__file__).parents[2] / "mono_quant_hf"))]

from mono_quant_hf.kernels import cpu, expand, linear, quantize, use_kernel  # noqa: E402


def main() -> None:
    torch.set_num_threads(2)
    if cpu.load() is None:
        raise SystemExit(cpu.why_missing())
    for n, k in ((5, 33), (70, 64), (256, 640)):
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        scale, zero_point = torch.rand(n, 1), torch.randint(-128, 128, (n, 1), dtype=torch.int8)
        half, bias = torch.randn(n, k).half(), torch.randn(n)
        for tokens in (1, 3, 70):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(tokens, k).to(dtype)
                x[0, :2] = torch.tensor((25000.0, 1e-30))
                for way in ("int16", "float", "int8"):
                    with use_kernel(way):
                        linear(x, weight, scale, zero_point, bias.to(dtype), "int8")
                        linear(x, weight, scale)
                linear(x, half, bias=bias)
        expand(weight, scale, zero_point)
    for symmetric in (False, True):
        quantize(torch.randn(512, 515), symmetric)
    print("every kernel ran")


if __name__ == "__main__":
    main()
