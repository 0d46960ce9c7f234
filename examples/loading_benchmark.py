"""What loading costs: peak memory and time, beside plain float loading and the peers that are installed.

    python examples/loading_benchmark.py --shape 1b
    python examples/loading_benchmark.py ./my-float-model --repeats 5 --json loading.json

Each load runs in a process of its own, the cases in turn, so that a drift of the machine meets all of them.
After `from_pretrained` every byte of every parameter is read, as a first forward does: a file that is only mapped
has not been loaded. Twice: "warm", with the files in the page cache, and "cold", after they were taken out of it, as
with a model that is larger than the memory; what the process then read from the disk is shown.
The peak is that of anonymous memory (`RssAnon` of /proc/self/status; Linux) over what the imports alone take:
float weights that stay mapped are none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    "8b-layer": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "vocab_size": 32000},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 32000},
}
MB = 1_000_000


def anonymous_memory() -> int:
    """Bytes of memory that belong to no file, of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("RssAnon is not in /proc/self/status; the benchmark needs Linux.")


def read_from_disk() -> int:
    """Bytes that this process has had fetched from a disk; what came from the page cache does not count."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("read_bytes is not in /proc/self/io; the benchmark needs Linux.")


def put_out_of_the_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # pages that are not written yet would stay
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def put_into_the_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(16 * MB):
                pass


class PeakMemory:
    """Watches the anonymous memory from a thread of its own, every 2 ms."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = anonymous_memory()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, anonymous_memory())

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, anonymous_memory())


def quantization_of(case: str) -> Any:
    """The `quantization_config` of a case; None for float and for a checkpoint that is quantized already."""
    if case == "ours int8, on load":
        from mono_quant_hf import MonoQuantConfig

        return MonoQuantConfig()
    if case == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if case == "optimum-quanto int8":
        from transformers import QuantoConfig

        return QuantoConfig(weights="int8")
    if case == "bitsandbytes int8":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True)
    return None


CASES = {
    "float32": None,
    "ours int8, on load": None,
    "ours int8, reload": None,
    "torchao int8": "torchao",
    "optimum-quanto int8": "optimum.quanto",
    "bitsandbytes int8": "bitsandbytes",
}
"""Each case and the package that it needs."""


def load(case: str, folder: str) -> dict[str, float]:
    """Load in this process; seconds, bytes of the peak over the imports, bytes of the model."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import mono_quant_hf  # noqa: F401  registers the format

    logging.disable_progress_bar()
    quantization = quantization_of(case)
    # Given as None it would take the place of the one in config.json, and codes would be read as weights.
    config = {} if quantization is None else {"quantization_config": quantization}
    torch.ones(8).sum()  # torch's threads and allocators are up
    with PeakMemory() as memory:
        before = read_from_disk()
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)
        tensors = [*model.parameters(), *model.buffers()]
        for tensor in tensors:
            read(tensor)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak": memory.peak - memory.start,
        "disk": read_from_disk() - before,
        "model": sum(bytes_of(tensor) for tensor in tensors),
    }


def plain_tensors(tensor: Any) -> Iterator[Any]:
    """Those that hold the bytes: the tensor itself, or those that torchao's and optimum-quanto's are made of."""
    import torch

    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        yield tensor
    else:
        for name in parts()[0]:
            yield from plain_tensors(getattr(tensor, name))


def bytes_of(tensor: Any) -> int:
    return sum(part.numel() * part.element_size() for part in plain_tensors(tensor))


def read(tensor: Any) -> None:
    """Read every byte of a tensor, whatever it is made of."""
    import torch

    for part in plain_tensors(tensor):
        raw = part.detach().contiguous().flatten().view(torch.uint8)
        words = len(raw) // 8 * 8
        raw[:words].view(torch.int64).sum()
        raw[words:].sum()


def in_a_process(*arguments: str) -> dict[str, float]:
    finished = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        raise RuntimeError(finished.stderr.strip().splitlines()[-1] if finished.stderr.strip() else "failed")
    result: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return result


def make_model(shape: str, folder: Path) -> None:
    """Write a Llama-shaped float32 checkpoint with random weights in shards of 500 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    config = LlamaConfig(tie_word_embeddings=False, **{**heads, **SHAPES[shape]})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="500MB")


