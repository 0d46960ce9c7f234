"""The numbers that a user would check first, on real weights."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.modules import QuantizedLinear, QuantizedModule
from tests import real_models

pytestmark = pytest.mark.real_model
CONFIGS = [MonoQuantConfig(), MonoQuantConfig(symmetric=True), MonoQuantConfig(weights="float16")]
IDS = ["int8", "int8 symmetric", "float16"]

SENTENCES = [
    "A man is eating food.",
    "The girl is carrying a baby.",
    "Per-channel quantization keeps one scale for every row of a weight.",
    "Ein Affe spielt Schlagzeug.",
    "What is the capital of France?",
]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_sentence_embeddings_of_minilm(config, minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def embed(model):
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    expected = embed(AutoModel.from_pretrained(minilm))
    model = AutoModel.from_pretrained(minilm, quantization_config=config)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) >= 36
    similarity = torch.nn.functional.cosine_similarity(embed(model), expected)
    assert float(similarity.min()) >= 0.999


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_efficientnet_on_photographs(config, efficientnet, tmp_path):
    pixels = real_models.photographs()
    with torch.no_grad():
        float_model = AutoModelForImageClassification.from_pretrained(efficientnet)
        expected = float_model(pixel_values=pixels).logits
        model = AutoModelForImageClassification.from_pretrained(efficientnet, quantization_config=config)
        actual = model(pixel_values=pixels).logits
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        assert all(isinstance(m, QuantizedModule) for m in convolutions) and model.dtype is torch.float32
        assert sum(isinstance(m, QuantizedModule) and m.groups > 1 for m in convolutions) == 16
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))
        # The largest error of a logit, relative to the largest logit: 4.3 % and 6.5 % when this was written.
        error = float((actual - expected).abs().max() / expected.abs().max())
        assert error < (0.08 if config.symmetric else 0.05)
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(reloaded(pixel_values=pixels).logits, actual)


def test_smollm2_has_210_int8_linears_at_a_quarter_of_the_bytes(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=MonoQuantConfig())
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    codes = sum(module.weight_int8.nbytes for module in linears)
    companions = sum(module.weight_scale.nbytes + module.weight_zero_point.nbytes for module in linears)
    assert len(linears) == 210 and codes == sum(module.weight.numel() for module in linears)
    float_model = AutoModelForCausalLM.from_pretrained(smollm2)
    saved = float_model.get_memory_footprint() - model.get_memory_footprint()
    assert saved == 3 * codes - companions
