"""Where a quantized model lost accuracy: one line for each module, the worst first."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.evaluation.module_report import ESTIMATED, MEASURED, ModuleReport, module_reports
from mono_quant_hf.evaluation.plots import draw_modules, save_png, svg_of
from mono_quant_hf.evaluation.results import Result, aligned
from mono_quant_hf.evaluation.sensitivity import OutputChange, batches_of, output_sqnr
from mono_quant_hf.files import file_written_aside
from mono_quant_hf.modules import QuantizedModule
from mono_quant_hf.texts import one_line


class _Column(NamedTuple):
    """A column of the tables; `look` are its classes in the page: "left" aligned, "wide" screens alone."""

    title: str
    text: Callable[[ModuleReport], str]
    look: str = ""
    in_text: bool = True


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


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
        return super().to_dict() | {"sqnr_source": self.sqnr_source}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()`."""
        with file_written_aside(path) as new:
            new.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Draw the SQNR of each module by depth and kind, and how the worst channels are spread.

        Raises:
            ImportError: matplotlib is not installed.
        """
        title = f"{self.model}: what quantizing cost"
        save_png(path, draw_modules, self.modules, self.contribution_of, title)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page with table and pictures that needs no other file and no network.

        The pictures are those of `to_png`; without matplotlib the page says that it would draw them.
        """
        with file_written_aside(path) as new:
            new.write_text(_page(self), encoding="utf-8")

    def table(self, limit: int | None = None) -> str:
        """The modules as aligned text, the worst `limit` of them."""
        modules = self.modules[:limit]
        columns = [column for column in self._columns(modules) if column.in_text]
        rows = [[column.text(module) for column in columns] for module in modules]
        left = {n for n, column in enumerate(columns) if "left" in column.look}
        return aligned([column.title for column in columns], rows, left)

    def _columns(self, modules: Iterable[ModuleReport]) -> list[_Column]:
        """Those that say something about one of these modules."""
        effect = "KL alone" if (self.contribution_of or "").startswith("mean KL") else "error alone"
        columns = [
            _Column("module", lambda m: m.module or m.kind, "left"),
            _Column("weights", lambda m: m.weights, "left"),
            _Column("SQNR dB", lambda m: _shown(m.sqnr, ".1f") + "~" * (m.sqnr_source == ESTIMATED)),
            _Column("worst ch.", lambda m: _shown(m.worst_channel_sqnr, ".1f")),
            _Column("channel", lambda m: _shown(m.worst_channel, "d"), "wide", in_text=False),
            _Column("at ends", lambda m: _shown(m.share_at_ends, ".3%"), "wide"),
            _Column("output dB", lambda m: _shown(m.output_sqnr, ".1f")),
            _Column(effect, lambda m: _shown(m.contribution, ".3g")),
            _Column("MB before", lambda m: f"{m.bytes_before / 1e6:,.2f}", "wide"),
            _Column("MB after", lambda m: f"{m.bytes_after / 1e6:,.2f}", "wide"),
            _Column("reason", lambda m: m.reason, "wide left"),
        ]
        return [column for column in columns if any(map(column.text, modules))]

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
    reports = module_reports(model, reference, progress)
    contribution_of, total, batches = None, None, None
    if inputs is not None:
        assert isinstance(reference, nn.Module)
        batches = batches_of(inputs)
        contribution_of, total, measured = _contributions(reference, found, batches, progress)
        reports |= {name: dataclasses.replace(reports[name], **figures) for name, figures in measured.items()}
    bytes_after = sum(p.nbytes for p in model.parameters())
    return QuantizationReport(
        model=_name_of(model),
        modules=tuple(sorted(reports.values(), key=_worst_first)),
        contribution_of=contribution_of,
        total=total,
        bytes_before=bytes_after + sum(reports[n].bytes_before - reports[n].bytes_after for n in found),
        bytes_after=bytes_after,
        settings={"batches": None if batches is None else len(batches)},
    )


def _contributions(
    reference: nn.Module, found: Mapping[str, QuantizedModule], batches: list[Any], progress: bool
) -> tuple[str, float, dict[str, dict[str, Any]]]:
    """What contributions are, that of all modules together, and the fields for inputs of each `ModuleReport`."""
    outputs, change = output_sqnr(reference, found, batches), OutputChange(reference, batches)
    measured = {}
    for name, module in tqdm(found.items(), desc="contributions", unit="module", disable=not progress):
        measured[name] = {"output_sqnr": outputs.get(name), "contribution": change({name: module})}
    return change.of, change(found), measured


