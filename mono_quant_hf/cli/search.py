"""`mono-quant-hf search`: int8, float16 or float for each module, for a budget in bytes or in KL divergence."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mono_quant_hf.files import check_room

from .errors import CommandError
from .inspect import text_batches
from .models import add_dtype_argument, config_of, dtype_of, is_quantized, load_model
from .output import add_json_argument, check_output_files, check_png, say, show
from .settings import add_settings, settings
from .sizes import size
from .texts import add_text_arguments

if TYPE_CHECKING:
    from mono_quant_hf import MonoQuantConfig

DESCRIPTION = """\
Choose int8, float16 or float for each module of a float model: the most exact model within a size, or the
smallest within a mean KL divergence from the float model. Measures what each module costs alone, shows the
frontier between all in int8 and all in float, and prints the config to use. What --override and --skip name, and
embeddings with --embeddings, are as these options say.
"""
EPILOG = """\
examples:
  mono-quant-hf search ./model --max-size 200MB
  mono-quant-hf search ./model --max-kl 0.001 --save ./model-mixed --png frontier.png
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `search` to the subcommands."""
    command = commands.add_parser(
        "search",
        help="choose int8, float16 or float for each module, for a budget",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument("model", help="a float language model: a folder or a name on the Hub")
    budget = command.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max-size", type=size, metavar="SIZE", help="for all parameters, such as 150MB")
    budget.add_argument(
        "--max-kl", type=float, metavar="NATS", help="mean KL divergence from the float model"
    )
    add_dtype_argument(command, "of the float model")
    command.add_argument("--save", type=Path, metavar="DIR", help="save the model that was chosen here")
    add_json_argument(command)
    command.add_argument(
        "--png", type=Path, metavar="FILE", help="draw the frontier to FILE (needs matplotlib)"
    )
    add_settings(command)
    add_text_arguments(command, "text to measure on", 512)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search and show; 1 where the budget cannot be met."""
    from mono_quant_hf import quantize_model
    from mono_quant_hf.evaluation import search_overrides
    from mono_quant_hf.hub.checkpoint import local_folder
    from mono_quant_hf.hub.estimate import bytes_when_quantized
    from mono_quant_hf.hub.folders import check_destination, written_beside
    from mono_quant_hf.hub.importing import add_companions

    check_output_files(arguments.json, arguments.png, destination=arguments.save)
    if arguments.save:
        check_destination(arguments.save, source=arguments.model)
    check_png(arguments.png)
    if is_quantized(config_of(arguments.model)):
        raise CommandError(f"{arguments.model} is quantized already; give the float model it was made from.")
    config = settings(arguments)
    if config.weights != "int8":
        raise CommandError(f"search chooses {config.weights} where it is worth it; leave --weights out.")
    source = local_folder(arguments.model)
    if arguments.max_size:
        _check_size(arguments, source, config)
    with written_beside(arguments.save) if arguments.save else nullcontext() as new:
        if new is not None:
            check_room(new, bytes_when_quantized(source, config, dtype_of(arguments.dtype)), "The model")
        model = load_model(arguments.model, dtype=arguments.dtype)
        batches = text_batches(arguments, model)
        try:
            result = search_overrides(
                model,
                batches,
                max_bytes=arguments.max_size,
                max_kl=arguments.max_kl,
                config=config,
                progress=sys.stderr.isatty(),
            )
        except (ValueError, TypeError) as problem:
            raise CommandError(str(problem)) from problem
        usual = config.as_code().removesuffix(")")
        config.module_overrides = result.module_overrides or None
        if new is not None:
            quantized: Any = quantize_model(model, config)
            quantized.save_pretrained(new)
            add_companions(arguments.model, source, new, arguments.save)
    overrides = "".join(
        f'    "{name}": {json.dumps(kind)},\n' for name, kind in result.module_overrides.items()
    )
    text = (
        f"{result.table()}\n\n{result.bytes / 1e6:,.2f} MB of {result.float_bytes / 1e6:,.2f} MB in float, mean KL "
        f"divergence {result.kl:.3g} nats (measured).\n\n"
        f"{usual}, module_overrides={{\n{overrides}}})"
    )
    show(arguments, text, result.to_dict())
    if arguments.png:
        result.to_png(arguments.png)
    if arguments.save:
        say(f"Saved to {arguments.save}.", sys.stderr)
    if not result.met:
        print("The budget cannot be met; the nearest model is shown.", file=sys.stderr)
        return 1
    return 0


def _check_size(arguments: argparse.Namespace, source: Path, config: MonoQuantConfig) -> None:
    """Refuse, before the work and not after it, a size below that of all in int8, embeddings included."""
    from mono_quant_hf import MonoQuantConfig
    from mono_quant_hf.hub.estimate import bytes_when_quantized

    smallest = bytes_when_quantized(
        source,
        MonoQuantConfig(symmetric=config.symmetric, quantize_embeddings=True),
        dtype_of(arguments.dtype),
    )
    if arguments.max_size < smallest:
        raise CommandError(
            f"--max-size {arguments.max_size / 1e6:,.2f}MB is less than all of {arguments.model} takes in int8 "
            f"({smallest / 1e6:,.2f} MB); give more."
        )
