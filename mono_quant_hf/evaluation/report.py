"""Where a quantized model lost accuracy: one line for each module, the worst first."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.evaluation.results import Result, jsonable
from mono_quant_hf.evaluation.sensitivity import contributions, decibels_of, output_sqnr
from mono_quant_hf.files import file_written_aside
from mono_quant_hf.integration import Decision
from mono_quant_hf.modules import QuantizedModule
from mono_quant_hf.weight_files import opener, read_headers

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


@dataclass(frozen=True)
class QuantizationReport(Result):
    """All modules that hold weights; the worst first.

    Attributes:
        model: name of the model.
        modules: sorted by contribution where it was measured, else by the SQNR of the weight; modules left in
            float come last.
        contribution_of: what `contribution` is: "mean KL divergence per prediction, in nats", or for a model
            without logits "relative error of the output"; None without inputs.
        total: the same for all modules quantized at once; None without inputs.
        bytes_before, bytes_after: of all parameters of the model.
        settings: what it was measured with.
    """

    model: str
    modules: tuple[ModuleReport, ...]
    contribution_of: str | None
    total: float | None
    bytes_before: int
    bytes_after: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> list[ModuleReport]:
        return [module for module in self.modules if module.quantized]

    @property
    def sqnr_source(self) -> str:
        """In words, where the SQNR comes from."""
        sources = {module.sqnr_source for module in self.quantized}
        if sources == {MEASURED}:
            return "measured against the float weights"
        if sources == {ESTIMATED}:
            return (
                "estimated from the grid (error uniform within a step), for the float weights were not given"
            )
        estimated = sum(module.sqnr_source == ESTIMATED for module in self.quantized)
        return (
            f"measured against the float weights, but for {estimated} modules, whose float weights were not "
            "found, estimated from the grid"
        )

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "modules": [jsonable(dataclasses.asdict(module)) for module in self.modules],
            "sqnr_source": self.sqnr_source,
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()`."""
        with file_written_aside(path) as new:
            new.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Draw the SQNR of each module by depth and kind, and how the worst channels are spread.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from mono_quant_hf.evaluation.report_pictures import draw_png

        draw_png(self, Path(path))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page with pictures and table that needs no other file and no network."""
        from mono_quant_hf.evaluation.report_pictures import page

        with file_written_aside(path) as new:
            new.write_text(page(self), encoding="utf-8")

    def table(self, limit: int | None = None) -> str:
        """The modules as aligned text, the worst `limit` of them."""
        rows = [
            [
                module.module or module.kind,
                module.weights,
                decibels(module.sqnr) + ("~" if module.sqnr_source == ESTIMATED else ""),
                decibels(module.worst_channel_sqnr),
                percent(module.share_at_ends),
                decibels(module.output_sqnr),
                "" if module.contribution is None else f"{module.contribution:.3g}",
                f"{module.bytes_before / 1e6:,.2f}",
                f"{module.bytes_after / 1e6:,.2f}",
                module.reason,
            ]
            for module in self.modules[:limit]
        ]
        effect = "KL alone" if (self.contribution_of or "").startswith("mean KL") else "error alone"
        titles = ["module", "weights", "SQNR dB", "worst ch.", "at ends", "output dB", effect]
        titles += ["MB before", "MB after", "reason"]
        kept = [n for n in range(len(titles)) if any(row[n] for row in rows)]
        widths = {n: max(len(row[n]) for row in [titles, *rows]) for n in kept}
        left = {0, 1, len(titles) - 1}
        lines = (
            "  ".join(
                row[n].ljust(widths[n]) if n in left else row[n].rjust(widths[n]) for n in kept
            ).rstrip()
            for row in [titles, *rows]
        )
        return "\n".join(lines)

    def summary(self) -> str:
        """What the table is of, in a few lines."""
        parameters = sum(module.parameters for module in self.modules)
        share = sum(module.parameters for module in self.quantized) / parameters if parameters else 0.0
        lines = [
            f"{self.model}: {len(self.quantized)} of {len(self.modules)} modules quantized, {share:.1%} of their "
            f"parameters; {self.bytes_before / 1e6:,.1f} MB in float, {self.bytes_after / 1e6:,.1f} MB now.",
            f"SQNR is {self.sqnr_source}.",
        ]
        if self.total is not None:
            alone = sum(module.contribution or 0.0 for module in self.quantized)
            lines.append(
                f"The {self.contribution_of}: {self.total:.3g} with all modules quantized; one at a "
                f"time they add up to {alone:.3g}."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.summary()}\n\n{self.table()}"


def decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.3%}"


def quantization_report(
    model: nn.Module,
    reference: nn.Module | str | os.PathLike[str] | None = None,
    inputs: Mapping[str, Any] | Tensor | Iterable[Mapping[str, Any] | Tensor] | None = None,
    *,
    progress: bool = False,
) -> QuantizationReport:
    """What quantizing did to each module of a model, and what each costs at the end.

    Args:
        model: quantized, by `from_pretrained` or `quantize_model`.
        reference: the float model; or the folder of its checkpoint, whose safetensors files are read one tensor
            at a time. None: the SQNR is estimated from the grid, and says so.
        inputs: batches for the model (what its tokenizer or processor returns, or a tensor). With them and the
            float model as the reference, each module also gets the SQNR of its output, and what it contributes to
            the error of the model's output: one pass of the float model for each module, with that one quantized.
        progress: show a progress bar.

    Raises:
        TypeError: the model holds no quantized modules, or the reference is no float model.
        ValueError: inputs without a float model, or a folder without safetensors files.

    Example:
        >>> import copy, torch
        >>> from mono_quant_hf import quantize_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> quantized = quantize_model(copy.deepcopy(model))
        >>> report = quantization_report(quantized, model, torch.randn(8, 16))
        >>> [module.module for module in report.modules] in (["0", "2"], ["2", "0"])
        True
        >>> all(30 < module.sqnr < 60 for module in report.modules)
        True
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    if not found:
        raise TypeError(f"{type(model).__name__} holds no quantized modules: quantize it first.")
    if inputs is not None and not isinstance(reference, nn.Module):
        raise ValueError("inputs show what the float model does: give that model as the reference, too.")
    if isinstance(reference, nn.Module) and any(isinstance(m, QuantizedModule) for m in reference.modules()):
        raise TypeError("the reference is quantized itself: give the float model.")
    decisions = _decisions(model)
    with _weights_of(reference) as float_weight, torch.no_grad():
        reports = {}
        for decision in tqdm(decisions, desc="weights", unit="module", disable=not progress):
            reports[decision.module] = _describe(model, decision, float_weight)
    contribution_of, total = None, None
    if inputs is not None:
        assert isinstance(reference, nn.Module)
        batches = [inputs] if isinstance(inputs, (Mapping, Tensor)) else list(inputs)
        if not batches:
            raise ValueError("inputs is empty: give at least one batch.")
        outputs = output_sqnr(reference, found, batches)
        contribution_of, total, alone = contributions(reference, found, batches, progress)
        for name in found:
            reports[name] = dataclasses.replace(
                reports[name], output_sqnr=outputs.get(name), contribution=alone[name]
            )
    return QuantizationReport(
        model=_name_of(model),
        modules=tuple(sorted(reports.values(), key=_worst_first)),
        contribution_of=contribution_of,
        total=total,
        bytes_before=_bytes_in_float(model, found),
        bytes_after=sum(p.nbytes for p in model.parameters()),
        settings={"batches": None if inputs is None else len(batches)},
    )


