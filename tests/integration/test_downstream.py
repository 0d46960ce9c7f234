"""What people do with these models works unchanged on quantized ones."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    pipeline,
)

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.modules import QuantizedModule
from tests.evaluation.conftest import TEXT, make_tokenizer
from tests.tiny_models import TOKENS, bert, llama, vit

from .families import FAMILIES

CONFIG = MonoQuantConfig()
QUANTIZED = {"quantization_config": CONFIG}


def quantized_modules(model):
    return [module for module in model.modules() if isinstance(module, QuantizedModule)]


@pytest.fixture
def causal(tmp_path):
    """Folder of a float Llama with a tokenizer."""
    llama().save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIG, **kwargs).eval()


def greedy(model, **kwargs):
    return model.generate(
        TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=8, do_sample=False, **kwargs
    )


def test_pipeline_text_generation(causal):
    arguments = {"max_new_tokens": 5, "do_sample": False}
    by_kwargs = pipeline("text-generation", model=str(causal), model_kwargs=QUANTIZED)
    assert quantized_modules(by_kwargs.model)
    text = by_kwargs("the cat sat", **arguments)[0]["generated_text"]
    by_model = pipeline("text-generation", model=load(causal), tokenizer=make_tokenizer())
    assert by_model("the cat sat", **arguments)[0]["generated_text"] == text
    by_model.model.save_pretrained(causal / "int8")
    make_tokenizer().save_pretrained(causal / "int8")
    saved = pipeline("text-generation", model=str(causal / "int8"))
    assert saved(["the cat sat", "a dog"], batch_size=2, **arguments)[0][0]["generated_text"] == text


def test_pipeline_feature_extraction(tmp_path):
    bert().bert.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    expected = pipeline("feature-extraction", model=str(tmp_path))(
        "the cat sat on a mat", return_tensors=True
    )
    extract = pipeline("feature-extraction", model=str(tmp_path), model_kwargs=QUANTIZED)
    assert quantized_modules(extract.model)
    found = extract("the cat sat on a mat", return_tensors=True)
    assert found.shape == expected.shape
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.999


def test_pipeline_image_classification(tmp_path):
    from PIL import Image

    vit().save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    processor = ViTImageProcessorPil.from_pretrained(tmp_path)
    expected = pipeline("image-classification", model=str(tmp_path), image_processor=processor)(image)
    classify = pipeline(
        "image-classification", model=str(tmp_path), image_processor=processor, model_kwargs=QUANTIZED
    )
    assert quantized_modules(classify.model)
    found = classify(image)
    assert found[0]["label"] == expected[0]["label"]
    assert abs(found[0]["score"] - expected[0]["score"]) < 0.05


def test_pipeline_automatic_speech_recognition(tmp_path):
    family = next(family for family in FAMILIES if family.name == "Wav2Vec2")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}
    vocabulary |= {chr(ord("a") + n): 5 + n for n in range(26)}
    vocabulary |= {f"[{n}]": n for n in range(len(vocabulary), 96)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    features = Wav2Vec2FeatureExtractor()
    family.make().save_pretrained(tmp_path / "model")
    Wav2Vec2Processor(features, tokenizer).save_pretrained(tmp_path / "model")
    model = family.model_class.from_pretrained(tmp_path / "model", quantization_config=CONFIG).eval()
    sound = np.random.default_rng(0).normal(size=1600).astype(np.float32)
    recognize = pipeline(
        "automatic-speech-recognition", model=model, tokenizer=tokenizer, feature_extractor=features
    )
    assert quantized_modules(recognize.model)
    found = recognize({"raw": sound, "sampling_rate": 16000})["text"]
    with torch.no_grad():
        inputs = features(sound, sampling_rate=16000, return_tensors="pt").input_values
        expected = tokenizer.decode(model(inputs).logits.argmax(-1)[0])
    assert found == expected and isinstance(found, str)


@pytest.mark.real_model
def test_sentence_transformers(minilm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    sentences = ["A cat sat on the mat.", "A kitten is resting on a rug.", "Interest rates rose again."]
    exact = sentence_transformers.SentenceTransformer(str(minilm), device="cpu").encode(sentences)
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu", model_kwargs=QUANTIZED)
    assert quantized_modules(model)
    found = model.encode(sentences)
    cosines = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() > 0.999
    model.save_pretrained(str(tmp_path / "int8"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "int8"), device="cpu")
    assert quantized_modules(again) and np.array_equal(again.encode(sentences), found)


def test_timm_models_in_transformers(tmp_path):
    pytest.importorskip("timm")  # which needs torchvision
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="resnet10t", num_labels=4)
    ).eval()
    model.save_pretrained(tmp_path / "float")
    images = torch.randn(2, 3, 64, 64)
    quantized = AutoModelForImageClassification.from_pretrained(tmp_path / "float", **QUANTIZED).eval()
    assert [m for m in quantized_modules(quantized) if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        expected, found = model(images).logits, quantized(images).logits
        assert torch.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.99
        quantized.save_pretrained(tmp_path / "int8")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "int8").eval()
        assert torch.equal(again(images).logits, found)


def test_generate_with_every_kind_of_cache(causal):
    model = load(causal)
    expected = greedy(model)
    assert expected.shape == (2, 20)
    assert torch.equal(greedy(model, use_cache=False), expected)
    assert torch.equal(greedy(model, cache_implementation="static"), expected)


def test_generate_with_a_quantized_cache(causal):
    pytest.importorskip("optimum.quanto")
    model = load(causal)
    config = {"backend": "quanto", "nbits": 4, "residual_length": 64}
    found = greedy(model, cache_implementation="quantized", cache_config=config)
    exact = model.dequantize()
    expected = greedy(exact, cache_implementation="quantized", cache_config=config)
    assert torch.equal(found[:, :14], expected[:, :14])  # 4-bit keys make later tokens a matter of chance


def test_assisted_generation(causal):
    model, assistant = load(causal), load(causal)
    one = TOKENS[:1]
    expected = model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=8, do_sample=False)
    found = model.generate(
        one,
        attention_mask=torch.ones_like(one),
        max_new_tokens=8,
        do_sample=False,
        assistant_model=assistant,
    )
    assert torch.equal(found, expected)


def test_trainer_evaluates(tmp_path):
    model = bert().eval()
    model.save_pretrained(tmp_path / "float")
    quantized = BertForSequenceClassification.from_pretrained(tmp_path / "float", **QUANTIZED)
    tokenizer = make_tokenizer()
    words = TEXT.split()
    rows = [{**tokenizer(" ".join(words[i : i + 8])), "labels": i % 3} for i in range(0, 32, 4)]
    losses = []
    for each in (model, quantized, quantize_model(bert().eval())):
        arguments = TrainingArguments(
            str(tmp_path / "out"), per_device_eval_batch_size=4, report_to=[], use_cpu=True
        )
        trainer = Trainer(model=each, args=arguments, eval_dataset=rows)
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.predict(rows).predictions.shape == (8, 3)
    assert losses[1] == pytest.approx(losses[0], abs=0.1) and losses[2] == pytest.approx(losses[1], abs=1e-3)
