"""One way to all the formats of other engines."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from .errors import HubError
from .export_bitsandbytes import export_bitsandbytes
from .export_compressed_tensors import export_compressed_tensors
from .export_gguf import export_gguf
from .export_onnx import export_onnx

FORMATS = ("compressed-tensors", "bitsandbytes", "gguf", "onnx")


def export(
    model: PreTrainedModel | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    format: str,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Write a model quantized by mono_quant_hf for another engine.

    Args:
        model: the model, or its folder or name on the Hub.
        destination: a folder; for `"gguf"` a file.
        format: `"compressed-tensors"` (vLLM, SGLang, transformers), `"bitsandbytes"`, `"gguf"` (llama.cpp) or `"onnx"`
            (ONNX Runtime, OpenVINO).
        tokenizer: saved along; a folder brings its own.
        overwrite: replace a checkpoint, or for `"gguf"` a file, that this package wrote.
        options: those of `export_compressed_tensors`, `export_bitsandbytes`, `export_gguf` or `export_onnx`.

    Raises:
        HubError: the format is unknown, or as the function of the format.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from transformers import BertConfig, BertModel
        >>> from mono_quant_hf import MonoQuantConfig, quantize_model
        >>> config = BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=32)
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
    exporters: dict[str, Any] = {
        "compressed-tensors": export_compressed_tensors,
        "bitsandbytes": export_bitsandbytes,
        "gguf": export_gguf,
        "onnx": export_onnx,
    }
    if format not in exporters:
        raise HubError(f"There is no export to {format!r}; choose one of {', '.join(FORMATS)}.")
    exporters[format](model, destination, tokenizer=tokenizer, overwrite=overwrite, **options)
