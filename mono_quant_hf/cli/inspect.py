"""`mono-quant-hf inspect`: what quantizing did to each module."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mono_quant_hf.texts import token_sequences

from .errors import CommandError
from .models import add_dtype_argument, config_of, is_quantized, load_model, load_processor
from .output import add_json_argument, check_output_files, check_png, show
from .settings import add_settings, settings, settings_given
from .texts import add_text_arguments, load_text

if TYPE_CHECKING:
    import torch

    from mono_quant_hf.evaluation import QuantizationReport

DESCRIPTION = """\
Show what quantizing did to each module of a model: SQNR of the weight in dB, its worst channel, the share
of codes at the ends, bytes before and after, and why a module was left in float. The worst come first.
With --contributions, also the SQNR of each module's output on a text, and how much each module alone adds
to the KL divergence of the model's predictions from the float model's.
"""
EPILOG = """\
examples:
  mono-quant-hf inspect ./model-int8
  mono-quant-hf inspect ./model-int8 --float ./model --html report.html --png report.png
  mono-quant-hf inspect ./model --contributions --max-tokens 256 --json report.json
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `inspect` to the subcommands."""
    command = commands.add_parser(
        "inspect",
        help="show what quantizing did to each module, the worst first",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument("model", help="a quantized model; or a float one, which is then quantized in memory")
    command.add_argument(
        "--float",
        metavar="MODEL",
        dest="float_model",
        help="the float model that a quantized one was made from",
    )
    add_dtype_argument(command, "of the float model")
    command.add_argument("--contributions", action="store_true", help="also run the model, see above")
    command.add_argument(
        "--top", type=int, default=25, metavar="N", help="modules in the table; 0 for all (25)"
    )
    add_json_argument(command)
    command.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page to FILE (pictures: by matplotlib)"
    )
    command.add_argument(
        "--png", type=Path, metavar="FILE", help="write the pictures to FILE (needs matplotlib)"
    )
    add_settings(command)
    add_text_arguments(command, "text for --contributions", 512)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table and write the files."""
    check_output_files(arguments.json, arguments.html, arguments.png)
    check_png(arguments.png)
    report = make_report(arguments)
    text = f"{report.summary()}\n\n{report.table(arguments.top or None)}"
    hidden = len(report.modules) - arguments.top if arguments.top else 0
    if hidden > 0:
        text += f"\n... and {hidden} more (--top 0 shows all)"
    show(arguments, text, report.to_dict())
    if arguments.html:
        report.to_html(arguments.html)
    if arguments.png:
        report.to_png(arguments.png)
    return 0


def make_report(arguments: argparse.Namespace) -> QuantizationReport:
    """The report for the arguments of this command; also what `search` starts from."""
    from mono_quant_hf import quantize_model
    from mono_quant_hf.evaluation import quantization_report

    progress = sys.stderr.isatty()
    if is_quantized(config_of(arguments.model)):
        if settings_given(arguments):
            raise CommandError(f"{arguments.model} is quantized already; leave the settings out.")
        model = load_model(arguments.model)
        reference: Any = arguments.float_model
        if arguments.contributions and reference is None:
            raise CommandError("--contributions compares with the float model: name it with --float.")
        if reference is not None and (arguments.contributions or not Path(reference).is_dir()):
            reference = load_model(reference, dtype=arguments.dtype)
    else:
        if arguments.float_model:
            raise CommandError(f"--float is for a quantized model, and {arguments.model} is a float one.")
        config = settings(arguments)
        reference = load_model(arguments.model, dtype=arguments.dtype)
        model = quantize_model(copy.deepcopy(reference), config)
    inputs = text_batches(arguments, reference) if arguments.contributions else None
    return quantization_report(model, reference, inputs, progress=progress)


def text_batches(arguments: argparse.Namespace, model: Any) -> list[dict[str, torch.Tensor]]:
    """The text of the arguments as single rows of at most 512 tokens.

    Raises:
        CommandError: the model does not read text.
    """
    from mono_quant_hf.calibration.samples import max_positions

    if model.main_input_name != "input_ids":
        raise CommandError(
            f"{type(model).__name__} does not read text; use quantization_report() from Python with its inputs."
        )
    source = arguments.float_model if getattr(arguments, "float_model", None) else arguments.model
    tokenizer = load_processor(source)
    _, text = load_text(arguments)
    (tokens,) = token_sequences(tokenizer, text, column=arguments.column, max_tokens=arguments.max_tokens)
    length = min(512, max_positions(model) or 512)
    return [{"input_ids": part.unsqueeze(0)} for part in tokens.split(length)]