def save_quantized(source: str, folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from mono_quant_hf import MonoQuantConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=MonoQuantConfig()
    )
    model.save_pretrained(folder, max_shard_size="500MB")


def machine() -> str:
    """Processor, cores, memory and the versions that matter, in one line."""
    import torch
    import transformers
    from kernel_benchmark import processor

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return (
        f"{os.cpu_count()} cores of {processor()}, {memory:.0f} GB; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor of a checkpoint, in float32."""
    from safetensors import safe_open

    largest = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                shape = tensors.get_slice(name).get_shape()
                size = 4
                for length in shape:
                    size *= length
                largest = max(largest, size)
    return largest


def measure(
    source: Path, quantized: Path, repeats: int, cache: str, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Medians of every case that can run here, with a `cache` that is "warm" or "cold"."""
    runs: dict[str, list[dict[str, float]]] = {}
    skipped: dict[str, str] = {}
    for repeat in range(repeats):
        for case, package in CASES.items():
            if case in skipped:
                continue
            if package is not None and importlib.util.find_spec(package.partition(".")[0]) is None:
                skipped[case] = "not installed"
                continue
            say(f"{repeat + 1}/{repeats} {cache} {case} ...")
            folder = quantized if case == "ours int8, reload" else source
            (put_into_the_cache if cache == "warm" else put_out_of_the_cache)(folder)
            try:
                runs.setdefault(case, []).append(in_a_process("--one", case, str(folder)))
            except RuntimeError as problem:
                skipped[case] = str(problem)
    results: dict[str, dict[str, Any]] = {
        case: {key: statistics.median(run[key] for run in done) for key in done[0]}
        for case, done in runs.items()
        if done
    }
    return results | {case: {"skipped": reason} for case, reason in skipped.items()}


def table(results: dict[str, dict[str, Any]]) -> str:
    reference = results["float32"]["seconds"]
    lines = [
        "| case | time, of float32's | time, s | read from disk, MB | peak, MB | model, MB | peak over model, MB |",
        "| --- " * 7 + "|",
    ]
    for case, result in results.items():
        if "skipped" in result:
            lines.append(f"| {case} | skipped: {result['skipped']} | | | | | |")
            continue
        seconds, peak, model = result["seconds"], result["peak"] / MB, result["model"] / MB
        lines.append(
            f"| {case} | {seconds / reference:.2f} | {seconds:.2f} | {result['disk'] / MB:.0f} | {peak:.0f} | "
            f"{model:.0f} | {peak - model:+.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of a float model")
    parser.add_argument(
        "--shape", choices=SHAPES, help="make a Llama of this size in a temporary folder instead"
    )
    parser.add_argument("--repeats", type=int, default=3, help="loads of each case; the median counts (3)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(load(arguments.one, arguments.model)))
        return 0
    if (arguments.model is None) == (arguments.shape is None):
        parser.error("give either the folder of a float model or --shape")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(arguments.model or Path(temporary) / "float")
        if arguments.shape:
            print(f"Writing a Llama of shape {arguments.shape} ...", file=sys.stderr)
            make_model(arguments.shape, source)
        quantized = Path(temporary) / "int8"
        save_quantized(str(source), str(quantized))
        print(machine())
        results = {}
        for cache in ("warm", "cold"):
            results[cache] = measure(
                source, quantized, arguments.repeats, cache, lambda line: print(line, file=sys.stderr)
            )
            print(f"\n{cache} page cache\n\n{table(results[cache])}")
        print(f"\nLargest tensor in float32: {largest_tensor(source) / MB:.0f} MB")
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
