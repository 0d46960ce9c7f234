"""One way to all the formats of other engines: `export`, and one file a format."""

from __future__ import annotations

import os

from torch import Tensor
from transformers import PreTrainedModel

from mono_quant_hf.hub.errors import HubError

from .bitsandbytes import BitsAndBytesExporter
from .compressed_tensors import CompressedTensorsExporter
from .exporter import Exporter
from .gguf import GgufExporter
from .onnx import OnnxExporter

FORMATS: dict[str, type[Exporter]] = {
    "compressed-tensors": CompressedTensorsExporter,
    "bitsandbytes": BitsAndBytesExporter,
    "gguf": GgufExporter,
    "onnx": OnnxExporter,
}


def formats_that_take(option: str) -> list[str]:
    """The formats that have an option of `export` which not every format has.

    Example:
        >>> formats_that_take("activations")
        ['compressed-tensors', 'onnx']
    """
    return [name for name, exporter in FORMATS.items() if option in exporter.takes]


def export(
    model: PreTrainedModel | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    format: str,
    *,
    activations: str | None = None,
    tokenizer: object = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    inputs: dict[str, Tensor] | None = None,
) -> None:
    """Write a model quantized by mono_quant_hf for another engine.

    The weights are the same, and what has no form there is written in float, with a notice.

    Args:
        model: the model, or its folder or name on the Hub.
        destination: a folder, for `"gguf"` a file that ends in .gguf; written whole or not at all.
        format: `"compressed-tensors"` (vLLM and SGLang, which serve symmetric weights only, and transformers),
            `"bitsandbytes"` (symmetric weights only), `"gguf"` (llama.cpp; Q8_0, in which symmetric weights keep
            their codes, and weights with zero-points are rounded once more, with a notice) or `"onnx"` (ONNX Runtime
            and OpenVINO; a forward pass in float32 without a cache of keys and values).
        activations: `"int8"` has an engine quantize activations to int8 while it runs: compressed-tensors per token
            (None: what the model's config says), ONNX with one scale for the whole input of a layer.
        tokenizer: saved along; a folder brings its own.
        overwrite: replace a checkpoint, or for `"gguf"` a file, that this package wrote.
        max_shard_size: where to split safetensors.
        inputs: for ONNX, of a model that takes neither text nor pictures: example inputs by name. Their first dimension
            is the batch, and stays free; so does the second of integers, the length.

    Raises:
        HubError: the format is unknown, the destination is taken, the model is not quantized by mono_quant_hf, or the
            format has no place for it: the message says what, and what to do.
        ImportError: what writes GGUF or ONNX is missing.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from transformers import BertConfig, BertModel
        >>> from mono_quant_hf import MonoQuantConfig, quantize_model
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
        >>> model = quantize_model(BertModel(config), MonoQuantConfig(symmetric=True))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(model, f"{folder}/exported", "compressed-tensors")
        ...     written = json.loads(Path(folder, "exported", "config.json").read_text())
        >>> written["quantization_config"]["quant_method"]
        'compressed-tensors'
        >>> export(model, "exported", "awq")
        Traceback (most recent call last):
            ...
        mono_quant_hf.hub.errors.HubError: There is no export to 'awq'; choose one of ...
    """
    if format not in FORMATS:
        raise HubError(f"There is no export to {format!r}; choose one of {', '.join(FORMATS)}.")
    exporter = FORMATS[format]
    for name, value in (("activations", activations), ("inputs", inputs)):
        if value is not None and name not in exporter.takes:
            takers = " and ".join(formats_that_take(name))
            raise HubError(f"{name}= is for {takers}, not {format}; leave it out.")
    exporter(model, destination, activations, tokenizer, overwrite, max_shard_size, inputs).run()
