"""Tiny models with random weights from a fixed seed, one a kind; a second of work at most."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 64
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def llama(tied: bool = False, layers: int = 2, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def bert(num_labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config).eval()


def resnet() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5)
    return ResNetForImageClassification(config).eval()


def vit() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        initializer_range=0.2,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits on a fixed input of the model's dtype."""
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(pixel_values=IMAGES.to(model.dtype)).logits
        return model(input_ids=TOKENS).logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())
