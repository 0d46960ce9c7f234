"""`mono-quant-hf verify`: whether a checkpoint is what its config says, and what the float model rounds to."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .output import add_json_argument, check_output_files, show
from .settings import scheme

if TYPE_CHECKING:
    from mono_quant_hf.hub import Verification

FLAWS = 10
"""What is listed of a damage that is everywhere, if --top does not say more."""

DESCRIPTION = """\
Check the files of a quantized model against its config.json: every file, name, dtype and shape, scales finite and
positive, zero-points where they belong, every checksum, the index of shards. With --float, also each weight against
the float model: half a step of the grid at most, where codes are the nearest; calibrated codes may differ, and are
told. The model is not loaded. Exit code 1 if anything is wrong, each named with its file and tensor.
"""
EPILOG = """\
examples:
  mono-quant-hf verify ./model-int8
  mono-quant-hf verify me/model-int8 --float org/model --json
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `verify` to the subcommands."""
    command = commands.add_parser(
        "verify",
        help="check a quantized checkpoint, also against its float model",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument("checkpoint", help="folder, or name on the Hub, of a quantized model")
    command.add_argument(
        "--float", dest="float_model", metavar="MODEL", help="the float model that it was made from"
    )
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a checkpoint on the Hub")
    command.add_argument(
        "--top",
        type=int,
        default=5,
        metavar="N",
        help="weights to list with --float; 0 for all, also of what is wrong (5)",
    )
    add_json_argument(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, and say what was found; 1 where something is wrong."""
    from mono_quant_hf.hub import verify_checkpoint

    check_output_files(arguments.json)
    found = verify_checkpoint(
        arguments.checkpoint, arguments.float_model, revision=arguments.revision, progress=sys.stderr.isatty()
    )
    show(arguments, _text(found, arguments.top), found.to_dict())
    return 0 if found.ok else 1


def _text(found: Verification, top: int) -> str:
    how = scheme(found.config) if found.config else "unknown"
    lines = [
        f"{found.checkpoint}: {how}, {found.tensors} tensors in {found.files} file{'s' * (found.files != 1)}, "
        f"{found.bytes / 1e6:,.1f} MB"
    ]
    if found.compared is not None:
        lines.append(f"  checksums compared: {found.compared}")
    if found.weights:
        lines.append(f"  {len(found.weights)} weights compared with {found.source}; the lowest SQNR:")
        shown = found.weights[: top or None]
        width = max(len(weight.tensor) for weight in shown)
        for weight in shown:
            steps = "" if weight.steps is None else f"  at most {weight.steps:.3f} steps"
            lines.append(f"    {weight.tensor.ljust(width)}  {weight.sqnr:6.1f} dB{steps}  {weight.rounding}")
    lines += [f"  note: {note}" for note in found.notes]
    count = len(found.flaws)
    listed = found.flaws[: max(top, FLAWS) if top else None]
    lines += [f"  WRONG: {flaw.message}" for flaw in listed]
    if len(listed) < count:
        lines.append(f"  ... and {count - len(listed)} more (--top 0 shows all)")
    lines.append(
        "Nothing is wrong." if found.ok else f"{count} thing{'s are' if count > 1 else ' is'} wrong."
    )
    return "\n".join(lines)
