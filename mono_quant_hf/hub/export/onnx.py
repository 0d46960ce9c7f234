"""ONNX: codes as int8 initializers, for ONNX Runtime, OpenVINO and whatever else reads it.

A weight becomes a DequantizeLinear per channel before MatMul or Conv. With int8 activations it becomes a MatMulInteger
behind a DynamicQuantizeLinear, as in ONNX Runtime's own dynamic quantization: the quickest there, and the least exact.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mono_quant_hf.hub.errors import HubError
from mono_quant_hf.kernels import use_kernel
from mono_quant_hf.versions import require

from .exporter import Exporter

logger = logging.getLogger("mono_quant_hf")
FILE = "model.onnx"
FLOAT, INT8 = 1, 3
"""ONNX's numbers for dtypes."""


class OnnxExporter(Exporter):
    """Writes `model.onnx`, computing in float32, with its config and tokenizer.

    The graph is a forward pass without a cache of keys and values: what encoders, classifiers and embedders do, and
    the logits of a whole sequence. Batch and length are free.
    """

    takes = ("activations", "inputs")

    def check_destination(self) -> None:
        if self.activations not in (None, "int8"):
            raise HubError(
                f'Expected activations "int8" or None, got {self.activations!r}; choose one of them.'
            )
        require("onnxscript", "Writing ONNX")
        super().check_destination()

    def write(self) -> None:
        if self.activations is not None:
            logger.warning(
                "ONNX Runtime saturates the integer products of this file on x86 processors without VNNI; there export "
                "without int8 activations."
            )
        model = self.model
        if model.device.type != "cpu" or model.dtype != torch.float32:
            model = copy.deepcopy(model).to("cpu", torch.float32)
        program = _exported(model, self.inputs or _example(model), self.activations)
        with self.folder() as folder:
            program.save(folder / FILE)
            config = copy.deepcopy(model.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            config.save_pretrained(folder)


def _example(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of a model of text or pictures."""
    config, main = model.config, model.main_input_name
    if main == "input_ids" and not config.is_encoder_decoder:
        names = {"input_ids", "attention_mask"}
        if getattr(config, "type_vocab_size", 0) > 1:
            names.add("token_type_ids")
        known = inspect.signature(model.forward).parameters
        return {name: torch.ones(2, 8, dtype=torch.long) for name in known if name in names}
    size = getattr(config, "image_size", 224)
    if main == "pixel_values" and (isinstance(size, int) or len(size) == 2):
        height, width = (size, size) if isinstance(size, int) else size
        return {main: torch.randn(2, getattr(config, "num_channels", 3), height, width)}
    raise HubError(
        f"Expected a model of text or pictures, got {type(model).__name__}, which takes {main}"
        f"{' and decodes' if config.is_encoder_decoder else ''}; give export example inputs (inputs={{name: "
        "tensor}})."
    )


def _exported(model: PreTrainedModel, inputs: dict[str, Tensor], activations: str | None) -> Any:
    """torch's ONNXProgram of a forward pass."""
    free: dict[str, Any] = {name: {0: "batch"} for name in inputs}
    for name, tensor in inputs.items():
        if tensor.dim() == 2 and not tensor.is_floating_point():
            free[name][1] = f"length of {name}" if model.config.is_encoder_decoder else "length"
        elif tensor.dim() == 4:
            free[name] |= {
                2: torch.export.Dim.AUTO,
                3: torch.export.Dim.AUTO,
            }  # fixed where the model fixes them
    given: dict[str, Any] = dict(inputs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
        free["use_cache"] = None
    with _as_for_export(model), use_kernel("auto"), torch.no_grad():
        outputs = [name for name, value in model(**given).items() if isinstance(value, Tensor)]
        try:
            program: Any = torch.onnx.export(
                model,
                kwargs=given,
                dynamo=True,
                dynamic_shapes=free,
                output_names=outputs,
                custom_translation_table=_translations(activations),
                optimize=False,  # before `_fold` it would turn small codes into floats
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            first = str(error.__cause__ or error).strip().splitlines()[0]
            raise HubError(f"torch cannot export {type(model).__name__} to ONNX: {first}") from error
    _fold(program)
    for value in program.model.graph.inputs:
        for place, name in free[value.name].items():
            if isinstance(name, str):
                value.shape[place] = name
    return program


@contextmanager
def _as_for_export(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation, and torch's exporter quiet, for a while."""
    training = model.training
    log = logging.getLogger("torch.onnx")
    level = log.level
    model.eval()
    log.setLevel(logging.ERROR)  # it lists what it could register if torchvision were installed
    try:
        yield
    finally:
        model.train(training)
        log.setLevel(level)


def _translations(activations: str | None) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What stands for our operator in the graph."""
    import onnxscript

    op: Any = onnxscript.opset18

    def column(tensor: Any) -> Any:
        return op.Squeeze(tensor, op.Constant(value_ints=[1]))

    def plus(product: Any, bias: Any) -> Any:
        return product if bias is None else op.Add(product, bias)

    def of_floats(x, weight, scale, zero_point, bias):  # type: ignore[no-untyped-def]
        shift = () if zero_point is None else (column(zero_point),)
        floats = op.DequantizeLinear(weight, column(scale), *shift, axis=0)
        return plus(op.MatMul(x, op.Transpose(floats, perm=[1, 0])), bias)

    def of_codes(x, weight, scale, zero_point, bias):  # type: ignore[no-untyped-def]
        codes, step, shift = op.DynamicQuantizeLinear(x)
        shifts = (shift,) if zero_point is None else (shift, column(zero_point))
        sums = op.Cast(op.MatMulInteger(codes, op.Transpose(weight, perm=[1, 0]), *shifts), to=FLOAT)
        return plus(op.Mul(sums, op.Mul(step, column(scale))), bias)

    def of_halves(x, weight, bias):  # type: ignore[no-untyped-def]
        return plus(op.MatMul(x, op.Transpose(op.Cast(weight, to=FLOAT), perm=[1, 0])), bias)

    def linear(x, weight, scale=None, zero_point=None, bias=None, activations=None):  # type: ignore[no-untyped-def]
        return of_halves(x, weight, bias) if scale is None else of_int8(x, weight, scale, zero_point, bias)

    of_int8 = of_floats if activations is None else of_codes
    return {torch.ops.mono_quant.linear.default: linear}


def _fold(program: Any) -> None:
    """Cast, Sub and Mul of codes, as torch writes them for other layers, become one DequantizeLinear."""
    from onnx_ir.passes.common import IdentityEliminationPass
    from onnxscript.rewriter import pattern, rewrite

    def per_channel(codes: Any, scale: Any) -> bool:
        sizes = list(scale.shape or [])
        return (
            codes.is_initializer()
            and scale.is_initializer()
            and len(sizes) == len(codes.shape) > 1
            and sizes[0] == codes.shape[0]
            and all(size == 1 for size in sizes[1:])
        )

    def flat(op: Any, tensor: Any) -> Any:
        return op.Reshape(tensor, op.Constant(value_ints=[-1]))

    def symmetric(op, codes, scale):  # type: ignore[no-untyped-def]
        return op.Mul(op.Cast(codes, to=FLOAT), scale)

    def asymmetric(op, codes, scale, zero_point):  # type: ignore[no-untyped-def]
        return op.Mul(op.Sub(op.Cast(codes, to=FLOAT), zero_point), scale)

    def dequantized(op, codes, scale, zero_point=None, **_):  # type: ignore[no-untyped-def]
        shift = () if zero_point is None else (op.Cast(flat(op, zero_point), to=INT8),)
        return op.DequantizeLinear(codes, flat(op, scale), *shift, axis=0)

    def fits(context, codes, scale, **_):  # type: ignore[no-untyped-def]
        return per_channel(codes, scale)

    rules = [pattern.RewriteRule(given, dequantized, fits) for given in (asymmetric, symmetric)]
    IdentityEliminationPass()(program.model)
    program.model = rewrite(program.model, pattern_rewrite_rules=rules)
    program.optimize()