def _name_of(model: nn.Module) -> str:
    """The name on the Hub, or of the folder without the way to it, or the class."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__


def _worst_first(module: ModuleReport) -> tuple[bool, float, float]:
    contribution = -math.inf if module.contribution is None else module.contribution
    return not module.quantized, -contribution, math.inf if module.sqnr is None else module.sqnr


# The page

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6470; --paper: #ffffff; --card: #f4f6f8;
  --line: #d9dee4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa4b0; --paper: #14171b; --card: #1e2329;
  --line: #343b44; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: .2rem 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.8rem 0 .3rem; }
p { margin: .3rem 0 .8rem; color: var(--dim); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: .8rem; }
svg { width: 100%; max-width: 46rem; height: auto; display: block; }
svg text { fill: var(--dim) !important; font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; cursor: pointer; background: var(--paper); }
.left { text-align: left; }
td:first-child { overflow-wrap: anywhere; white-space: normal; min-width: 9rem; }
tr.float td { color: var(--dim); }
@media (max-width: 40rem) { .wide { display: none; } body { padding: .8rem; } }
"""

_SORT = """
const number = text => text === "" ? NaN : Number(text.replace(/[,~%]/g, "").replace("inf", "Infinity"));
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const body = document.querySelector("tbody"), down = head.dataset.down !== "1";
  document.querySelectorAll("th").forEach(other => delete other.dataset.down);
  head.dataset.down = down ? "1" : "0";
  const rows = [...body.rows].sort((a, b) => {
    const x = a.cells[column].textContent, y = b.cells[column].textContent;
    if (x === "" || y === "") return (x === "") - (y === "");
    const difference = number(x) - number(y) || x.localeCompare(y);
    return down ? difference : -difference;
  });
  body.append(...rows);
}));
"""


def _escape(text: str) -> str:
    """A name that may be a stranger's, as text of the page."""
    return html.escape(one_line(text))


def _page(report: QuantizationReport) -> str:
    """The whole page as one string: style, pictures, table and the script that sorts it."""
    title = f"{_escape(report.model)}: quantization report"
    tiles = [
        (f"{len(report.quantized)} of {len(report.modules)}", "modules quantized"),
        (f"{report.bytes_before / 1e6:,.1f} → {report.bytes_after / 1e6:,.1f}", "MB, float → now"),
    ]
    finite = [m.sqnr for m in report.quantized if m.sqnr is not None and math.isfinite(m.sqnr)]
    if finite:
        tiles.append((f"{min(finite):.1f} dB", "lowest SQNR of a weight"))
    if report.total is not None:
        tiles.append((f"{report.total:.3g}", report.contribution_of or ""))
    shown = "".join(f'<div class="tile"><b>{_escape(a)}</b><span>{_escape(b)}</span></div>' for a, b in tiles)
    try:
        pictures = svg_of(draw_modules, report.modules, report.contribution_of)
    except ImportError as missing:
        pictures = f"<p>{_escape(str(missing))}</p>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="generator" content="mono_quant_hf">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<div class="tiles">{shown}</div>
<h2>Weights, layer by layer</h2>
<p>Each dot is the signal-to-quantization-noise ratio of a module's weight, higher is better; the bar reaches down to
its worst output channel. SQNR is {_escape(report.sqnr_source)}. 6 dB is one bit.</p>
{pictures}
<h2>All modules</h2><p>The worst first; touch a heading to sort.</p>
{_html_table(report)}
<script>{_SORT}</script></body></html>
"""


def _html_table(report: QuantizationReport) -> str:
    columns = report._columns(report.modules)
    head = "".join(f'<th class="{column.look}">{_escape(column.title)}</th>' for column in columns)
    rows = [
        f'<tr class="{"" if module.quantized else "float"}">'
        + "".join(f'<td class="{column.look}">{_escape(column.text(module))}</td>' for column in columns)
        + "</tr>\n"
        for module in report.modules
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{"".join(rows)}</tbody></table></div>'
