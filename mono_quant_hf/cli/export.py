"""`mono-quant-hf export`: a quantized model in the format of another engine."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from mono_quant_hf.names import EXPORT_FORMATS

from .errors import CommandError
from .output import add_json_argument, check_output_files, show

DESCRIPTION = """\
Write a model quantized by mono_quant_hf so that other engines load it:

  compressed-tensors  vLLM, SGLang and transformers; the same codes and scales
  bitsandbytes        transformers with bitsandbytes (LLM.int8); symmetric weights only
  gguf                llama.cpp, as Q8_0; models of type llama, mistral, qwen2, qwen3 and qwen3_moe
  onnx                ONNX Runtime and OpenVINO; models of text and pictures, without a cache

What a format has no form for is written in float, and said.
"""
EPILOG = """\
examples:
  mono-quant-hf export model-int8 model-ct --format compressed-tensors
  mono-quant-hf export model-int8 model-w8a8 --format compressed-tensors --activations int8
  mono-quant-hf export me/model-int8 model.gguf --format gguf
  mono-quant-hf export encoder-int8 encoder-onnx --format onnx --activations int8
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `export` to the subcommands."""
    command = commands.add_parser(
        "export",
        help="write a quantized model for vLLM, SGLang, bitsandbytes, llama.cpp or ONNX Runtime",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument("source", metavar="SRC", help="folder, or name on the Hub, of a quantized model")
    command.add_argument("destination", type=Path, metavar="DST", help="new folder; for gguf a file")
    command.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="the format to write")
    command.add_argument(
        "--activations",
        choices=["int8"],
        help="compressed-tensors, onnx: int8 activations, quantized while it runs",
    )
    command.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")
    add_json_argument(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export; the exit code is 0, or a CommandError says why not."""
    from mono_quant_hf.hub.export import export, formats_that_take

    check_output_files(arguments.json, destination=arguments.destination)
    takers = formats_that_take("activations")
    if arguments.activations and arguments.format not in takers:
        raise CommandError(f"--activations is for --format {' and '.join(takers)}; leave it out.")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    export(
        arguments.source,
        arguments.destination,
        arguments.format,
        activations=arguments.activations,
        overwrite=arguments.overwrite,
    )
    destination = str(arguments.destination)
    result = {"source": arguments.source, "destination": destination, "format": arguments.format}
    show(arguments, destination, result)
    return 0
