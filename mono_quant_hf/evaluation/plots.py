"""Pictures of what quantizing cost, drawn by matplotlib."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mono_quant_hf.evaluation.module_report import ModuleReport
from mono_quant_hf.files import file_written_aside
from mono_quant_hf.texts import one_line
from mono_quant_hf.versions import require

_BLUE, _PALE, _ORANGE, _GREY, _LINE = "#1f5fbf", "#9dbbe8", "#d9772b", "#5b6470", "#d0d5db"
# Colours that are seen on white and on black, and letters that can be read on a phone.
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GREY,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "mono_quant_hf",
}
_OUTSIDE = "outside the layers"
_COSTLIEST = 15


def save_png(path: str | os.PathLike[str], draw: Callable[..., Any], *drawn: Any) -> None:
    """Write the figure that `draw(*drawn)` gives.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with file_written_aside(path) as new:
        _save(new, draw, drawn, format="png", dpi=150, metadata={"Software": "mono_quant_hf"})


def svg_of(draw: Callable[..., Any], *drawn: Any) -> str:
    """The figure that `draw(*drawn)` gives as an element of a page of HTML.

    Raises:
        ImportError: matplotlib is not installed.
    """
    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _save(written, draw, drawn, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue()
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])


def _save(file: Any, draw: Callable[..., Any], drawn: Sequence[Any], **how: Any) -> None:
    with require("matplotlib", "A picture").rc_context(_STYLE):
        draw(*drawn).savefig(file, **how)


def draw_modules(modules: Sequence[ModuleReport], contribution_of: str | None, title: str = "") -> Any:
    """The SQNR of each module by depth, a histogram of the worst channels, and the costliest modules."""
    from matplotlib.figure import Figure

    strips = _strips(modules)
    measured = [m for m in modules if m.quantized and m.contribution is not None]
    dear = sorted(measured, key=lambda m: m.contribution or 0.0)[-_COSTLIEST:]
    heights = [1.0 * max(1, len(strips)), 2.0, 0.25 * len(dear) + 0.6]
    figure = Figure(figsize=(6.5, 1.1 * sum(heights) + 1.6), layout="constrained")
    figure.suptitle(_name(title), fontsize=12, x=0.01, ha="left")
    parts: Any = figure.subfigures(3 if dear else 2, 1, height_ratios=heights if dear else heights[:2])
    _draw_strips(parts[0], strips)
    worst = [m.worst_channel_sqnr for m in modules if m.worst_channel_sqnr is not None]
    _draw_histogram(parts[1].subplots(), [value for value in worst if math.isfinite(value)])
    if dear:
        ax = parts[2].subplots()
        names = [_name(m.module or m.kind) for m in dear]
        bars = ax.barh(names, [m.contribution or 0.0 for m in dear], color=_ORANGE)
        ax.bar_label(bars, fmt="{:.3g}", fontsize=8, padding=3)
        ax.set_title("Costliest when quantized alone")
        ax.set_xlabel(contribution_of or "")
    return figure


def _name(text: str) -> str:
    """A name that may be a stranger's, as it is, whatever dollars are in it."""
    return one_line(text).replace("$", r"\$")


def _strips(modules: Sequence[ModuleReport]) -> dict[str, list[ModuleReport]]:
    """Quantized modules of finite SQNR by role, in the order of the first layer that has one, each by depth."""
    shown = [m for m in modules if m.quantized and m.sqnr is not None and math.isfinite(m.sqnr)]
    by_role: dict[str, list[ModuleReport]] = {}
    for module in sorted(shown, key=lambda m: (m.depth is None, m.depth or 0, m.module)):
        by_role.setdefault(_OUTSIDE if module.depth is None else module.role, []).append(module)
    return by_role


def _draw_strips(figure: Any, strips: dict[str, list[ModuleReport]]) -> None:
    axes = figure.subplots(max(1, len(strips)), 1, squeeze=False, sharey=True)[:, 0]
    for ax, (role, modules) in zip(axes, strips.items(), strict=False):
        outside = role == _OUTSIDE
        xs = list(range(len(modules))) if outside else [m.depth or 0 for m in modules]
        tops = [m.sqnr or 0.0 for m in modules]
        worst = [m.worst_channel_sqnr for m in modules]
        bottoms = [t if w is None or math.isinf(w) else w for t, w in zip(tops, worst, strict=True)]
        ax.vlines(xs, bottoms, tops, color=_PALE, linewidth=5)
        ax.plot(xs, tops, "o", color=_BLUE, markersize=4)
        ax.set_title(_name(role), pad=2)
        ax.grid(axis="y")
        if outside:
            ax.set_xticks(xs, [_name(m.module or m.kind) for m in modules])
        else:
            ax.locator_params(axis="x", integer=True)
    figure.supylabel("SQNR of the weight, dB (dot) down to its worst channel (bar)", fontsize=9)
    axes[-1].set_xlabel("layer")


def _draw_histogram(ax: Any, values: Sequence[float]) -> None:
    """How the worst channels are spread, in bins of a whole number of dB."""
    low, high = math.floor(min(values, default=0)), math.floor(max(values, default=0)) + 1
    width = max(1, math.ceil((high - low) / 20))
    _, _, bars = ax.hist(values, np.arange(low, high + width, width), color=_BLUE, edgecolor="white")
    ax.bar_label(bars, fmt=lambda count: f"{count:.0f}" if count else "", fontsize=8)
    ax.locator_params(axis="y", integer=True)
    ax.set_title("Worst channel of each module")
    ax.set_xlabel("SQNR, dB")
    ax.set_ylabel("modules")


def draw_frontier(
    predicted: Sequence[tuple[int, float]],
    measured: Sequence[tuple[int, float]],
    chosen: tuple[int, float],
    max_bytes: int | None,
    max_kl: float | None,
) -> Any:
    """Bytes against KL divergence, predicted as a line and measured as points, the chosen one ringed."""
    from matplotlib.figure import Figure

    ax = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for points, style in (
        (predicted, {"color": _PALE, "label": "predicted"}),
        (measured, {"color": _BLUE, "label": "measured", "marker": "o", "ls": ""}),
        (
            [chosen],
            {"label": "chosen", "marker": "o", "ms": 13, "mfc": "none", "mec": _ORANGE, "mew": 2, "ls": ""},
        ),
    ):
        ax.plot([size / 1e6 for size, _ in points], [kl for _, kl in points], **style)
    if max_kl:
        ax.axhline(max_kl, color=_ORANGE, linewidth=0.8, linestyle="--")
    if max_bytes:
        ax.axvline(max_bytes / 1e6, color=_ORANGE, linewidth=0.8, linestyle="--")
    if positive := [kl for _, kl in predicted if kl > 0]:
        ax.set_yscale("symlog", linthresh=max(min(positive), max(positive) * 1e-4))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("parameters of the model, MB")
    ax.set_ylabel("mean KL divergence, nats")
    ax.set_title("int8, float16 or float, module by module", fontsize=11)
    ax.grid()
    ax.legend(frameon=False)
    return figure
