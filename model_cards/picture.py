"""Draws the picture of the README: size, speed and accuracy of SmolLM2-135M, from the table of the kernels' README.

    python model_cards/picture.py

The table is what `python examples/benchmark.py` printed; the text above it has the whole command. Needs matplotlib.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE.parent / "mono_quant_hf" / "kernels" / "README.md"
PICTURE = HERE / "plots" / "size-speed-accuracy.png"
HEADING = "| | SmolLM2 decode |"
ROWS = {
    "float32": "float32",
    "int8": "mono_quant_hf int8",
    "int8 with embeddings": "… with embeddings",
    "optimum-quanto int8": "optimum-quanto int8",
    "torchao int8": "torchao int8",
    "bitsandbytes int8": "bitsandbytes int8",
}
OURS, FLOAT, OTHERS = "#2563eb", "#475569", "#94a3b8"


def figures() -> dict[str, tuple[float, float, float]]:
    """Row of the table to megabytes, ratio of the decoding speed to float32, and perplexity."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(HEADING))
    found = {}
    for line in lines[start + 2 :]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name not in ROWS:
            if not line.startswith("|"):
                break
            continue
        found[name] = float(cells[6].split(",")[0]), float(cells[0].split()[0]), float(cells[7])
    return found


def draw(found: dict[str, tuple[float, float, float]]) -> None:
    from matplotlib.figure import Figure

    names = [name for name in ROWS if name in found]
    reference = found["float32"][2]
    panels = (
        ("size, MB", [found[name][0] for name in names], "{:.0f}"),
        ("speed of one token, times float32", [found[name][1] for name in names], "{:.2f}"),
        ("perplexity, % over float32", [100 * (found[name][2] / reference - 1) for name in names], "{:.2f}"),
    )
    colors = [FLOAT, OURS, OURS, *[OTHERS] * (len(names) - 3)]
    figure = Figure(figsize=(9, 2.3), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        bars = axis.barh([ROWS[name] for name in names], values, color=colors)
        axis.bar_label(bars, labels=[form.format(value) for value in values], padding=3, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 1.2 * max(values))
        axis.tick_params(axis="y", length=0, labelsize=8)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    draw(figures())
    print(PICTURE)
