"""The pictures of a quantization report: a PNG by matplotlib, and a page of HTML with the same as inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mono_quant_hf.files import file_written_aside
from mono_quant_hf.texts import one_line

if TYPE_CHECKING:
    from mono_quant_hf.evaluation.report import ModuleReport, QuantizationReport
    from mono_quant_hf.evaluation.search import SearchResult


def escape(text: str) -> str:
    """A name that may be a stranger's, as text of the page."""
    return html.escape(one_line(text))


OUTSIDE = "outside the layers"
_COSTLIEST = 15


def strips(modules: Sequence[ModuleReport]) -> dict[str, list[ModuleReport]]:
    """Quantized modules of finite SQNR by role, in the order of the first layer that has one, each by depth."""
    shown = [m for m in modules if m.quantized and m.sqnr is not None and math.isfinite(m.sqnr)]
    by_role: dict[str, list[ModuleReport]] = {}
    for module in sorted(shown, key=lambda m: (m.depth is None, m.depth or 0, m.module)):
        by_role.setdefault(OUTSIDE if module.depth is None else module.role, []).append(module)
    return by_role


def worst_channels(modules: Sequence[ModuleReport]) -> tuple[list[float], list[int]]:
    """A histogram of the worst channels' SQNR: edges of the bins, of a whole number of dB, and counts."""
    values = [
        m.worst_channel_sqnr
        for m in modules
        if m.worst_channel_sqnr is not None and math.isfinite(m.worst_channel_sqnr)
    ]
    if not values:
        return [0.0, 1.0], [0]
    low, high = math.floor(min(values)), math.floor(max(values)) + 1
    width = max(1, math.ceil((high - low) / 20))
    count = math.ceil((high - low) / width)
    counts = [0] * count
    for value in values:
        counts[int((value - low) // width)] += 1
    return [low + width * n for n in range(count + 1)], counts


def costliest(modules: Sequence[ModuleReport]) -> list[ModuleReport]:
    """The quantized modules that contribute most, the worst first."""
    measured = [m for m in modules if m.quantized and m.contribution is not None]
    return sorted(measured, key=lambda m: -(m.contribution or 0.0))[:_COSTLIEST]


def _range(modules: Sequence[ModuleReport]) -> tuple[float, float]:
    values = [m.sqnr for m in modules if m.sqnr is not None and math.isfinite(m.sqnr)]
    values += [
        m.worst_channel_sqnr
        for m in modules
        if m.worst_channel_sqnr is not None and math.isfinite(m.worst_channel_sqnr)
    ]
    if not values:
        return 0.0, 10.0
    return 5 * math.floor(min(values) / 5), max(
        5 * math.ceil(max(values) / 5), 5 * math.floor(min(values) / 5) + 5
    )


def draw_png(report: QuantizationReport, path: Path) -> None:
    """One figure with the pictures of the page, below one another."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("a PNG needs matplotlib: pip install 'mono-quant-hf[plots]'.") from missing
    by_role, dear = strips(report.modules), costliest(report.modules)
    edges, counts = worst_channels(report.modules)
    low, high = _range(report.quantized)
    heights = [1.0] * max(1, len(by_role)) + [2.0] + ([0.25 * len(dear) + 0.6] if dear else [])
    figure = Figure(figsize=(9, 1.1 * sum(heights) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    top: Any = figure.subfigures(
        2, 1, height_ratios=[sum(heights[: max(1, len(by_role))]), sum(heights[len(by_role) or 1 :])]
    )
    figure.suptitle(f"{report.model}: what quantizing cost", fontsize=13, x=0.01, ha="left")
    axes = top[0].subplots(max(1, len(by_role)), 1, squeeze=False, sharex=False)[:, 0]
    for ax, (role, modules) in zip(axes, by_role.items(), strict=False):
        xs = list(range(len(modules))) if role == OUTSIDE else [m.depth or 0 for m in modules]
        tops = [m.sqnr or 0.0 for m in modules]
        worst = [m.sqnr if m.worst_channel_sqnr is None else m.worst_channel_sqnr for m in modules]
        ax.vlines(xs, worst, tops, color="#9dbbe8", linewidth=5)
        ax.plot(xs, tops, "o", color="#1f5fbf", markersize=4)
        ax.set_ylim(low, high)
        ax.set_title(role, fontsize=9, loc="left", pad=2)
        ax.tick_params(labelsize=7)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        if role == OUTSIDE:
            ax.set_xticks(xs, [m.module or m.kind for m in modules], fontsize=7)
        else:
            ax.locator_params(axis="x", integer=True)
    top[0].supylabel("SQNR of the weight, dB (dot) down to its worst channel (bar)", fontsize=8)
    axes[-1].set_xlabel("layer", fontsize=8)
    below = top[1].subplots(2 if dear else 1, 1, squeeze=False, height_ratios=heights[len(by_role) or 1 :])[
        :, 0
    ]
    below[0].bar(
        edges[:-1],
        counts,
        width=edges[1] - edges[0],
        align="edge",
        color="#1f5fbf",
        edgecolor="white",
    )
    below[0].set_title("Worst channel of each module", fontsize=10, loc="left")
    below[0].set_xlabel("SQNR, dB", fontsize=8)
    below[0].set_ylabel("modules", fontsize=8)
    if dear:
        names = [m.module for m in reversed(dear)]
        below[1].barh(names, [m.contribution or 0.0 for m in reversed(dear)], color="#d9772b")
        below[1].set_title("Costliest when quantized alone", fontsize=10, loc="left")
        below[1].set_xlabel(report.contribution_of or "", fontsize=8)
    for ax in below:
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_frontier(result: SearchResult, path: Path) -> None:
    """Size against KL divergence, predicted as a line and measured as points, the chosen one ringed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("a PNG needs matplotlib: pip install 'mono-quant-hf[plots]'.") from missing
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    sizes = [point.bytes / 1e6 for point in result.frontier]
    ax.plot(sizes, [point.predicted_kl for point in result.frontier], color="#9dbbe8", label="predicted")
    measured = [(p.bytes / 1e6, p.measured_kl) for p in result.frontier if p.measured_kl is not None]
    ax.plot(*zip(*measured, strict=True), "o", color="#1f5fbf", label="measured")
    ax.plot([result.bytes / 1e6], [result.kl], "o", ms=13, mfc="none", mec="#d9772b", mew=2, label="chosen")
    if result.settings.get("max_kl"):
        ax.axhline(result.settings["max_kl"], color="#d9772b", linewidth=0.8, linestyle="--")
    if result.settings.get("max_bytes"):
        ax.axvline(result.settings["max_bytes"] / 1e6, color="#d9772b", linewidth=0.8, linestyle="--")
    positive = [p.predicted_kl for p in result.frontier if p.predicted_kl > 0]
    if positive:
        ax.set_yscale("symlog", linthresh=max(min(positive), max(positive) * 1e-4))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("parameters of the model, MB")
    ax.set_ylabel("mean KL divergence, nats")
    ax.set_title("int8, float16 or float, module by module", loc="left", fontsize=11)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with file_written_aside(path) as new:
        figure.savefig(new, format="png", dpi=130, metadata={"Software": "mono_quant_hf"})


# The page

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6470; --paper: #ffffff; --card: #f4f6f8;
  --line: #d9dee4; --blue: #1f5fbf; --pale: #a9c4ee; --orange: #c8641b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa4b0; --paper: #14171b; --card: #1e2329;
  --line: #343b44; --blue: #74a7f5; --pale: #35527f; --orange: #f0954f; } }
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
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .4rem 1rem; }
svg { width: 100%; max-width: 36rem; height: auto; display: block; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
svg .name { fill: var(--ink); font-weight: 600; font-size: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .bar { fill: var(--pale); } svg .dot, svg .count { fill: var(--blue); } svg .cost { fill: var(--orange); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; cursor: pointer; background: var(--paper); }
th:first-child, td:first-child, .left { text-align: left; }
td:first-child { overflow-wrap: anywhere; white-space: normal; min-width: 9rem; }
tr.float td { color: var(--dim); }
@media (max-width: 40rem) { .wide { display: none; } body { padding: .8rem; } }
"""

_SORT = """
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const body = document.querySelector("tbody"), down = head.dataset.down !== "1";
  document.querySelectorAll("th").forEach(other => delete other.dataset.down);
  head.dataset.down = down ? "1" : "0";
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? difference : -difference;
  });
  body.append(...rows);
}));
"""


def page(report: QuantizationReport) -> str:
    """The whole page as one string: style, pictures, table and the script that sorts it."""
    by_role, dear = strips(report.modules), costliest(report.modules)
    span = _range(report.quantized)
    finite = [m.sqnr for m in report.quantized if m.sqnr is not None and math.isfinite(m.sqnr)]
    tiles = [
        (f"{len(report.quantized)} of {len(report.modules)}", "modules quantized"),
        (f"{report.bytes_before / 1e6:,.1f} → {report.bytes_after / 1e6:,.1f}", "MB, float → now"),
    ]
    if finite:
        tiles.append((f"{min(finite):.1f} dB", "lowest SQNR of a weight"))
    if report.total is not None:
        tiles.append((f"{report.total:.3g}", report.contribution_of or ""))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="generator" content="mono_quant_hf">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.model)}: quantization report</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(report.model)}: quantization report</h1>",
        '<div class="tiles">',
        *(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles),
        "</div>",
        "<h2>Weights, layer by layer</h2>",
        "<p>Each dot is the signal-to-quantization-noise ratio of a module's weight, higher is better; the bar "
        f"reaches down to its worst output channel. SQNR is {escape(report.sqnr_source)}. 6 dB is one bit.</p>",
        '<div class="charts">',
        *(_strip(role, modules, span) for role, modules in by_role.items()),
        "</div>",
        "<h2>Worst channels</h2><p>How many modules have their worst channel at this SQNR.</p>",
        _histogram(*worst_channels(report.modules)),
    ]
    if dear:
        parts += [
            "<h2>Costliest modules</h2>",
            f"<p>The {escape(report.contribution_of or '')}, with this module alone quantized.</p>",
            _costs(dear),
        ]
    parts += [
        "<h2>All modules</h2><p>The worst first; touch a heading to sort.</p>",
        _table(report),
        f"<script>{_SORT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _strip(role: str, modules: Sequence[ModuleReport], span: tuple[float, float]) -> str:
    width, height, left, right, top, bottom = 340, 120, 26, 8, 20, 18
    low, high = span
    positions = list(range(len(modules))) if role == OUTSIDE else [m.depth or 0 for m in modules]
    first, last = min(positions), max(positions)
    step = (width - left - right) / max(1, last - first + 1)

    def x(position: float) -> float:
        return left + (position - first + 0.5) * step

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    marks = [f'<text class="name" x="{left}" y="12">{escape(role)}</text>']
    gap = max(5, 5 * math.ceil((high - low) / 20))
    for tick in range(int(low), int(high) + 1, gap):
        marks.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        marks.append(f'<text x="{left - 4}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    bar = min(8.0, max(2.0, 0.6 * step))
    radius = min(3.5, max(2.0, bar / 2))
    for position, module in zip(positions, modules, strict=True):
        value = module.sqnr or 0.0
        worst = value if module.worst_channel_sqnr is None else module.worst_channel_sqnr
        about = f"{module.module}: {value:.1f} dB, channel {module.worst_channel} {worst:.1f} dB"
        marks.append(
            f"<g><title>{escape(about)}</title>"
            f'<rect class="bar" x="{x(position) - bar / 2:.1f}" y="{y(value):.1f}" width="{bar:.1f}" '
            f'height="{max(0.0, y(worst) - y(value)):.1f}" rx="1"/>'
            f'<circle class="dot" cx="{x(position):.1f}" cy="{y(value):.1f}" r="{radius:.1f}"/></g>'
        )
    if role == OUTSIDE:
        for position, module in zip(positions, modules, strict=True):
            name = (module.module or module.kind)[-max(6, int(step / 6)) :]
            marks.append(
                f'<text x="{x(position):.1f}" y="{height - 4}" text-anchor="middle">{escape(name)}</text>'
            )
    else:
        few = last - first < 8
        for position in range(first, last + 1) if few else (first, (first + last) // 2, last):
            label = f"layer {position}" if position == first else str(position)
            marks.append(f'<text x="{x(position):.1f}" y="{height - 4}" text-anchor="middle">{label}</text>')
    return _svg(width, height, marks, f"SQNR of {role} by layer")


def _histogram(edges: Sequence[float], counts: Sequence[int]) -> str:
    width, height, left, top, bottom = 400, 170, 8, 18, 34
    step = (width - 2 * left) / len(counts)
    most = max(1, *counts)
    marks = []
    for n, count in enumerate(counts):
        size = count / most * (height - top - bottom)
        marks.append(
            f'<rect class="count" x="{left + n * step + 1:.1f}" y="{height - bottom - size:.1f}" '
            f'width="{max(1.0, step - 2):.1f}" height="{size:.1f}" rx="2"/>'
        )
        middle = left + (n + 0.5) * step
        if count:
            marks.append(
                f'<text x="{middle:.1f}" y="{height - bottom - size - 4:.1f}" text-anchor="middle">{count}</text>'
            )
    every = max(1, math.ceil(len(edges) / 10))
    for n, edge in enumerate(edges):
        if n % every == 0:
            anchor = "start" if n == 0 else "end" if n == len(edges) - 1 else "middle"
            marks.append(
                f'<text x="{left + n * step:.1f}" y="{height - bottom + 14}" text-anchor="{anchor}">{edge:g}</text>'
            )
    marks.append(
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">SQNR of the worst channel, dB</text>'
    )
    return _svg(width, height, marks, "histogram of the worst channels")


def _costs(modules: Sequence[ModuleReport]) -> str:
    width, row = 400, 34
    most = max(m.contribution or 0.0 for m in modules) or 1.0
    marks = []
    for n, module in enumerate(modules):
        value = module.contribution or 0.0
        size = value / most * (width - 60)
        marks.append(
            f'<text class="name" x="0" y="{n * row + 13}">{escape(module.module or module.kind)}</text>'
        )
        marks.append(
            f'<rect class="cost" x="0" y="{n * row + 18}" width="{max(1.0, size):.1f}" height="10" rx="2"/>'
        )
        marks.append(f'<text x="{max(1.0, size) + 6:.1f}" y="{n * row + 27}">{value:.3g}</text>')
    return _svg(width, row * len(modules), marks, "contribution of single modules")


def _svg(width: int, height: int, marks: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(marks)
        + "</svg>"
    )


def _table(report: QuantizationReport) -> str:
    effect = "KL alone" if (report.contribution_of or "").startswith("mean KL") else "error alone"
    columns: list[tuple[str, str]] = [
        ("module", ""),
        ("weights", "left"),
        ("SQNR dB", ""),
        ("worst channel dB", ""),
    ]
    columns += [("channel", "wide"), ("at ends %", "wide"), ("output dB", ""), (effect, "")]
    columns += [("MB before", "wide"), ("MB after", "wide"), ("reason", "wide left")]
    rows = []
    for m in report.modules:
        number = [m.sqnr, m.worst_channel_sqnr]
        cells = [m.module or m.kind, m.weights, *(_number(v, ".1f") for v in number)]
        cells += ["" if m.worst_channel is None else str(m.worst_channel)]
        cells += [_number(None if m.share_at_ends is None else 100 * m.share_at_ends, ".3f")]
        cells += [_number(m.output_sqnr, ".1f"), _number(m.contribution, ".3g")]
        cells += [f"{m.bytes_before / 1e6:.2f}", f"{m.bytes_after / 1e6:.2f}", m.reason]
        rows.append((m.quantized, cells))
    kept = [n for n in range(len(columns)) if any(cells[n] for _, cells in rows)]
    head = "".join(f'<th class="{columns[n][1]}">{escape(columns[n][0])}</th>' for n in kept)
    body = "".join(
        f'<tr class="{"" if quantized else "float"}">'
        + "".join(f'<td class="{columns[n][1]}">{escape(cells[n])}</td>' for n in kept)
        + "</tr>\n"
        for quantized, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
