"""Time int8 on a GPU against bfloat16: products, and a Llama of 8 billion's layers, a Mixtral's and a LoRA step.

    python examples/gpu_benchmark.py [--only products models peers] [--tokens 1 16 1024] [--layers 8]

Prints the card, and ratios: over 1.00 is faster than bfloat16. Products are replayed from a CUDA graph over weights
that do not fit the cache together, so that neither launches nor the cache are measured. `peers` are torchao's int8
weights, compiled, and bitsandbytes' LLM.int8, each where it is installed.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from mono_quant_hf import quantize_model
from mono_quant_hf.kernels import linear

SHAPES = {"o": (4096, 4096), "qkv": (6144, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
CACHES = 400 << 20  # bytes of weights, so that none is still in the cache when its turn comes again
PREFILL = 2048  # tokens


def microseconds(product: Callable[[Any], object], weights: Sequence[object]) -> float:
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
    x: Tensor, scale: Tensor, zero_point: Tensor | None, activations: str | None, codes: Tensor
) -> Tensor:
    return linear(x, codes, scale, zero_point, activations=activations)


def products(tokens: list[int]) -> None:
    print("bfloat16's time of a product, and the gain of int8: symmetric, with zero-points, int8 activations")
    for name, (n, k) in SHAPES.items():
        with torch.device(
            "cuda"
        ):  # not as the default for the whole, which makes every look at a tensor slower
            codes = [torch.randint(-128, 128, (n, k), dtype=torch.int8) for _ in range(CACHES // (n * k) + 1)]
            floats = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(CACHES // (2 * n * k) + 1)]
            scale, zero_point = torch.rand(n, 1) * 1e-3, torch.randint(-128, 128, (n, 1), dtype=torch.int8)
        for count in tokens:
            x = torch.randn(count, k, dtype=torch.bfloat16, device="cuda")
            float_time = microseconds(partial(functional.linear, x), floats)
            gains = [
                float_time / microseconds(partial(int8_product, x, scale, *how), codes)
                for how in ((None, None), (zero_point, None), (None, "int8"))
            ]
            cells = "  ".join(f"{gain:.2f}" for gain in gains)
            print(f"{name:>8} {n:>6} x {k:<6} {count:>5} tokens: {float_time:6.1f} us  {cells}", flush=True)


def peers(tokens: list[int]) -> None:
    """torchao and bitsandbytes on the widest shape."""
    n, k = SHAPES["gate, up"]

    def layers() -> list[nn.Module]:
        with torch.device("cuda"):
            made = [
                nn.Linear(k, n, bias=False, dtype=torch.bfloat16) for _ in range(CACHES // (2 * n * k) + 1)
            ]
        return [layer.requires_grad_(False) for layer in made]

    candidates: dict[str, tuple[Callable[..., object], list[nn.Module]]] = {
        "bfloat16": (call, layers()),
        "mono_quant_hf": (call, [quantized(layer) for layer in layers()]),
    }
    if find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        packed = layers()
        for layer in packed:
            quantize_(layer, Int8WeightOnlyConfig())
        candidates["torchao, compiled"] = (
            torch.compile(call, dynamic=False, mode="max-autotune-no-cudagraphs"),
            packed,
        )
    if find_spec("bitsandbytes"):
        from bitsandbytes.nn.modules import Linear8bitLt

        # threshold=0: with outliers it waits for the card to count them, and no graph can be had.
        made = [Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=0.0) for _ in layers()]
        candidates["bitsandbytes, float16"] = (call, [layer.half().cuda() for layer in made])
    for count in tokens:
        torch.compiler.reset()
        times = {}
        for name, (product, modules) in candidates.items():
            dtype = torch.float16 if "float16" in name.split() else torch.bfloat16
            x = torch.randn(count, k, dtype=dtype, device="cuda")
            with torch.no_grad():
                times[name] = microseconds(partial(product, x), modules)
        cells = ", ".join(f"{name} {times['bfloat16'] / its:.2f}" for name, its in times.items())
        print(f"{n} x {k}, {count:>5} tokens: {cells}", flush=True)


def quantized(layer: nn.Module) -> nn.Module:
    return next(quantize_model(nn.Sequential(copy.deepcopy(layer))).children())


def call(x: Tensor, layer: nn.Module) -> object:
    return layer(x)


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
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
    inputs = {
        "input_ids": torch.zeros(1, 1, dtype=torch.long, device="cuda"),
        "position_ids": torch.full((1, 1), 100, device="cuda"),
        "past_key_values": transformers.StaticCache(config=model.config, max_cache_len=256),
    }
    with torch.no_grad():
        if not compiled:
            return milliseconds(lambda: model(**inputs))
        run = torch.compile(model, fullgraph=True)
        for _ in range(3):
            run(**inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(**inputs)
        return milliseconds(graph.replay)


def prefill(model: transformers.PreTrainedModel) -> float:
    tokens = torch.zeros(1, PREFILL, dtype=torch.long, device="cuda")
    with torch.no_grad():
        return milliseconds(lambda: model(tokens, use_cache=False, logits_to_keep=1), 5)


def lora_step(model: transformers.PreTrainedModel) -> float:
    """Forward and backward of 1024 tokens with adapters at every projection of attention."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    tokens = torch.zeros(1, 1024, dtype=torch.long, device="cuda")

    def step() -> None:
        adapted(tokens, labels=tokens, use_cache=False).loss.backward()

    taken = milliseconds(step, 5)
    adapted.unload()
    return taken


