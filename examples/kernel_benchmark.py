"""How fast one quantized linear is, beside torch's float32 one: `python examples/kernel_benchmark.py`.

Every row is one number of tokens. All ways take turns within a run, so that a busy machine slows them alike; a
figure is the median of the repeats, and the ratios (time of float32 / time of this) come first. Each way walks
through several copies of its weight, more than the processor's cache holds, as the layers of a model would be.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from mono_quant_hf.core import quantize_to_codes, sqnr
from mono_quant_hf.kernels import choose, expand, linear

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)


def copies(tensor: Tensor, total_bytes: int) -> list[Tensor]:
    """As many copies as fill `total_bytes`, two at least."""
    count = max(2, -(-total_bytes // (tensor.numel() * tensor.element_size())))
    return [tensor] + [tensor.clone() for _ in range(count - 1)]


def measure(ways: dict, repeats: int, seconds: float) -> dict[str, float]:
    """The median time of each way in ms; each repeat calls every way once, `calls` times in a row."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(0)
    begin = time.perf_counter()
    turn = 0
    while turn < repeats and (turn < 7 or time.perf_counter() - begin < seconds):
        for name, way in ways.items():
            for call in (0, 1):
                start = time.perf_counter()
                way(2 * turn + call)
                times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def benchmark(arguments: argparse.Namespace) -> dict:
    """One table as plain data."""
    generator = torch.Generator().manual_seed(0)
    n, k = arguments.rows, arguments.columns
    weight = torch.randn(n, k, generator=generator) / k**0.5
    codes, scale, zero_point = quantize_to_codes(weight, symmetric=arguments.symmetric)
    dequantized = expand(codes, scale, zero_point, torch.float64)
    budget = arguments.cache_mb << 20
    floats, int8s, halves = (copies(tensor, budget) for tensor in (weight, codes, weight.half()))
    bfloats = copies(weight.bfloat16(), budget) if arguments.bfloat16 else []
    rows = []
    for tokens in arguments.tokens:
        x = torch.randn(tokens, k, generator=generator)
        xb = x.bfloat16()
        ways = {
            "float32": lambda i, x=x: functional.linear(x, floats[i % len(floats)]),
            "int8": lambda i, x=x: linear(x, int8s[i % len(int8s)], scale, zero_point),
            "fp16": lambda i, x=x: linear(x, halves[i % len(halves)]),
            "int8, x bf16": lambda i, xb=xb: linear(xb, int8s[i % len(int8s)], scale, zero_point),
        }
        if bfloats:
            ways["bfloat16"] = lambda i, xb=xb: functional.linear(xb, bfloats[i % len(bfloats)])
        with torch.inference_mode():
            milliseconds = measure(ways, arguments.repeats, arguments.seconds)
            decibels = sqnr(x.double() @ dequantized.T, linear(x, codes, scale, zero_point).double())
        rows.append(
            {
                "tokens": tokens,
                "ratio": {name: milliseconds["float32"] / value for name, value in milliseconds.items()},
                "milliseconds": milliseconds,
                "kernel": {"int8": choose(x, codes).name, "fp16": choose(x, halves[0]).name},
                "sqnr_db": decibels,
            }
        )
    return {
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        },
        "weight": {"rows": n, "columns": k, "symmetric": arguments.symmetric},
        "rows": rows,
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(result: dict) -> str:
    """The result for people: ratios first."""
    machine, weight = result["machine"], result["weight"]
    names = [name for name in result["rows"][0]["ratio"] if name != "float32"]
    kind = "symmetric" if weight["symmetric"] else "asymmetric"
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}, torch {machine['torch']}; "
        f"weight {weight['rows']} x {weight['columns']}, {kind} int8; ratios to float32 F.linear, higher is faster",
        "",
        "| tokens | "
        + " | ".join(f"{name} ratio" for name in names)
        + " | float32 ms | "
        + " | ".join(f"{name} ms" for name in names)
        + " | int8 SQNR | kernels |",
        "| --- " * (2 * len(names) + 4) + "|",
    ]
    for row in result["rows"]:
        cells = [str(row["tokens"])]
        cells += [f"{row['ratio'][name]:.2f}" for name in names]
        cells += [f"{row['milliseconds'][name]:.3f}" for name in ("float32", *names)]
        cells += [f"{row['sqnr_db']:.0f} dB", "{int8}, {fp16}".format(**row["kernel"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3072, help="N, the outputs (%(default)s)")
    parser.add_argument("--columns", type=int, default=3072, help="K, the inputs (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="M")
    parser.add_argument("--symmetric", action="store_true", help="no zero-points")
    parser.add_argument(
        "--bfloat16", action="store_true", help="torch's bfloat16 too: slow without its units"
    )
    parser.add_argument("--repeats", type=int, default=60, help="turns at most (%(default)s), 7 at least")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row of the table (%(default)s)")
    parser.add_argument(
        "--cache-mb", type=int, default=192, help="weights of each way to walk through, in MB"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    result = benchmark(arguments)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
