"""What quantizing costs: a language model and its quantized form, side by side, in one table.

    python examples/perplexity.py HuggingFaceTB/SmolLM2-135M --weights both

Size in memory and on disk, perplexity and how much it changed, KL divergence from the float model and top-1
agreement with it.  The float model runs first and its predictions are kept on disk, so that only one model is
in memory at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.cli.errors import CommandError
from mono_quant_hf.cli.texts import add_text_arguments, load_text
from mono_quant_hf.evaluation import (
    DivergenceResult,
    PerplexityResult,
    Reference,
    divergence,
    perplexity,
    record_reference,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are told like every other error of the user's: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists what there is)")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="perplexity.py",
        description="Evaluate a causal language model and its quantized form side by side.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python examples/perplexity.py ./my-model --text-file book.txt --weights both --json result.json
              python examples/perplexity.py HuggingFaceTB/SmolLM2-135M --dataset Salesforce/wikitext \\
                  --config wikitext-2-raw-v1 --split test --max-tokens 20000
              torchrun --nproc-per-node 2 examples/perplexity.py ./my-model --no-divergence
            """
        ),
    )
    made.add_argument("model", help="folder or Hub name of a float causal language model")

    add_text_arguments(made, "text", 4096)

    quantization = made.add_argument_group("quantization")
    quantization.add_argument("--weights", choices=["int8", "float16", "both"], default="int8")
    quantization.add_argument(
        "--symmetric", action="store_true", help="int8 without zero-points (default: with)"
    )

    running = made.add_argument_group("running")
    running.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="default: that of the checkpoint"
    )
    running.add_argument("--window", type=int, metavar="N", help="tokens in a window (default: at most 1024)")
    running.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: window / 2)"
    )
    running.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows fed at once")
    running.add_argument(
        "--device-map", metavar="MAP", help="auto, cpu, cuda, ... (default: the accelerator, if there is one)"
    )
    running.add_argument(
        "--reference",
        type=Path,
        metavar="FOLDER",
        help="keep the float model's predictions here, where an interrupted run goes on and a later one need "
        "not make them again (default: a temporary folder); 4 bytes x tokens x vocabulary in float32",
    )
    running.add_argument(
        "--no-divergence", action="store_true", help="perplexity alone: nothing is kept on disk"
    )
    running.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    running.add_argument("--quiet", action="store_true", help="no progress bars")
    return made


def weight_bytes(folder: Path) -> int | None:
    """Size of the weight files in a model's folder, None where there are none under the usual names."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        files = list(folder.glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files)
    return None


def checkpoint_folder(model: str) -> Path:
    """Where the files of a loaded checkpoint are: its own folder, or a snapshot in the Hub's cache."""
    return Path(model) if Path(model).is_dir() else Path(str(cached_file(model, "config.json"))).parent


def load_model(arguments: argparse.Namespace, config: MonoQuantConfig | None) -> Any:
    device_map, accelerator = (
        arguments.device_map,
        torch.accelerator.current_accelerator(check_available=True),
    )
    if device_map is None and accelerator is not None:
        device_map = accelerator.type
    return AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=DTYPES.get(arguments.dtype, "auto"),
        device_map=device_map,
        quantization_config=config,
    )


