"""`mono-quant-hf evaluate`: how far a quantized model is from its float model, one in memory at a time."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mono_quant_hf.files import scratch_folder
from mono_quant_hf.texts import texts

from .errors import CommandError
from .models import add_dtype_argument, architecture_of, config_of, is_quantized, load_model, load_processor
from .output import add_json_argument, check_output_files, show
from .settings import add_settings, described, settings, settings_given
from .texts import add_text_arguments, load_text

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

DESCRIPTION = """\
Compare a quantized model with its float model on a text or on pictures.
  language models (causal, masked): perplexity with its standard error, mean and 99th-percentile KL
    divergence per token, top-1 agreement;
  classifiers: relative error of the logits, top-1 agreement, KL divergence (on the lines of the text, or
    with --images on the pictures of a folder);
  encoders: cosine similarity of the embeddings of the lines of the text.
"""
EPILOG = """\
examples:
  mono-quant-hf evaluate ./model --weights int8
  mono-quant-hf evaluate ./model-int8 --float ./model --text-file book.txt --json result.json
  mono-quant-hf evaluate ./model-int8 --float ./model --reference ./kept   (goes on after an interruption)
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate` to the subcommands."""
    command = commands.add_parser(
        "evaluate",
        help="perplexity, KL divergence and agreement with the float model",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument(
        "model", help="a quantized model, with --float; or a float one, which is then quantized as it loads"
    )
    command.add_argument("quantized", nargs="?", help="the quantized model, where the first is the float one")
    command.add_argument(
        "--float",
        dest="float_model",
        metavar="MODEL",
        help="the float model that a quantized one was made from",
    )
    add_dtype_argument(command, "to compute in")
    command.add_argument("--window", type=int, metavar="N", help="tokens in a window (at most 1024)")
    command.add_argument("--stride", type=int, metavar="N", help="tokens between windows (window / 2)")
    command.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="windows or samples at once (1)"
    )
    command.add_argument("--samples", type=int, default=64, metavar="N", help="lines or pictures to use (64)")
    command.add_argument("--images", type=Path, metavar="DIR", help="pictures for an image classifier")
    command.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="keep the float model's predictions here: an interrupted run goes on, a later one need not make them "
        "again (4 bytes x tokens x vocabulary)",
    )
    add_json_argument(command)
    add_settings(command)
    add_text_arguments(command, "text", 4096)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the figures and write the JSON."""
    check_output_files(arguments.json)
    if arguments.float_model:
        if arguments.quantized:
            raise CommandError("give the float model first, or after --float, not both.")
        arguments.model, arguments.quantized = arguments.float_model, arguments.model
    if arguments.quantized and settings_given(arguments):
        raise CommandError("give a quantized model, or settings to make one, not both.")
    config = settings(arguments)
    if is_quantized(config_of(arguments.model)):
        raise CommandError(
            f"{arguments.model} is quantized; name the float model that it was made from with --float."
        )
    if arguments.quantized and not is_quantized(config_of(arguments.quantized)):
        raise CommandError(
            f"{arguments.quantized} is not quantized; name a float model alone, or after --float."
        )

    def quantized() -> Any:
        gc.collect()  # the float model goes first
        if arguments.quantized:
            return load_model(arguments.quantized, dtype=arguments.dtype)
        return load_model(arguments.model, config, arguments.dtype)

    architecture = architecture_of(arguments.model)
    try:
        if architecture.endswith(("ForCausalLM", "ForMaskedLM", "LMHeadModel")):
            figures = _language_model(arguments, quantized)
        elif "Classification" in architecture:
            figures = _classifier(arguments, quantized)
        else:
            figures = _encoder(arguments, quantized)
    except (ValueError, TypeError, OSError) as problem:
        raise CommandError(" ".join(str(problem).split())) from problem
    figures = {
        "model": arguments.model,
        "quantized": arguments.quantized or described(config),
        **figures,
    }
    show(arguments, _table(figures), figures)
    return 0


def _language_model(arguments: argparse.Namespace, quantized: Callable[[], Any]) -> dict[str, Any]:
    from mono_quant_hf.evaluation import divergence, record_reference

    name, text = load_text(arguments)
    tokenizer = load_processor(arguments.model)
    progress = sys.stderr.isatty()
    with scratch_folder() as temporary:
        model = load_model(arguments.model, dtype=arguments.dtype)
        reference = record_reference(
            model,
            tokenizer,
            text,
            arguments.reference or temporary,
            window=arguments.window,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            column=arguments.column,
            max_tokens=arguments.max_tokens,
            progress=progress,
        )
        before = model.get_memory_footprint()
        del model
        model = quantized()
        result = divergence(reference, model, batch_size=arguments.batch_size, progress=progress)
    scored = reference.perplexity.to_dict()
    return {
        "data": name,
        "memory_bytes": {"float": before, "quantized": model.get_memory_footprint()},
        "reference_perplexity_standard_error": reference.perplexity.perplexity_standard_error,
        **{key: scored[key] for key in ("nll", "nll_standard_error")},
        **result.to_dict(),
        "perplexity_change_percent": result.perplexity_change_percent,
    }


def _classifier(arguments: argparse.Namespace, quantized: Callable[[], Any]) -> dict[str, Any]:
    from mono_quant_hf.evaluation import classifier_logits, compare_classifiers

    if arguments.images:
        name, batches = arguments.images.name, list(_pictures(arguments))
    else:
        name, lines = _lines(arguments)
        tokenizer = load_processor(arguments.model)
        batches = [
            dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt"))
            for part in _parts(lines, arguments.batch_size)
        ]
    model = load_model(arguments.model, dtype=arguments.dtype)
    if not arguments.images and model.main_input_name == "pixel_values":
        raise CommandError(
            f"{type(model).__name__} classifies pictures; name a folder of them with --images."
        )
    batches = [_cast(batch, model.dtype) for batch in batches]
    expected, before = classifier_logits(model, batches), model.get_memory_footprint()
    del model
    model = quantized()
    result = compare_classifiers(expected, model, batches)
    footprints = {"float": before, "quantized": model.get_memory_footprint()}
    return {"data": name, "memory_bytes": footprints, **result.to_dict()}


def _encoder(arguments: argparse.Namespace, quantized: Callable[[], Any]) -> dict[str, Any]:
    from mono_quant_hf.evaluation import compare_encoders, text_embeddings

    name, lines = _lines(arguments)
    tokenizer = load_processor(arguments.model)
    model = load_model(arguments.model, dtype=arguments.dtype)
    if model.main_input_name != "input_ids":
        raise CommandError(
            f"{type(model).__name__} does not read text; use mono_quant_hf.evaluation from Python with its inputs."
        )
    size = arguments.batch_size
    expected, before = text_embeddings(model, tokenizer, lines, batch_size=size), model.get_memory_footprint()
    del model
    model = quantized()
    result = compare_encoders(expected, model, tokenizer, lines, batch_size=size)
    footprints = {"float": before, "quantized": model.get_memory_footprint()}
    return {"data": name, "memory_bytes": footprints, **result.to_dict()}


def _lines(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The first lines of the text, or rows of the dataset, that hold more than a word."""
    name, text = load_text(arguments)
    lines: list[str] = []
    for piece in texts(text, arguments.column):
        lines += [line.strip() for line in piece.splitlines() if len(line.split()) > 1]
        if len(lines) >= arguments.samples:
            break
    if not lines:
        raise CommandError("the text has no lines of two words or more.")
    return name, lines[: arguments.samples]


def _pictures(arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    from transformers import AutoImageProcessor

    try:
        from PIL import Image
    except ImportError as missing:
        raise CommandError("--images needs Pillow: pip install pillow.") from missing
    files = sorted(f for f in arguments.images.rglob("*") if f.suffix.lower() in IMAGES)[: arguments.samples]
    if not files:
        raise CommandError(f"--images {arguments.images} holds no pictures ({', '.join(IMAGES)}).")
    processor = load_processor(arguments.model, AutoImageProcessor)
    for part in _parts(files, arguments.batch_size):
        pictures = []
        for file in part:
            with Image.open(file) as picture:
                pictures.append(picture.convert("RGB"))
        yield dict(processor(pictures, return_tensors="pt"))


def _cast(batch: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def _parts(items: list[Any], size: int) -> Iterable[list[Any]]:
    if size < 1:
        raise CommandError(f"--batch-size {size} is too small; give at least 1.")
    return (items[begin : begin + size] for begin in range(0, len(items), size))


_LABELS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "reference_perplexity": ("perplexity, float", lambda x: f"{x:.4f}"),
    "perplexity": ("perplexity, quantized", lambda x: f"{x:.4f}"),
    "perplexity_change_percent": ("change", lambda x: f"{x:+.3f} %"),
    "nll_difference": ("change of ln perplexity", lambda x: f"{x:+.6f}"),
    "nll_difference_standard_error": ("  its standard error", lambda x: f"{x:.6f}"),
    "kl_mean": ("mean KL divergence, nats", lambda x: f"{x:.6f}"),
    "kl_standard_error": ("  its standard error", lambda x: f"{x:.6f}"),
    "kl_p99": ("99th percentile", lambda x: f"{x:.6f}"),
    "top1_agreement": ("top-1 agreement", lambda x: f"{100 * x:.2f} %"),
    "relative_error": ("relative error", lambda x: f"{100 * x:.3f} %"),
    "worst_relative_error": ("  worst sample", lambda x: f"{100 * x:.3f} %"),
    "cosine_mean": ("mean cosine", lambda x: f"{x:.6f}"),
    "cosine_min": ("lowest cosine", lambda x: f"{x:.6f}"),
    "tokens": ("tokens scored", lambda n: f"{n:,}"),
    "samples": ("samples", lambda n: f"{n:,}"),
}


def _table(figures: dict[str, Any]) -> str:
    memory = figures["memory_bytes"]
    rows = [("in memory, MB", f"{memory['float'] / 1e6:,.1f} → {memory['quantized'] / 1e6:,.1f}")]
    error = figures.get("reference_perplexity_standard_error")
    for key, (label, as_text) in _LABELS.items():
        if figures.get(key) is not None:
            value = as_text(figures[key])
            if key == "reference_perplexity" and error is not None:
                value += f" ± {error:.4f}"
            rows.append((label, value))
    width = max(len(label) for label, _ in rows)
    lines = [f"{figures['quantized']} against {figures['model']}, on {figures['data']}"]
    return "\n".join([*lines, *(f"  {label.ljust(width)}  {value}" for label, value in rows)])
