"""`mono-quant-hf generate`: the answer of a model to a prompt, as it is written, and how fast."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from typing import Any

from mono_quant_hf.texts import printable

from .errors import CommandError
from .models import add_dtype_argument, chat_inputs, config_of, is_quantized, load_model, load_processor
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
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what to answer")
    command.add_argument("--raw", action="store_true", help="go on with the prompt, without a chat template")
    add_model_arguments(command)
    command.set_defaults(run=run)


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Add the model and how it answers, which `open_model` and `answer_to` read."""
    command.add_argument("model", help="a quantized or a float language model: a folder or a name on the Hub")
    command.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="at most so many in an answer (256)"
    )
    command.add_argument(
        "--sample", action="store_true", help="draw tokens at random in place of the likeliest"
    )
    add_dtype_argument(command, "to compute in")
    add_json_argument(command)
    add_settings(command)


def run(arguments: argparse.Namespace) -> int:
    """Answer, and say how fast."""
    model, tokenizer = open_model(arguments)
    if arguments.raw or not getattr(tokenizer, "chat_template", None):
        inputs = tokenizer(arguments.prompt, return_tensors="pt")
    else:
        inputs = chat_inputs(tokenizer, [{"role": "user", "content": arguments.prompt}])
    answer = answer_to(inputs, model, tokenizer, arguments)
    show(arguments, answer.speed(), {"prompt": arguments.prompt, **asdict(answer)})
    return 0


def open_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The language model of the arguments, quantized if it was float, and its tokenizer.

    Raises:
        CommandError: it does not generate text, or an argument does not fit it.
    """
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
    return model, tokenizer


@dataclass(frozen=True)
class Answer:
    """What a model wrote; `seconds` are those until the first token, and all."""

    answer: str
    tokens: int
    seconds_to_first: float
    seconds: float

    def speed(self) -> str:
        said = f"{self.tokens} tokens in {self.seconds:.1f} s, the first after {self.seconds_to_first:.1f} s"
        rest = self.seconds - self.seconds_to_first
        return f"{said}, then {(self.tokens - 1) / rest:.1f} tokens/s" if self.tokens > 1 else said


def answer_to(inputs: Any, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Answer:
    """What the model answers to what a tokenizer made; printed as it comes, where standard output is for text."""
    import torch
    from transformers import TextStreamer

    prints = prints_text(arguments)
    arrivals: list[float] = []

    class Printer(TextStreamer):
        """As transformers' own, but it notes when something comes, and escapes what would move a terminal's cursor."""

        def put(self, value: Any) -> None:
            arrivals.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if prints:
                super().on_finalized_text(printable(text), stream_end)

    with torch.inference_mode():
        started = time.perf_counter()
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=arguments.max_new_tokens,
            do_sample=arguments.sample,
            streamer=Printer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    _, first, *_ = arrivals  # what comes before is the prompt
    written = output[0] if model.config.is_encoder_decoder else output[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(written, skip_special_tokens=True)
    return Answer(text, len(written), first - started, arrivals[-1] - started)
