"""What quantizing did to the weight of one module."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.integration import Decision
from mono_quant_hf.modules import QuantizedModule
from mono_quant_hf.weight_files import opener, read_headers

from .sensitivity import decibels_of

MEASURED = "float weights"
ESTIMATED = "estimated from the grid"


@dataclass(frozen=True)
class ModuleReport:
    """One module of a quantized model.

    Attributes:
        module: qualified name; empty for a model that is a single layer.
        kind: class of the float module.
        weights: "int8", "float16" or "float" (left alone).
        symmetric: whether int8 codes go without zero-points; None where not int8.
        reason: why it was left in float, or which setting chose it.
        parameters: elements of its own parameters.
        activations: "int8" where the input is rounded too, else None; no other figure of the weight depends on it.
        bytes_before, bytes_after: its parameters in the float dtype, and as they are now, scales included.
        sqnr: of the weight in dB; None for a module left in float, inf where nothing was lost.
        sqnr_source: "float weights" where it was measured against them, "estimated from the grid" where the
            error of each weight is taken as uniform within a step: scale² / 12 for codes, (unit in the last
            place)² / 12 for float16. The estimate does not see weights past the ends, nor calibrated rounding.
        worst_channel, worst_channel_sqnr: index and dB of the output channel with the lowest SQNR.
        share_at_ends: share of codes, 0 to 1, that are the lowest or the highest one; None where not int8.
        output_sqnr: of the output in dB, on what the float model feeds it; None without inputs.
        contribution: what quantizing this module alone costs at the model's output, see
            `QuantizationReport.contribution_of`; None without inputs.
    """

    module: str
    kind: str
    weights: str
    symmetric: bool | None
    reason: str
    parameters: int
    bytes_before: int
    bytes_after: int
    activations: str | None = None
    sqnr: float | None = None
    sqnr_source: str | None = None
    worst_channel: int | None = None
    worst_channel_sqnr: float | None = None
    share_at_ends: float | None = None
    output_sqnr: float | None = None
    contribution: float | None = None

    @property
    def quantized(self) -> bool:
        return self.weights != "float"

    @property
    def depth(self) -> int | None:
        """The first number in its name, which is the layer it is in."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.module)
        return int(number.group(1)) if number else None

    @property
    def role(self) -> str:
        """Its name without the way to the layer: `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`."""
        return re.split(r"(?:^|\.)\d+\.", self.module)[-1] or self.kind


@torch.no_grad()
def module_reports(
    model: nn.Module, reference: nn.Module | str | os.PathLike[str] | None, progress: bool
) -> dict[str, ModuleReport]:
    """Of each module that holds weights, by its name.

    Args:
        model: quantized.
        reference: as in `quantization_report`.
        progress: show a progress bar.

    Raises:
        ValueError: the reference is a folder without safetensors files.
    """
    float_weight, itemsize = _float_weights(reference), _float_itemsize(model)
    known = {d.module: d for d in getattr(getattr(model, "hf_quantizer", None), "decisions", [])}
    holding = {
        name: module
        for name, module in model.named_modules()
        if any(p is not None and p.dim() > 1 for p in module._parameters.values())
    }
    reports = {}
    for name, module in tqdm(holding.items(), desc="weights", unit="module", disable=not progress):
        own = [p for p in module._parameters.values() if p is not None]
        elements, bytes_before = _size_in_float(module, itemsize)
        reports[name] = report = ModuleReport(
            **_decision(name, module, known.get(name), elements).to_dict(),
            bytes_before=bytes_before,
            bytes_after=sum(p.nbytes for p in own),
        )
        if isinstance(module, QuantizedModule) and not any(p.is_meta for p in own):
            reports[name] = dataclasses.replace(report, **_weight_figures(name, module, float_weight))
    return reports


def _decision(name: str, module: nn.Module, known: Decision | None, elements: int) -> Decision:
    """That of the quantizer where the module still is what it says; made up for others."""
    quantization = module.quantization if isinstance(module, QuantizedModule) else None
    weights = "float" if quantization is None else quantization.weights
    if known is not None and known.weights == weights:
        return known
    return Decision(
        module=name,
        kind=(type(module) if quantization is None else quantization.float_class).__name__,
        weights=weights,
        symmetric=None if quantization is None or weights != "int8" else quantization.symmetric,
        reason="",
        parameters=elements,
    )