def _name_of(model: nn.Module) -> str:
    """The name on the Hub, or of the folder without the way to it, or the class."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__


def _worst_first(module: ModuleReport) -> tuple[bool, float, float]:
    contribution = -math.inf if module.contribution is None else module.contribution
    return not module.quantized, -contribution, math.inf if module.sqnr is None else module.sqnr


def _decisions(model: nn.Module) -> list[Decision]:
    """Those of the quantizer, brought up to date with what the modules are now; made up for other models."""
    known = {d.module: d for d in getattr(getattr(model, "hf_quantizer", None), "decisions", [])}
    decisions = []
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not any(p.dim() > 1 for p in own):
            continue
        is_quantized = isinstance(module, QuantizedModule)
        weights = module.quantization.weights if isinstance(module, QuantizedModule) else "float"
        decision = known.get(name)
        if decision is None or decision.weights != weights:
            decision = Decision(
                module=name,
                kind=module.quantization.float_class.__name__
                if isinstance(module, QuantizedModule)
                else type(module).__name__,
                weights=weights,
                symmetric=module.quantization.symmetric if is_quantized and weights == "int8" else None,
                reason="",
                parameters=_parameters_in_float(module),
            )
        decisions.append(decision)
    return decisions


FloatWeight = Callable[[str], Tensor | None]


@contextmanager
def _weights_of(reference: nn.Module | str | os.PathLike[str] | None) -> Iterator[FloatWeight]:
    """A function from a parameter's name to its float tensor, or None where there is none."""
    if reference is None:
        yield lambda name: None
        return
    if isinstance(reference, nn.Module):
        parameters = dict(reference.named_parameters(remove_duplicate=False))
        prefix = _prefix_of(reference)
        yield lambda name: next((parameters[n] for n in _aliases(name, prefix) if n in parameters), None)
        return
    folder = Path(reference)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not files or not files[0].is_file():
        raise ValueError(f"{folder} holds no safetensors files: give the folder of the float checkpoint.")
    stored, opened = read_headers(files), opener()
    heads = {key.split(".")[0] for key in stored}

    def read(name: str) -> Tensor | None:
        # a checkpoint may have been saved with or without the head's prefix, such as `model.`
        names = [name, *(f"{head}.{name}" for head in sorted(heads)), name.partition(".")[2]]
        return next((opened(stored[n].file).get_tensor(n) for n in names if n in stored), None)

    yield read


