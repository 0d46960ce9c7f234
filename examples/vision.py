"""Quantize an image classifier, convolutions and all, and compare it with the float model on pictures.

python examples/vision.py google/vit-base-patch16-224 cat.png dog.jpg
"""

import argparse

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.evaluation import classifier_logits, compare_classifiers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub name of a float image classifier")
    parser.add_argument("pictures", nargs="+", help="image files")
    arguments = parser.parse_args()

    processor = AutoImageProcessor.from_pretrained(arguments.model)
    pictures = [Image.open(file).convert("RGB") for file in arguments.pictures]
    batches = [dict(processor(picture, return_tensors="pt")) for picture in pictures]

    model = AutoModelForImageClassification.from_pretrained(arguments.model, dtype=torch.float32)
    expected, before = classifier_logits(model, batches), model.get_memory_footprint()
    model = AutoModelForImageClassification.from_pretrained(
        arguments.model, dtype=torch.float32, quantization_config=MonoQuantConfig()
    )
    for file, batch in zip(arguments.pictures, batches, strict=True):
        with torch.no_grad():
            best = int(model(**batch).logits.argmax())
        print(f"{file}: {model.config.id2label[best]}")
    result = compare_classifiers(expected, model, batches)
    print(f"in memory: {before / 1e6:.2f} MB -> {model.get_memory_footprint() / 1e6:.2f} MB")
    print(
        f"relative error of the logits: {result.relative_error:.3%}, same class: {result.top1_agreement:.0%}"
    )


if __name__ == "__main__":
    main()