def first_call(model: transformers.PreTrainedModel) -> float:
    """Milliseconds of the very first forward pass, with what is compiled in it."""
    begin = time.perf_counter()
    with torch.no_grad():
        model(torch.zeros(1, 16, dtype=torch.long, device="cuda"))
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def models(layers: int) -> None:
    shape: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16",
    }  # fmt: skip
    llama = transformers.LlamaConfig(**shape, num_hidden_layers=layers)
    mixtral = transformers.MixtralConfig(**shape, num_hidden_layers=max(layers // 4, 1))
    tasks: dict[str, Callable[[transformers.PreTrainedModel], float]] = {
        "first pass, 16 tokens": first_call,
        "one token": partial(one_token, compiled=False),
        "one token, compiled and replayed": partial(one_token, compiled=True),
        f"prefill of {PREFILL} tokens": prefill,
        "LoRA step of 1024 tokens": lora_step,
    }
    if not find_spec("peft"):
        del tasks["LoRA step of 1024 tokens"]
    for config, chosen in ((llama, list(tasks)), (mixtral, list(tasks)[:2])):
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()
        name = f"{config.model_type}, {config.num_hidden_layers} layers"
        results = []
        for quantized in (False, True):
            if quantized:
                model = quantize_model(model)
            torch.cuda.empty_cache()
            held = torch.cuda.memory_allocated() / 1e9
            results.append([tasks[task](model) for task in chosen])
            print(f"{name}, {'int8' if quantized else 'bfloat16'}: {held:.2f} GB", flush=True)
        for task, float_time, int8_time in zip(chosen, *results, strict=True):
            print(f"{name}, {task}: {float_time:.2f} ms, int8 {float_time / int8_time:.2f}", flush=True)
        del model


def python_time() -> None:
    """Microseconds until a call of a small layer returns, while the card is still at work."""
    plain = nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    for name, layer in (("bfloat16", plain), ("int8", quantized(plain))):
        for _ in range(50):
            layer(x)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(500):
            layer(x)
        print(f"Python of a call, {name}: {(time.perf_counter() - begin) * 1e6 / 500:.0f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("products", "models", "peers")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="these parts (default: all)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096]
    )
    parser.add_argument("--layers", type=int, default=8, help="of the Llama; 32 are the whole (default: 8)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "Expected a GPU, got none that torch sees; run it on one, with torch built for it.\n")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; gains over bfloat16", flush=True)
    if "products" in arguments.only:
        products(arguments.tokens)
    if "models" in arguments.only:
        python_time()
        models(arguments.layers)
    if "peers" in arguments.only:
        peers(arguments.tokens)


if __name__ == "__main__":
    main()
