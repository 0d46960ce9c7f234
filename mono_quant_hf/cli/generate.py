"""`mono-quant-hf generate`: the answer of a model to a prompt, as it is written, and how fast."""

from __future__ import annotations

import argparse
import time
from typing import Any

from mono_quant_hf.names import DTYPES

from .errors import CommandError
from .models import chat_inputs, config_of, is_quantized, load_model, load_processor
from .output import add_json_argument, check_output_files, prints_text, show
from .settings import add_settings, settings, settings_given

DESCRIPTION = """\
Write what a language model answers to a prompt, token by token, and how many tokens a second that was. A float model
is quantized as it loads. A model with a chat template is asked as in a chat; --raw lets it go on with the text.
"""
EPILOG = """\
examples:
  mono-quant-hf generate ./model-int8 --prompt "Why is the sky blue?"
  mono-quant-hf generate org/model --prompt "Once upon a time" --raw --max-new-tokens 200
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate` to the subcommands."""
    command = commands.add_parser(
        "generate", help="answer a prompt, streaming", description=DESCRIPTION, epilog=EPILOG
    )
    command.add_argument("model", help="a quantized or a float language model: a folder or a name on the Hub")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what to answer")
    command.add_argument("--raw", action="store_true", help="go on with the prompt, without a chat template")
    command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most so many (256)")
    command.add_argument(
        "--sample", action="store_true", help="draw tokens at random in place of the likeliest"
    )
    command.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="to compute in (auto)")
    add_json_argument(command)
    add_settings(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Answer, and say how fast."""
    import torch
    from transformers import TextStreamer

    check_output_files(arguments.json)
    if arguments.max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens {arguments.max_new_tokens} is too few; give at least 1.")
    quantized = is_quantized(config_of(arguments.model))
    if quantized and settings_given(arguments):
        raise CommandError(f"{arguments.model} is quantized already; leave the settings out.")
    tokenizer = load_processor(arguments.model)
    model = load_model(arguments.model, None if quantized else settings(arguments), arguments.dtype)
    if not model.can_generate():
        raise CommandError(f"{type(model).__name__} does not generate text; give a language model.")
    inputs = _inputs(tokenizer, arguments).to(model.device)
    streamer = (
        TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        if prints_text(arguments)
        else None
    )
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=arguments.sample,
            streamer=streamer,
        )
    seconds = time.perf_counter() - started
    answer = output[0] if model.config.is_encoder_decoder else output[0, inputs["input_ids"].shape[1] :]
    result = {
        "prompt": arguments.prompt,
        "answer": tokenizer.decode(answer, skip_special_tokens=True),
        "tokens": len(answer),
        "seconds": seconds,
    }
    speed = f"{len(answer)} tokens in {seconds:.1f} s, {len(answer) / seconds:.1f} tokens/s"
    show(arguments, speed, result)
    return 0


def _inputs(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    if arguments.raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(arguments.prompt, return_tensors="pt")
    return chat_inputs(tokenizer, arguments.prompt)
