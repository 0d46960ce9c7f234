"""Every family through the whole life of a quantized model, and the table of it in the README.

python -m tests.integration.matrix
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.integration import Decision

from .families import FAMILIES, Family
from .measure import dequantized_by_hand, outputs, relative_error, share_outside_embeddings


@dataclass(frozen=True)
class Row:
    """What was measured on one family.

    Attributes:
        share: of the parameters outside of embeddings and the output head, how many are quantized.
        by_hand: largest relative error of an output against the float model with weights dequantized by hand.
        by_float: the same against the float model as it was.
        reloaded: whether the outputs after saving and reloading are the same to the bit.
        generated: whether `generate` gives the same tokens before and after; None for a model that does not generate.
    """

    family: Family
    decisions: list[Decision]
    share: float
    by_hand: float
    by_float: float
    reloaded: bool
    generated: bool | None


def measure(family: Family, folder: Path, config: MonoQuantConfig | None = None) -> Row:
    """Load a family quantized from a float checkpoint, compare, generate, save and reload."""
    model = family.make()
    model.save_pretrained(folder / "float")
    quantized = family.model_class.from_pretrained(
        folder / "float", quantization_config=config or MonoQuantConfig()
    ).eval()
    decisions = quantized.hf_quantizer.decisions
    found = outputs(quantized, family.inputs)
    quantized.save_pretrained(folder / "quantized")
    again = family.model_class.from_pretrained(folder / "quantized").eval()
    pairs = zip(found, outputs(again, family.inputs), strict=True)
    generated = None
    if family.generates:
        tokens = [_generate(either, family) for either in (quantized, again)]
        generated = torch.equal(*tokens)
    return Row(
        family=family,
        decisions=decisions,
        share=share_outside_embeddings(model, decisions),
        by_hand=relative_error(outputs(dequantized_by_hand(model, decisions), family.inputs), found),
        by_float=relative_error(outputs(model, family.inputs), found),
        reloaded=all(torch.equal(before, after) for before, after in pairs),
        generated=generated,
    )


def _generate(model: nn.Module, family: Family) -> torch.Tensor:
    inputs = family.generation or family.inputs
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)  # type: ignore[operator]


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| family | class | quantized | error by hand | error to float | reloaded | generates | left in float |",
        "| --- | --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for row in rows:
        yes = {True: "yes", False: "no", None: "-"}
        name, model_class = row.family.name, row.family.model_class.__name__
        left = row.family.left_in_float and f"`{row.family.left_in_float}`"
        lines.append(
            f"| {name} | `{model_class}` | {row.share:.1%} | {row.by_hand:.0e} | {row.by_float:.1%} "
            f"| {'bit for bit' if row.reloaded else 'differs'} | {yes[row.generated]} | {left} |"
        )
    return "\n".join(lines)


def main() -> None:
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(family, Path(folder)))
    print(table(rows))


if __name__ == "__main__":
    main()