def _float_weights(
    reference: nn.Module | str | os.PathLike[str] | None,
) -> Callable[[str], Tensor | None]:
    """A function from a parameter's name to its float tensor, or None where there is none."""
    if reference is None:
        return lambda name: None
    names: set[str]
    if isinstance(reference, nn.Module):
        parameters = dict(reference.named_parameters(remove_duplicate=False))
        names, read = set(parameters), parameters.__getitem__
    else:
        folder = Path(reference)
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
        if not files or not files[0].is_file():
            raise ValueError(f"{folder} holds no safetensors files: give the folder of the float checkpoint.")
        stored, opened = read_headers([str(file) for file in files]), opener()
        names = set(stored)

        def read(name: str) -> Any:
            return opened(stored[name].file).get_tensor(name)

    heads = sorted({name.partition(".")[0] for name in names})

    def find(name: str) -> Tensor | None:
        # one of the two may be without the prefix of the head's model, such as `model.`
        candidates = [name, *(f"{head}.{name}" for head in heads), name.partition(".")[2]]
        return next((read(candidate) for candidate in candidates if candidate in names), None)

    return find


def _weight_figures(
    name: str, module: QuantizedModule, float_weight: Callable[[str], Tensor | None]
) -> dict[str, Any]:
    """The fields of a `ModuleReport` that say how exact the weights of a module are."""
    signals, noises, ends, sources = [], [], [], set()
    for weight, axis in module.weight_axes.items():
        stored = module.stored(weight)[0].detach()
        kept = {a % stored.dim() for a in ((axis,) if isinstance(axis, int) else axis)}
        channels = [n if dim in kept else 1 for dim, n in enumerate(stored.shape)]
        exact = float_weight(f"{name}.{weight}" if name else weight)
        approximation = module.dequantized(weight).double()
        if exact is None or exact.shape != stored.shape or not exact.is_floating_point():
            sources.add(ESTIMATED)
            signal, noise = approximation.square(), _grid_noise(module, weight, approximation)
            # a channel of zeros is exact, whatever its scale
            noise = torch.where(signal.sum_to_size(channels) == 0, 0.0, noise)
        else:
            sources.add(MEASURED)
            signal = exact.detach().to(approximation.device).double()
            signal, noise = signal.square(), (signal - approximation).square()
        signals.append(signal.sum_to_size(channels).flatten())
        noises.append(noise.sum_to_size(channels).flatten())
        if module.quantization.weights == "int8":
            lowest = -127 if module.quantization.symmetric else -128
            ends.append(((stored == lowest) | (stored == 127)).flatten())
    signal, noise = torch.cat(signals), torch.cat(noises)
    by_channel = decibels_of(signal, noise)
    worst = int(by_channel.argmin())
    return {
        "sqnr": float(decibels_of(signal.sum(), noise.sum())),
        "sqnr_source": ESTIMATED if ESTIMATED in sources else MEASURED,
        "worst_channel": worst,
        "worst_channel_sqnr": float(by_channel[worst]),
        "share_at_ends": float(torch.cat(ends).double().mean()) if ends else None,
    }


def _grid_noise(module: QuantizedModule, name: str, values: Tensor) -> Tensor:
    """The mean squared error of rounding to a grid of step s is s² / 12 (Bennett 1948, equation 1.6)."""
    if module.quantization.weights == "int8":
        return module.get_parameter(f"{name}_scale").detach().double().expand_as(values).square() / 12
    # float16 has 11 bits, and the same step for all below 2^-14
    exponent = torch.frexp(values.abs().clamp(min=2.0**-14)).exponent - 11
    return torch.ldexp(torch.ones_like(values), 2 * exponent) / 12


def _float_itemsize(model: nn.Module) -> int:
    """Bytes of a value in the float dtype of the model."""
    dtype = getattr(model, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        floats = (p.dtype for p in model.parameters() if p.dtype in (torch.float32, torch.bfloat16))
        dtype = next(floats, torch.float32)
    return dtype.itemsize


def _size_in_float(module: nn.Module, itemsize: int) -> tuple[int, int]:
    """Elements and bytes of the module's own parameters, with float weights in place of codes and scales."""
    storage = module.storage_names() if isinstance(module, QuantizedModule) else ()
    others = [p for name, p in module._parameters.items() if p is not None and name not in storage]
    weights = 0
    if isinstance(module, QuantizedModule):
        weights = sum(module.stored(name)[0].numel() for name in module.weight_axes)
    return weights + sum(p.numel() for p in others), weights * itemsize + sum(p.nbytes for p in others)
