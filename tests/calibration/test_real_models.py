"""Calibrated rounding of real models, on data that was not calibrated on."""

import os
from pydoc_data.topics import topics

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer, EfficientNetForImageClassification

from mono_quant_hf import quantize_model
from mono_quant_hf.calibration import Compensation, Sampling
from mono_quant_hf.evaluation import compare_classifiers, compare_encoders, text_embeddings
from tests import real_models

pytestmark = pytest.mark.real_model

OTHER_PICTURES = ["brick", "coins", "gravel", "moon", "page", "horse", "clock_motion", "text"]


def other_pictures():
    """Crops of pictures that are not among `real_models.photographs()`, float32 [32, 3, 224, 224]."""
    folder, random, crops = os.path.dirname(skimage.data.__file__), np.random.default_rng(0), []
    for name in 4 * OTHER_PICTURES:
        with Image.open(os.path.join(folder, f"{name}.png")) as opened:
            image = opened.convert("RGB")
        side = int(min(image.size) * random.uniform(0.5, 1))
        left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
        box = (left, top, left + side, top + side)
        crops.append(np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box=box)))
    return (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() - 127) / 128


def test_efficientnet_by_pictures_and_without_data(efficientnet):
    def model():
        return EfficientNetForImageClassification.from_pretrained(efficientnet).eval()

    def error(**arguments):
        return compare_classifiers(expected, quantize_model(model(), **arguments), photographs).relative_error

    photographs = {"pixel_values": real_models.photographs()}
    with torch.no_grad():
        expected = model()(**photographs).logits
    plain = error()
    assert error(calibration="data-free") < 0.75 * plain
    compensated = error(calibration=other_pictures().split(8), compensation=Compensation(sweeps=1))
    assert compensated < 0.5 * plain


def test_minilm_by_text_of_another_kind(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    text = list(topics.values())
    sentences = [
        "The old captain walked down to the harbour before dawn and looked at the grey sea.",
        "How do I reset the password of my account?",
        "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
        "She laughed, closed the book, and asked him what he wanted for supper.",
        "Interest rates rose by half a point in the last quarter.",
    ]

    def error(**arguments):
        model = quantize_model(AutoModel.from_pretrained(minilm).eval(), **arguments)
        return compare_encoders(expected, model, tokenizer, sentences).relative_error

    expected = text_embeddings(AutoModel.from_pretrained(minilm).eval(), tokenizer, sentences)
    sampling = Sampling(samples=64, length=128, batch_size=32)
    assert error(calibration=text, tokenizer=tokenizer, sampling=sampling) < 0.95 * error()


def test_minilm_by_text_of_the_same_kind(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    pages = list(topics.values())
    seen, unseen = pages[::2], [page[:400] for page in pages[1::2]][:40]

    def error(**arguments):
        model = quantize_model(AutoModel.from_pretrained(minilm).eval(), **arguments)
        return compare_encoders(expected, model, tokenizer, unseen).relative_error

    expected = text_embeddings(AutoModel.from_pretrained(minilm).eval(), tokenizer, unseen)
    sampling = Sampling(samples=256, length=128, batch_size=32)
    assert error(calibration=seen, tokenizer=tokenizer, sampling=sampling) < 0.5 * error()