def figures_of(result: PerplexityResult | DivergenceResult) -> dict[str, Any]:
    """The numbers of a result; the settings are the same for all models, and told once."""
    return {name: value for name, value in result.to_dict().items() if name != "settings"}


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, one model after the other."""
    text_name, text = load_text(arguments)
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise ValueError(f"the folder of --json {arguments.json} does not exist.")
    # what can be no name on the Hub is a folder; transformers would complain about the name
    if arguments.model.startswith((".", "/", "~")) and not Path(arguments.model).is_dir():
        raise ValueError(
            f"there is no folder {arguments.model}: give a model's folder or its name on the Hub."
        )
    if getattr(AutoConfig.from_pretrained(arguments.model), "quantization_config", None) is not None:
        raise ValueError(f"{arguments.model} is quantized already: give the float model it was made from.")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = {name: getattr(arguments, name) for name in ("window", "stride", "max_tokens", "column")}
    running: dict[str, Any] = {"batch_size": arguments.batch_size, "progress": not arguments.quiet}
    shared: dict[str, Any] = {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not arguments.no_divergence:
            raise ValueError("several processes share the windows of --no-divergence only: add it.")
        process = PartialState(cpu=not torch.cuda.is_available())
        shared["split_between_processes"] = True
        running["progress"] = running["progress"] and process.is_main_process

    with tempfile.TemporaryDirectory(prefix="mono-quant-hf-") as temporary:
        model = load_model(arguments, None)
        reference: Reference | None = None
        measured: PerplexityResult
        if arguments.no_divergence:
            measured = perplexity(model, tokenizer, text, **windows, **running, **shared)
        else:
            folder = arguments.reference or Path(temporary, "reference")
            reference = record_reference(model, tokenizer, text, folder, **windows, **running)
            measured = reference.perplexity
        results = [
            {
                "weights": measured.settings["dtype"],
                "memory_bytes": model.get_memory_footprint(),
                "disk_bytes": weight_bytes(checkpoint_folder(arguments.model)),
                **figures_of(measured),
            }
        ]
        settings = measured.settings
        del model
        for weights in ("int8", "float16") if arguments.weights == "both" else (arguments.weights,):
            gc.collect()  # the model before goes first
            symmetric = arguments.symmetric and weights == "int8"
            model = load_model(arguments, MonoQuantConfig(weights=weights, symmetric=symmetric))
            row: dict[str, Any] = {
                "weights": weights + (" symmetric" if symmetric else ""),
                "memory_bytes": model.get_memory_footprint(),
            }
            if reference is None:
                row |= figures_of(perplexity(model, tokenizer, text, **windows, **running, **shared))
            else:
                row |= figures_of(divergence(reference, model, **running))
            before, after = results[0]["perplexity"], row["perplexity"]
            row["change_percent"] = None if before is None or after is None else 100 * (after / before - 1)
            saved = Path(temporary, weights)
            model.save_pretrained(saved)
            row["disk_bytes"] = weight_bytes(saved)
            results.append(row)
            del model
    return {"model": arguments.model, "text": text_name, "settings": settings, "results": results}


def table(results: Iterable[dict[str, Any]]) -> str:
    """The figures as text, a line for each model; a column that has none is left out."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "weights": ("weights", str),
        "memory": ("memory_bytes", lambda n: f"{n / 1e6:,.1f} MB"),
        "on disk": ("disk_bytes", lambda n: f"{n / 1e6:,.1f} MB"),
        "perplexity": ("perplexity", lambda x: f"{x:.4f}"),
        "change": ("change_percent", lambda x: f"{x:+.3f} %"),
        "mean KL": ("kl_mean", lambda x: f"{x:.6f}"),
        "99 % KL": ("kl_p99", lambda x: f"{x:.5f}"),
        "top-1": ("top1_agreement", lambda x: f"{100 * x:.2f} %"),
        "tokens": ("tokens", lambda n: f"{n:,}"),
    }
    results = list(results)
    kept = {
        title: [title, *(show(row[key]) if row.get(key) is not None else "-" for row in results)]
        for title, (key, show) in columns.items()
        if any(row.get(key) is not None for row in results)
    }
    for title, cells in kept.items():
        width = max(map(len, cells))
        kept[title] = [cell.ljust(width) if title == "weights" else cell.rjust(width) for cell in cells]
    lines = ["  ".join(cells) for cells in zip(*kept.values(), strict=True)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without the progress bars of transformers and datasets; ours are an argument."""
    import datasets

    bars, hidden = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        if not hidden:
            datasets.enable_progress_bars()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if all went well, 2 with one line on stderr if the user must change something."""
    try:
        arguments = parser().parse_args(argv)
        with no_progress_bars() if arguments.quiet else nullcontext():
            figures = evaluate(arguments)
        if int(os.environ.get("RANK", "0")) > 0:
            return 0  # the first process of several tells the result
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (CommandError, OSError, ValueError, TypeError, ImportError) as error:
        print("perplexity.py: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    settings = figures["settings"]
    print(
        f"{figures['model']} on {figures['text']}: window {settings['window']}, stride {settings['stride']}, "
        f"computing in {settings['dtype']}"
        + (f", split over {os.environ['WORLD_SIZE']} processes" if "WORLD_SIZE" in os.environ else "")
        + "\n"
    )
    print(table(figures["results"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
