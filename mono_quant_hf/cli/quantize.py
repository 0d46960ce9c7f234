"""`mono-quant-hf quantize`: a float model in, a quantized model out."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .errors import CommandError
from .models import add_dtype_argument, config_of, dtype_of
from .output import add_json_argument, check_output_files, show
from .settings import add_settings, settings
from .texts import add_text_arguments, load_text

CALIBRATIONS = ("text", "self", "data-free")

DESCRIPTION = """\
Quantize a model and save it with a model card. By default while it loads, every weight to its nearest code; with
--calibration in memory, by codes that keep the outputs of the layers (the format is the same):
  text       on a text of yours, best of the kind that the model is used on;
  self       on text that the model writes itself, where there is none;
  data-free  without running the model at all.
The model may also be a GGUF file, or int8 of compressed-tensors or bitsandbytes; int8 codes with a scale for each
channel are taken over as they are, all else is rounded a second time.
"""
EPILOG = """\
examples:
  mono-quant-hf quantize ./model ./model-int8
  mono-quant-hf quantize ./model ./model-int8 --embeddings --override '*.down_proj=float16'
  mono-quant-hf quantize model.gguf ./model-int8 --symmetric
  mono-quant-hf quantize ./model ./model-int8 --calibration text --text-file book.txt
  mono-quant-hf quantize ./model ./model-int8 --calibration self --resume ./kept
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `quantize` to the subcommands."""
    command = commands.add_parser(
        "quantize",
        help="quantize a float model and save it, with calibration if asked",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument("model", help="a folder, a name on the Hub, or a GGUF file")
    command.add_argument("output", type=Path, help="folder for the quantized model; new, or empty")
    command.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")
    add_dtype_argument(command, "of what is not quantized")
    command.add_argument("--calibration", choices=CALIBRATIONS, help="choose codes by what the layers do")
    command.add_argument("--samples", type=int, default=128, metavar="N", help="rows of text (128)")
    command.add_argument("--length", type=int, default=512, metavar="N", help="tokens in a row (512)")
    command.add_argument(
        "--damping",
        type=float,
        default=0.1,  # as of Compensation
        metavar="X",
        help="0 to 1: lower fits the calibration text more closely, higher is safer on other text (%(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the text that the model writes (0)")
    command.add_argument(
        "--resume", type=Path, metavar="DIR", help="keep finished layers here, and go on from them"
    )
    add_json_argument(command)
    add_settings(command)
    add_text_arguments(command, "text for --calibration text", None)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Quantize and save."""
    from mono_quant_hf.hub import quantize_checkpoint
    from mono_quant_hf.hub.folders import check_destination

    output = arguments.output
    check_output_files(arguments.json, destination=output)
    check_destination(output, arguments.overwrite, arguments.model)
    if not arguments.model.endswith(".gguf"):
        config_of(arguments.model)
    config = settings(arguments)
    if arguments.calibration and config.weights != "int8":
        raise CommandError(f"--calibration is for int8; leave it out with --weights {config.weights}.")
    if arguments.calibration != "text" and (arguments.text_file or arguments.dataset):
        raise CommandError("a text is for --calibration text; add that, or leave the text out.")
    how = quantize_checkpoint(
        arguments.model,
        output,
        config,
        dtype=dtype_of(arguments.dtype),
        overwrite=arguments.overwrite,
        **_calibration(arguments),
    )
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    result = {"source": arguments.model, "destination": str(output), "bytes": size, "how": how}
    show(
        arguments,
        f"{arguments.model} is quantized and saved to {output}: {size / 1e6:,.1f} MB, {how}.",
        result,
    )
    return 0


def _calibration(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `quantize_checkpoint` is given for calibration, nothing without."""
    from mono_quant_hf.calibration import Compensation, Sampling

    if arguments.resume is not None:
        _check_resume(arguments)
    if arguments.calibration is None:
        return {}
    calibration: Any = arguments.calibration
    if calibration == "text":
        _, text = load_text(arguments)
        calibration = [text] if isinstance(text, str) else text
    return {
        "calibration": calibration,
        "sampling": Sampling(
            samples=arguments.samples, length=arguments.length, column=arguments.column, seed=arguments.seed
        ),
        "compensation": Compensation(damping=arguments.damping),
        "resume_folder": arguments.resume,
        "progress": sys.stderr.isatty(),
    }


def _check_resume(arguments: argparse.Namespace) -> None:
    from mono_quant_hf.calibration.resume import check_resume_folder

    if arguments.calibration not in ("text", "self"):
        raise CommandError("--resume is for --calibration text or self; add that, or leave it out.")
    kept, output = Path(os.path.realpath(arguments.resume)), Path(os.path.realpath(arguments.output))
    if kept == output or kept in output.parents or output in kept.parents:
        raise CommandError(
            f"--resume {arguments.resume} and {arguments.output} hold one another; keep them apart."
        )
    check_resume_folder(arguments.resume)
