"""`mono-quant-hf estimate`: what a model takes in each form, before any of it is downloaded or loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .models import add_dtype_argument, dtype_of
from .output import add_json_argument, check_output_files, show
from .settings import add_settings, settings, settings_given
from .sizes import size

if TYPE_CHECKING:
    from mono_quant_hf.hub import Estimate

DESCRIPTION = """\
Say how many bytes a model takes in memory in float32, bfloat16, float16, int8, and int8 with its embeddings; with
settings, also quantized as they say. With --max-memory, also what device_map="auto" puts on each device, which this
machine need not have. Reads the config and the headers of the safetensors files: no weights are downloaded, and none
are made.
"""
EPILOG = """\
examples:
  mono-quant-hf estimate org/model
  mono-quant-hf estimate org/model --max-memory 0=8GB --max-memory cpu=16GB
  mono-quant-hf estimate ./model --override '*.down_proj=float16' --json
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `estimate` to the subcommands."""
    command = commands.add_parser(
        "estimate",
        help="say what a model takes in each form, without its weights",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument("model", help="a float model: a folder or a name on the Hub")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub")
    add_dtype_argument(command, "of what is not quantized")
    command.add_argument(
        "--max-memory",
        action="append",
        type=_limit,
        metavar="DEVICE=SIZE",
        help="what a device may hold, such as 0=8GB for the first GPU or cpu=16GB; may be repeated",
    )
    add_json_argument(command)
    add_settings(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Estimate and show."""
    from mono_quant_hf.hub import estimate

    check_output_files(arguments.json)
    dtype = dtype_of(arguments.dtype)
    found = estimate(
        arguments.model,
        settings(arguments) if settings_given(arguments) else None,
        dtype=None if dtype == "auto" else dtype,
        max_memory=dict(arguments.max_memory) if arguments.max_memory else None,
        revision=arguments.revision,
    )
    show(arguments, _text(arguments.model, found), {"model": arguments.model, **found.to_dict()})
    return 0


def _text(model: str, found: Estimate) -> str:
    from mono_quant_hf.evaluation.results import aligned

    on_disk = "" if found.bytes_on_disk is None else f", {_mb(found.bytes_on_disk)} MB on disk"
    devices = sorted({d for form in found.forms for d in form.bytes_by_device}, key=_order)
    titles = ["", "MB", "quantized", *(f"GPU {d}" if isinstance(d, int) else d for d in devices)]
    rows = []
    for form in found.forms:
        share = f"{form.share:.1%}" if form.share else "-"
        places = [_mb(form.bytes_by_device[d]) if d in form.bytes_by_device else "-" for d in devices]
        rows.append([form.name, _mb(form.bytes), share, *places])
    return (
        f"{model}: {found.architecture}, {found.parameters:,} parameters{on_disk}\n"
        f"{aligned(titles, rows, left={0})}\n"
        "MB = 1,000,000 bytes; what a forward pass takes, and the cache of keys and values, come on top."
    )


def _order(device: int | str) -> tuple[bool, str]:
    return isinstance(device, str), str(device)


def _mb(number: int) -> str:
    return f"{number / 1e6:,.1f}"


def _limit(value: str) -> tuple[int | str, int]:
    device, _, limit = value.partition("=")
    if not (device.isdecimal() or device in ("cpu", "mps", "disk")) or not limit:
        raise argparse.ArgumentTypeError(
            f"expected DEVICE=SIZE with the number of a GPU or cpu, such as 0=8GB; got {value!r}"
        )
    return int(device) if device.isdecimal() else device, size(limit)
