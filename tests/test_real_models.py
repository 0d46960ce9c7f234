"""The real models are what the other tests take them for."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoTokenizer

from tests.real_models import PHOTOGRAPHS, photographs

pytestmark = pytest.mark.real_model

# ImageNet: a class of each photograph that a person would accept.
ACCEPTED = {
    "cat": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee": {504, 967, 968},  # coffee mug, espresso, cup
    "rocket": {657, 744, 812},  # missile, projectile, space shuttle
    "camera": {759, 872},  # reflex camera, tripod
    "stereo_motorcycle": {665, 670},  # moped, motor scooter
}


def test_smollm2_is_a_llama_with_210_linears_and_a_chat_template(smollm2):
    config = AutoConfig.from_pretrained(smollm2)
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("llama", 30, True)
    assert "<|im_start|>user" in AutoTokenizer.from_pretrained(smollm2).apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    )


def test_minilm_finds_the_nearer_sentence(minilm):
    model, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The stock market fell today."]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    embeddings = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    nearness = embeddings @ embeddings.T
    assert nearness[0, 1] > 0.5 > 0.2 > nearness[0, 2]


def test_efficientnet_has_its_convolutions_and_sees_what_is_there(efficientnet):
    model = AutoModelForImageClassification.from_pretrained(efficientnet)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    gates = [name for name in convolutions if "squeeze_excite" in name]
    depthwise = [m for m in convolutions.values() if m.groups > 1]
    assert (len(convolutions), len(gates), len(depthwise)) == (81, 32, 16)

    with torch.no_grad():
        seen = model(pixel_values=photographs()).logits.argmax(1).tolist()
    labels = dict(zip(PHOTOGRAPHS, seen, strict=True))
    assert {name: label for name, label in labels.items() if label not in ACCEPTED.get(name, {label})} == {}
