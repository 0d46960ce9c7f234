"""How fast one quantized linear is, beside torch's float32 one: `python examples/kernel_benchmark.py`.

    python examples/kernel_benchmark.py --sweep --plot sweep.png

The second measures the layers of real models, and draws a map of the ratios. Every row is one number of tokens. All
ways take turns within a run, so that a busy machine slows them alike; a figure is the median of the repeats, and the
ratios (time of float32 / time of this) come first. Each way walks through several copies of its weight, more than the
processor's cache holds, as the layers of a model would be.
"""

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.colors import CenteredNorm
from torch import Tensor
from torch.nn import functional

from mono_quant_hf.core import quantize_to_codes, sqnr
from mono_quant_hf.kernels import choose, expand, linear

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
SHAPES = (
    *("384x384", "1536x384", "384x1536", "3072x768", "768x3072", "4096x1024"),
    *("192x576", "576x576", "1536x576", "576x1536", "2048x8192", "49152x576"),
)


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


def benchmark(n: int, k: int, arguments: argparse.Namespace) -> dict:
    """One table as plain data."""
    generator = torch.Generator().manual_seed(0)
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
            "int8 activations": lambda i, x=x: linear(
                x, int8s[i % len(int8s)], scale, zero_point, activations="int8"
            ),
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
                "kernel": {
                    "int8": choose(x, codes).name,
                    "int8 activations": choose(x, codes, "int8").name,
                    "fp16": choose(x, halves[0]).name,
                },
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
        cells += [f"{row['sqnr_db']:.0f} dB", ", ".join(row["kernel"].values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep_table(results: list[dict], way: str) -> str:
    """The ratios of one way, a row for each shape."""
    tokens = [row["tokens"] for row in results[0]["rows"]]
    lines = [f"| {way}, tokens | " + " | ".join(map(str, tokens)) + " |", "| --- " * (len(tokens) + 1) + "|"]
    for result in results:
        cells = [f"{row['ratio'][way]:.2f}" for row in result["rows"]]
        lines.append(f"| {shape_of(result)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shape_of(result: dict) -> str:
    return "{rows} x {columns}".format(**result["weight"])


def plot(results: list[dict], ways: list[str], path: Path) -> None:
    """A map for each way: shapes by tokens, the ratio in words and as a colour, white where it is 1."""
    figure, maps = pyplot.subplots(
        1, len(ways), figsize=(0.5 + 6 * len(ways), 1.6 + 0.3 * len(results)), layout="constrained"
    )
    colours = CenteredNorm(vcenter=0, halfrange=math.log(4))
    for axes, way in zip(np.atleast_1d(maps), ways, strict=True):
        ratios = np.array([[row["ratio"][way] for row in result["rows"]] for result in results])
        axes.imshow(np.log(ratios), cmap="RdBu", norm=colours, aspect="auto")
        for (y, x), ratio in np.ndenumerate(ratios):
            shade = "white" if abs(math.log(ratio)) > 1 else "black"
            axes.text(x, y, f"{ratio:.2f}", ha="center", va="center", color=shade, fontsize=8)
        axes.set_xticks(range(len(ratios[0])), [row["tokens"] for row in results[0]["rows"]])
        axes.set_yticks(range(len(results)), [shape_of(result) for result in results])
        axes.set(title=f"{way}: times as fast as float32", xlabel="tokens")
    machine = results[0]["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}")
    figure.savefig(path, dpi=130)


def shape(text: str) -> tuple[int, int]:
    """Rows and columns of `NxK`."""
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"Expected rows x columns as in 3072x3072, got {text!r}")
    return int(n), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        default=[(3072, 3072)],
        metavar="NxK",
        help="of the weight (3072x3072)",
    )
    parser.add_argument("--sweep", action="store_true", help=f"the shapes {' '.join(SHAPES)} instead")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="M")
    parser.add_argument("--symmetric", action="store_true", help="no zero-points")
    parser.add_argument(
        "--bfloat16", action="store_true", help="torch's bfloat16 too: slow without its units"
    )
    parser.add_argument("--repeats", type=int, default=60, help="turns at most (%(default)s), 7 at least")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row of a table (%(default)s)")
    parser.add_argument(
        "--cache-mb", type=int, default=192, help="weights of each way to walk through, in MB"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="draw the ratios here, a PNG or SVG")
    arguments = parser.parse_args()
    shapes = [shape(text) for text in SHAPES] if arguments.sweep else arguments.shapes
    results = []
    for n, k in shapes:
        results.append(benchmark(n, k, arguments))
        print(table(results[-1]), end="\n\n", flush=True)
    ways = ["int8", "int8 activations", "fp16"]
    if len(results) > 1:
        print("\n\n".join(sweep_table(results, way) for way in ways))
    if arguments.plot:
        plot(results, ways[:2], arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
