"""Time int8 products, and one token of a Llama of 8 billion's layers, against bfloat16 on a GPU.

    python examples/gpu_benchmark.py [--tokens 1 16 1024] [--layers 8]

Prints the card, and ratios: over 1.00 int8 is faster. Products are replayed from a CUDA graph over weights that do not
fit the cache together, so that neither launches nor the cache are measured; the token, with a static cache, is
timed in eager mode, and compiled and replayed too.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch.nn import functional

from mono_quant_hf import quantize_model
from mono_quant_hf.kernels import linear

SHAPES = {"o": (4096, 4096), "qkv": (6144, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
CACHES = 400 << 20  # bytes of weights, so that none is still in the cache when its turn comes again


def microseconds(product: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    """One product, the median of five replays over all weights."""
    product(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            product(weight)
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(weights))
    return sorted(times[1:])[2]


def int8_product(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, codes: torch.Tensor
) -> torch.Tensor:
    return linear(x, codes, scale, zero_point)


def products(n: int, k: int, tokens: list[int]) -> list[str]:
    """A cell for each number of tokens: bfloat16's time, and how many times faster int8 is."""
    with torch.device("cuda"):  # not as the default for the whole, which makes every look at a tensor slower
        codes = [torch.randint(-128, 128, (n, k), dtype=torch.int8) for _ in range(CACHES // (n * k) + 1)]
        floats = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(CACHES // (2 * n * k) + 1)]
        scale, zero_point = torch.rand(n, 1) * 1e-3, torch.randint(-128, 128, (n, 1), dtype=torch.int8)
    cells = []
    for count in tokens:
        x = torch.randn(count, k, dtype=torch.bfloat16, device="cuda")
        float_time = microseconds(partial(functional.linear, x), floats)
        times = [microseconds(partial(int8_product, x, scale, zero), codes) for zero in (None, zero_point)]
        cells.append(f"{float_time:6.1f} us {' / '.join(f'{float_time / t:.2f}' for t in times)}")
    return cells


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    for _ in range(5):
        function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3 / repeats


def one_token(model: transformers.PreTrainedModel, compiled: bool) -> float:
    """Milliseconds of a forward pass of one token, with a static cache of 256."""
    torch.compiler.reset()
    cache = transformers.StaticCache(config=model.config, max_cache_len=256)
    inputs = {
        "input_ids": torch.zeros(1, 1, dtype=torch.long, device="cuda"),
        "position_ids": torch.full((1, 1), 100, device="cuda"),
        "past_key_values": cache,
    }
    if not compiled:
        with torch.no_grad():
            return milliseconds(lambda: model(**inputs), 30)
    run = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            run(**inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(**inputs)
        return milliseconds(graph.replay, 30)


def decode(layers: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    times, peaks = {}, {}
    for name in ("bfloat16", "int8"):
        if name == "int8":
            model = quantize_model(model)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for compiled in (False, True):
            times[name, compiled] = one_token(model, compiled)
        peaks[name] = torch.cuda.max_memory_allocated() / 1e9
    for compiled in (False, True):
        float_time, int8_time = times["bfloat16", compiled], times["int8", compiled]
        kind = "compiled" if compiled else "eager"
        print(f"one token, {layers} layers, {kind}: {float_time:.2f} ms, int8 {float_time / int8_time:.2f}")
    print(f"peak memory: bfloat16 {peaks['bfloat16']:.2f} GB, int8 {peaks['int8']:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096]
    )
    parser.add_argument("--layers", type=int, default=8, help="of the Llama; 32 are the whole (default: 8)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "Expected a GPU, got none that torch sees; run it on one, with torch built for it.\n")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("bfloat16's time of a product, and int8's gain, symmetric / with zero-points")
    for name, (n, k) in SHAPES.items():
        for count, cell in zip(arguments.tokens, products(n, k, arguments.tokens), strict=True):
            print(f"{name:>8} {n:>6} x {k:<6} {count:>5} tokens: {cell}")
    if arguments.layers:
        decode(arguments.layers)


if __name__ == "__main__":
    main()
