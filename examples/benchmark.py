"""How fast a quantized language model is, beside float and the peers that are installed, and what it takes in memory.

    python examples/benchmark.py --shape 1b
    python examples/benchmark.py ./my-float-model --compile --text-file book.txt --json benchmark.json

Every model is loaded once; then all take turns, so that a busy machine slows them alike. A figure is the median of the
turns; the ratios to float32 in the same run come first, above 1 is faster. Decode is one token after a prompt, prefill
the whole prompt with the logits of its last token, as in `generate`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kernel_benchmark import processor
from loading_benchmark import MB, SHAPES, bytes_of, make_model
from loading_benchmark import quantization_of as peer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from transformers.utils import logging

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.calibration.samples import cache_argument
from mono_quant_hf.evaluation import perplexity
from mono_quant_hf.kernels import use_kernel

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """One way of running the model, and what was measured of it."""

    name: str
    dtype: torch.dtype
    quantization: Callable[[], Any] = lambda: None
    package: str | None = None
    kernel: str = "auto"
    model: Any = None
    skipped: str = ""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"decode": [], "prefill": []})
    perplexity: float | None = None

    def context(self) -> AbstractContextManager[object]:
        return use_kernel(self.kernel) if self.kernel != "auto" else nullcontext()


def cases(dtypes: list[str]) -> Iterator[Case]:
    """Float in each dtype, then ours and the peers in each."""
    for name in dtypes:
        yield Case(name, FLOATS[name])
    for name in dtypes:
        dtype, of = FLOATS[name], "" if name == "float32" else f", {name}"
        yield Case(f"ours int8{of}", dtype, MonoQuantConfig)
        yield Case(f"ours int8 with embeddings{of}", dtype, lambda: MonoQuantConfig(quantize_embeddings=True))
        yield Case(f"ours int8 activations{of}", dtype, lambda: MonoQuantConfig(activations="int8"))
        yield Case(f"ours float16{of}", dtype, lambda: MonoQuantConfig(weights="float16"))
        yield Case(f"ours int8, codes in float{of}", dtype, MonoQuantConfig, kernel="portable")
        for package, case in (
            ("torchao", "torchao int8"),
            ("optimum.quanto", "optimum-quanto int8"),
            ("bitsandbytes", "bitsandbytes int8"),
        ):
            yield Case(f"{case}{of}", dtype, lambda case=case: peer(case), package)  # type: ignore[misc]


def load(case: Case, folder: str) -> None:
    """Load the model of a case, or note why it cannot be had."""
    if case.package is not None:
        try:
            found = importlib.util.find_spec(case.package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            case.skipped = "not installed"
            return
    try:
        case.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=case.dtype, quantization_config=case.quantization()
        ).eval()
    except (ImportError, RuntimeError, ValueError, TypeError) as problem:  # a peer that does not work here
        if case.package is None:
            raise
        case.skipped = " ".join(str(problem).split())[:120]


class Runner:
    """Prefill and decode of one model, compiled with a static cache if asked for."""

    def __init__(self, case: Case, prompt: torch.Tensor, compiled: bool):
        self.case, self.prompt = case, prompt
        self.length = prompt.shape[1]
        self.cache = StaticCache(case.model.config, max_cache_len=self.length + 64) if compiled else None
        self.cache_name = cache_argument(case.model)
        self.step = torch.compile(case.model.forward, dynamic=False) if compiled else case.model.forward

    def prefill(self) -> float:
        cache = DynamicCache(config=self.case.model.config)
        start = time.perf_counter()
        self.case.model(self.prompt, use_cache=True, logits_to_keep=1, **{self.cache_name: cache})
        return time.perf_counter() - start

    def decode(self, tokens: int) -> list[float]:
        cache = self.cache if self.cache is not None else DynamicCache(config=self.case.model.config)
        if self.cache is not None:
            self.cache.reset()
        self.case.model(self.prompt, use_cache=True, logits_to_keep=1, **{self.cache_name: cache})
        token, seconds = self.prompt[:, :1], []
        for i in range(tokens):
            position = torch.tensor([[self.length + i]])
            start = time.perf_counter()
            logits = self.step(
                token, use_cache=True, position_ids=position, logits_to_keep=1, **{self.cache_name: cache}
            ).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
        return seconds


def measure(running: list[Case], arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    vocabulary = running[0].model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = {
        kind: torch.randint(vocabulary, (1, length), generator=generator)
        for kind, length in (("decode", arguments.prompt), ("prefill", arguments.prefill))
    }
    runners = [
        (
            Runner(case, prompts["decode"], arguments.compile),
            Runner(case, prompts["prefill"], False),
        )
        for case in running
    ]
    with torch.no_grad():
        for decode, prefill in runners:
            say(f"warming up {decode.case.name} ...")
            with decode.case.context():
                decode.decode(3)
                prefill.prefill()
        for turn in range(arguments.repeats):
            for decode, prefill in runners:
                say(f"{turn + 1}/{arguments.repeats} {decode.case.name} ...")
                with decode.case.context():
                    decode.case.seconds["decode"] += decode.decode(arguments.tokens)[1:]
                    decode.case.seconds["prefill"].append(prefill.prefill())


def score(running: list[Case], folder: str, text: str, tokens: int, say: Callable[[str], None]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for case in running:
        say(f"perplexity of {case.name} ...")
        with case.context():
            case.perplexity = perplexity(
                case.model, tokenizer, text, max_tokens=tokens, progress=False
            ).perplexity


def results_of(measured: list[Case]) -> list[dict[str, Any]]:
    """One row a case: ratios, milliseconds, bytes."""
    reference = {kind: statistics.median(s) for kind, s in measured[0].seconds.items()}
    rows: list[dict[str, Any]] = []
    for case in measured:
        if case.skipped:
            rows.append({"case": case.name, "skipped": case.skipped})
            continue
        medians = {kind: statistics.median(s) for kind, s in case.seconds.items()}
        rows.append(
            {
                "case": case.name,
                "ratio": {kind: reference[kind] / seconds for kind, seconds in medians.items()},
                "milliseconds": {kind: 1000 * seconds for kind, seconds in medians.items()},
                "bytes": sum(bytes_of(t) for t in [*case.model.parameters(), *case.model.buffers()]),
                "perplexity": case.perplexity,
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    scored = any(row.get("perplexity") for row in result["rows"])
    heads = ["decode ratio", "prefill ratio", "decode, ms", "prefill, ms", "memory, MB"]
    heads += ["perplexity"] if scored else []
    lines = [
        f"{result['model']} on {machine['processor']}, {machine['threads']} threads, {machine['capability']}, "
        f"torch {machine['torch']}{', compiled' if result['compiled'] else ''}; ratios to float32, higher is faster",
        "",
        "| | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * len(heads),
    ]
    for row in result["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['case']} | skipped: {row['skipped']} |" + " |" * (len(heads) - 1))
            continue
        ratio, milliseconds = row["ratio"], row["milliseconds"]
        cells = [f"{ratio['decode']:.2f}", f"{ratio['prefill']:.2f}"]
        cells += [
            f"{milliseconds['decode']:.1f}",
            f"{milliseconds['prefill']:.0f}",
            f"{row['bytes'] / MB:.0f}",
        ]
        cells += [f"{row['perplexity']:.3f}"] if scored else []
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(folder: str, name: str, arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    measured = list(cases(arguments.dtypes))
    if arguments.only:
        measured = [
            case
            for case in measured
            if case.name == "float32" or any(part in case.name for part in arguments.only)
        ]
    for case in measured:
        say(f"loading {case.name} ...")
        load(case, folder)
    gc.collect()
    running = [case for case in measured if case.model is not None]
    measure(running, arguments, say)
    if arguments.text_file:
        text = arguments.text_file.read_text(encoding="utf-8")
        score(running, folder, text, arguments.text_tokens, say)
    return {
        "model": name,
        "compiled": arguments.compile,
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        },
        "rows": results_of(measured),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or Hub name of a float causal language model")
    parser.add_argument(
        "--shape", choices=SHAPES, help="make a Llama of this shape in a temporary folder instead"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=FLOATS, default=list(FLOATS), help="to compute in (both)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="only float32 and the cases whose name holds PART"
    )
    parser.add_argument("--compile", action="store_true", help="decode with torch.compile and a static cache")
    parser.add_argument("--prompt", type=int, default=32, metavar="N", help="tokens before decoding (32)")
    parser.add_argument(
        "--tokens", type=int, default=12, metavar="N", help="tokens decoded in each turn, at most 64 (12)"
    )
    parser.add_argument("--prefill", type=int, default=256, metavar="N", help="tokens of the prefill (256)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (5)")
    parser.add_argument(
        "--text-file", type=Path, metavar="FILE", help="also the perplexity on this text, for a real model"
    )
    parser.add_argument("--text-tokens", type=int, default=2048, metavar="N", help="of the text (2048)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    if (arguments.model is None) == (arguments.shape is None):
        parser.error("give either a float model or --shape")
    if not 2 <= arguments.tokens <= 64:
        parser.error(f"--tokens {arguments.tokens}: give 2 to 64")
    if "float32" not in arguments.dtypes:
        arguments.dtypes.insert(0, "float32")  # what the ratios are to
    if arguments.text_file and not arguments.text_file.is_file():
        parser.error(f"--text-file {arguments.text_file}: there is no such file")
    logging.disable_progress_bar()
    # All models are compiled from the same forward, whose limit of compilations is made for one.
    torch._dynamo.config.recompile_limit = 64

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder, name = arguments.model, arguments.model
        if arguments.shape:
            say(f"writing a Llama of shape {arguments.shape} ...")
            folder, name = temporary, f"Llama shape {arguments.shape}"
            make_model(arguments.shape, Path(folder))
        result = run(folder, Path(name).name, arguments, say)
    say("")
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
