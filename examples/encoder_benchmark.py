"""How fast a quantized text encoder is: `python examples/encoder_benchmark.py ./my-float-encoder`.

Beside float32 in torch, and beside ONNX Runtime where it is installed: float32, quantized by itself (dynamic, per
channel), and this package's own codes (`mono-quant-hf export --format onnx`). All take turns; a figure is the median
of the turns. The cosine is the lowest between a sentence's embedding (the mean of its tokens) and float32's.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_benchmark import measure, processor
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.hub import export

SENTENCE = "A sentence of a usual length says what happened, where it was, and what came of it in the end. "
Run = Callable[[dict[str, Tensor]], Tensor]


class Hidden(nn.Module):
    """The last hidden state alone, which is what `torch.onnx` is to keep."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def in_torch(model: nn.Module) -> Run:
    return lambda inputs: model(**inputs)[0]


def in_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # through the others' turns
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda inputs: torch.from_numpy(session.run(None, {n: inputs[n].numpy() for n in names})[0])


def cases(model: Any, folder: Path) -> dict[str, Run]:
    """Each way of running the encoder; files of ONNX go into `folder`."""
    plain: Any = quantize_model(copy.deepcopy(model), MonoQuantConfig())
    rounded = quantize_model(copy.deepcopy(model), MonoQuantConfig(activations="int8"))
    found = {"float32": in_torch(model), "int8": in_torch(plain), "int8 activations": in_torch(rounded)}
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None:
        print("ONNX Runtime: skipped, pip install onnxruntime onnxscript\n")
        return found
    from onnxruntime.quantization import QuantType, quantize_dynamic

    floats, quantized = folder / "float32.onnx", folder / "int8.onnx"
    example = torch.ones(2, 16, dtype=torch.long)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        Hidden(model),
        (example, example.clone()),  # one tensor would become one input
        floats,
        dynamo=True,
        dynamic_shapes=(free, free),
        external_data=False,
        verbose=False,
    )
    quantize_dynamic(floats, quantized, per_channel=True, weight_type=QuantType.QInt8)
    found["ONNX Runtime float32"] = in_onnxruntime(floats)
    found["ONNX Runtime int8"] = in_onnxruntime(quantized)
    for name, source, activations in (("int8", plain, None), ("int8 activations", plain, "int8")):
        export(source, folder / name, "onnx", activations=activations)
        found[f"ours {name}, in ONNX Runtime"] = in_onnxruntime(folder / name / "model.onnx")
    return found


def batch_of(tokenizer: Any, count: int, length: int) -> dict[str, Tensor]:
    text = SENTENCE * length  # a token has a letter at least
    return dict(tokenizer([text] * count, truncation=True, max_length=length, return_tensors="pt"))


def shape(text: str) -> tuple[int, int]:
    """Sentences and tokens of `BxT`."""
    count, _, length = text.partition("x")
    if not (count.isdecimal() and length.isdecimal() and int(count) and int(length) > 2):
        raise argparse.ArgumentTypeError(f"Expected sentences x tokens as in 32x64, got {text!r}")
    return int(count), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub name of a float text encoder")
    parser.add_argument(
        "--batches", type=shape, nargs="+", default=[(1, 16), (1, 128), (32, 64)], metavar="BxT"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="for each batch (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.no_grad():
        runs = cases(model, Path(folder))
        for count, length in arguments.batches:
            inputs = batch_of(tokenizer, count, length)
            embeddings = {name: run(inputs).mean(1) for name, run in runs.items()}
            ways = {name: lambda _, run=run, inputs=inputs: run(inputs) for name, run in runs.items()}
            for name, milliseconds in measure(ways, 1000, arguments.seconds).items():
                cosine = torch.cosine_similarity(embeddings[name], embeddings["float32"]).min().item()
                rows.append(
                    {"case": name, "batch": f"{count} x {length}", "ms": milliseconds, "cosine": cosine}
                )
    print(f"{Path(arguments.model).name} on {processor()}, {torch.get_num_threads()} threads, ", end="")
    print(f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; sentences x tokens, ms\n")
    shapes = list(dict.fromkeys(row["batch"] for row in rows))
    print("| | " + " | ".join(shapes) + " | lowest cosine |\n| --- |" + " ---: |" * (len(shapes) + 1))
    for name in runs:
        own = [row for row in rows if row["case"] == name]
        cells = [f"{row['ms']:.1f}" for row in own] + [f"{min(row['cosine'] for row in own):.4f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
