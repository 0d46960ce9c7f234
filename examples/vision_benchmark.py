"""How fast a quantized vision model is, beside float32: `python examples/vision_benchmark.py ./my-float-classifier`.

    python examples/vision_benchmark.py --shape resnet-50 --json vision.json

The models take turns within one run; a figure is the median of the turns, and the ratios (time of float32 / time of
this, above 1 is faster) come first.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_benchmark import processor
from transformers import (
    AutoModelForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from mono_quant_hf import MonoQuantConfig, quantize_model

SHAPES: dict[str, Callable[[], Any]] = {
    "resnet-50": lambda: ResNetForImageClassification(ResNetConfig()),
    "efficientnet-b7": lambda: EfficientNetForImageClassification(EfficientNetConfig()),
}
CASES = {
    "float32": None,
    "int8": MonoQuantConfig(),
    "int8 symmetric": MonoQuantConfig(symmetric=True),
    "float16": MonoQuantConfig(weights="float16"),
}


def benchmark(model: Any, batches: list[int], size: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each case and batch size."""
    models: dict[str, Any] = {
        name: model if config is None else quantize_model(copy.deepcopy(model), config)
        for name, config in CASES.items()
    }
    generator = torch.Generator().manual_seed(0)
    rows = []
    with torch.inference_mode():
        for batch in batches:
            pixels = torch.randn(batch, 3, size, size, generator=generator)
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for each in models.values():
                each(pixels)
            for _ in range(repeats):
                for name, each in models.items():
                    start = time.perf_counter()
                    each(pixels)
                    seconds[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            for name, median in medians.items():
                rows.append(
                    {
                        "case": name,
                        "batch": batch,
                        "ratio": medians["float32"] / median,
                        "milliseconds": 1000 * median,
                        "bytes": models[name].get_memory_footprint(),
                    }
                )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or Hub name of a float image classifier")
    parser.add_argument("--shape", choices=SHAPES, help="make a model of random weights instead")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], metavar="N", help="pictures at once"
    )
    parser.add_argument("--size", type=int, default=224, help="height and width of a picture (224)")
    parser.add_argument("--repeats", type=int, default=15, help="turns (15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    if (arguments.model is None) == (arguments.shape is None):
        parser.error("give either a float model or --shape")
    torch.manual_seed(0)
    if arguments.shape:
        name, model = arguments.shape, SHAPES[arguments.shape]()
    else:
        name = Path(arguments.model).name
        model = AutoModelForImageClassification.from_pretrained(arguments.model, dtype=torch.float32)
    rows = benchmark(model.eval(), arguments.batches, arguments.size, arguments.repeats)
    threads = torch.get_num_threads()
    print(f"{name} on {processor()}, {threads} threads, torch {torch.__version__}; ratios to float32\n")
    print("| | batch | ratio | ms | memory, MB |")
    print("| --- |" + " ---: |" * 4)
    for row in rows:
        cells = f"{row['ratio']:.2f} | {row['milliseconds']:.1f} | {row['bytes'] / 1e6:.1f}"
        print(f"| {row['case']} | {row['batch']} | {cells} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": name, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
