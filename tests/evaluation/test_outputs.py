"""Classifiers and encoders: figures by hand, and that one model at a time gives the same."""

import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.evaluation import (
    classifier_logits,
    compare_classifiers,
    compare_encoders,
    text_embeddings,
)


def small_bert(kind, **settings):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        **settings,
    )
    return kind(config).eval()


def test_classifier_figures_by_hand():
    reference = torch.tensor([[3.0, 4.0, 0.0], [0.0, 1.0, 0.0]])
    logits = torch.tensor([[4.5, 4.0, 0.0], [0.0, 1.0, 0.5]])
    result = compare_classifiers(reference, logits)
    assert result.samples == 2 and result.top1_agreement == 0.5
    assert result.relative_error == pytest.approx(math.sqrt(1.5**2 + 0.5**2) / math.sqrt(26), rel=1e-6)
    assert result.worst_relative_error == pytest.approx(0.5, rel=1e-6)
    p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    assert result.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-9)
    assert result.to_dict()["top1_agreement"] == 0.5


def test_encoder_figures_by_hand():
    result = compare_encoders(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [4.0, 3.0]]))
    assert (result.cosine_mean, result.cosine_min) == pytest.approx(((1 + 0.96) / 2, 0.96), rel=1e-6)
    assert result.relative_error == pytest.approx(math.sqrt(3) / math.sqrt(26), rel=1e-6)


def test_image_classifier(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = ResNetForImageClassification(config).eval()
    images = torch.randn(6, 3, 32, 32)
    batches = [{"pixel_values": images[:4], "labels": torch.zeros(4)}, {"pixel_values": images[4:]}]
    expected = classifier_logits(model, iter(batches))
    with torch.no_grad():
        assert torch.allclose(expected, model(pixel_values=images).logits, atol=1e-6)
    same = compare_classifiers(model, model, iter(batches))
    assert (same.relative_error, same.top1_agreement, same.samples) == (0.0, 1.0, 6)
    quantized = quantize_model(model, MonoQuantConfig())
    result = compare_classifiers(expected, quantized, {"pixel_values": images})
    assert 0 < result.relative_error < 0.05


def test_text_classifier(tokenizer):
    model = small_bert(BertForSequenceClassification, num_labels=3).train()
    batch = tokenizer(["the cat sat", "a dog"], padding=True, return_tensors="pt")
    logits = classifier_logits(model, batch)
    assert logits.shape == (2, 3) and model.training
    assert torch.equal(logits, classifier_logits(model, batch))  # without dropout


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_embeddings_do_not_depend_on_padding(tokenizer, pooling):
    model = small_bert(BertModel)
    texts = ["the cat sat on a mat and slept", "a dog", "it was raining"]
    together = text_embeddings(model, tokenizer, texts, pooling=pooling)
    alone = torch.cat([text_embeddings(model, tokenizer, text, pooling=pooling) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    with torch.no_grad():
        hidden = model(**tokenizer(texts[1], return_tensors="pt")).last_hidden_state[0]
    assert torch.allclose(alone[1], hidden.mean(0) if pooling == "mean" else hidden[0], atol=1e-5)


def test_encoders_one_at_a_time(tokenizer):
    texts = ["the cat sat on a mat and slept", "a dog", "it was raining"]
    expected = text_embeddings(small_bert(BertModel), tokenizer, texts)
    quantized = quantize_model(small_bert(BertModel), MonoQuantConfig())
    one_at_a_time = compare_encoders(expected, quantized, tokenizer, texts, batch_size=2)
    together = compare_encoders(small_bert(BertModel), quantized, tokenizer, texts, batch_size=2)
    assert one_at_a_time.cosine_min == pytest.approx(together.cosine_min, rel=1e-6)
    assert 0.99 < together.cosine_min < 1
    assert together.samples == 3


def test_errors(tokenizer):
    model = small_bert(BertModel)
    with pytest.raises(ValueError, match="batches is empty"):
        classifier_logits(model, [])
    with pytest.raises(ValueError, match="texts is empty"):
        text_embeddings(model, tokenizer, [])
    with pytest.raises(ValueError, match="pooling is 'max'"):
        text_embeddings(model, tokenizer, "the", pooling="max")
    with pytest.raises(TypeError, match="no inputs to run it on"):
        compare_classifiers(model, model)
    with pytest.raises(TypeError, match="no inputs to run it on"):
        compare_encoders(model, model, tokenizer)
    with pytest.raises(ValueError, match=r"\[1, 2\] and the model's \[1, 3\]"):
        compare_encoders(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(TypeError, match="without logits"):
        classifier_logits(model, {"input_ids": torch.tensor([[1, 2]])})