def _prefix_of(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if isinstance(prefix, str) else ""


def _aliases(name: str, prefix: str) -> list[str]:
    return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]


def _describe(model: nn.Module, decision: Decision, float_weight: FloatWeight) -> ModuleReport:
    module = model.get_submodule(decision.module)
    own = [p for p in module._parameters.values() if p is not None]
    after = sum(p.nbytes for p in own)
    report = ModuleReport(
        **decision.to_dict(),
        bytes_before=_module_bytes_in_float(model, module),
        bytes_after=after,
    )
    if not isinstance(module, QuantizedModule) or any(p.is_meta for p in own):
        return report
    signals, noises, at_ends, codes, sources = [], [], 0, 0, set()
    for name, axis in module.weight_axes.items():
        stored = module.stored(name)[0].detach()
        full_name = f"{decision.module}.{name}" if decision.module else name
        exact = float_weight(full_name)
        if exact is not None and (exact.shape != stored.shape or not exact.is_floating_point()):
            exact = None
        approximation = module.dequantized(name).double()
        if exact is None:
            sources.add(ESTIMATED)
            signal, noise = approximation.square(), _grid_noise(module, name, approximation)
        else:
            sources.add(MEASURED)
            signal = exact.detach().to(approximation.device).double()
            noise = (signal - approximation).square()
            signal = signal.square()
        axes = {a % stored.dim() for a in ((axis,) if isinstance(axis, int) else axis)}
        other = [dim for dim in range(stored.dim()) if dim not in axes]
        signals.append((signal.sum(dim=other) if other else signal).flatten())
        noises.append((noise.sum(dim=other) if other else noise).flatten())
        if module.quantization.weights == "int8":
            lowest = -127 if module.quantization.symmetric else -128
            at_ends += int(((stored == lowest) | (stored == 127)).sum())
            codes += stored.numel()
    signal, noise = torch.cat(signals), torch.cat(noises)
    by_channel = decibels_of(signal, noise)
    worst = int(by_channel.argmin())
    return dataclasses.replace(
        report,
        sqnr=float(decibels_of(signal.sum(), noise.sum())),
        sqnr_source=ESTIMATED if ESTIMATED in sources else MEASURED,
        worst_channel=worst,
        worst_channel_sqnr=float(by_channel[worst]),
        share_at_ends=at_ends / codes if codes else None,
    )


def _grid_noise(module: QuantizedModule, name: str, values: Tensor) -> Tensor:
    """The mean squared error of rounding to a grid of step s is s² / 12 (Bennett 1948, equation 1.6)."""
    if module.quantization.weights == "int8":
        step = module.get_parameter(f"{name}_scale").detach().double().expand_as(values)
        # a channel of zeros is exact, whatever its scale
        axis = module.weight_axes[name]
        axes = {a % values.dim() for a in ((axis,) if isinstance(axis, int) else axis)}
        other = [dim for dim in range(values.dim()) if dim not in axes]
        empty = values.abs().amax(dim=other, keepdim=True) == 0 if other else values == 0
        return torch.where(empty, 0.0, step.square() / 12)
    exponent = torch.frexp(values.abs()).exponent.clamp(min=-13) - 11  # float16: 11 bits, from 2^-24 on
    return torch.ldexp(torch.ones_like(values), 2 * exponent) / 12


def _float_bytes(model: nn.Module) -> int:
    dtype = getattr(model, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        floats = (p.dtype for p in model.parameters() if p.dtype in (torch.float32, torch.bfloat16))
        dtype = next(floats, torch.float32)
    return dtype.itemsize


def _module_bytes_in_float(model: nn.Module, module: nn.Module) -> int:
    if not isinstance(module, QuantizedModule):
        return sum(p.nbytes for p in module._parameters.values() if p is not None)
    storage = set(module.storage_names())
    weights = sum(module.stored(name)[0].numel() for name in module.weight_axes)
    rest = sum(p.nbytes for n, p in module._parameters.items() if p is not None and n not in storage)
    return weights * _float_bytes(model) + rest


def _parameters_in_float(module: nn.Module) -> int:
    """Elements of its own parameters, without scales and zero-points."""
    storage = module.storage_names() if isinstance(module, QuantizedModule) else ()
    rest = sum(p.numel() for n, p in module._parameters.items() if p is not None and n not in storage)
    if isinstance(module, QuantizedModule):
        rest += sum(module.stored(name)[0].numel() for name in module.weight_axes)
    return rest


def _bytes_in_float(model: nn.Module, found: Mapping[str, QuantizedModule]) -> int:
    after = sum(p.nbytes for p in model.parameters())
    for module in found.values():
        own = sum(p.nbytes for p in module._parameters.values() if p is not None)
        after += _module_bytes_in_float(model, module) - own
    return after
