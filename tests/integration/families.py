"""One tiny model with random weights of every family in the matrix, made from its own config class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 96
TOKENS = torch.arange(20).reshape(2, 10) * 7 % 90 + 3
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TEXT, **SPECIAL, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Family:
    """A row of the matrix.

    Attributes:
        model_class: as users load it.
        config: makes the config.
        inputs: keyword arguments of a forward.
        generates: whether to run `generate`; `generation` are its arguments in place of `inputs`.
        left_in_float: why less than nine tenths of the parameters outside embeddings are quantized, as the decision
            on a module puts it; empty if they are.
    """

    name: str
    model_class: type[PreTrainedModel]
    config: Callable[[], Any]
    inputs: dict[str, Tensor]
    generates: bool = False
    generation: dict[str, Tensor] = field(default_factory=dict)
    left_in_float: str = ""

    def make(self) -> PreTrainedModel:
        """The float model in evaluation mode; the same weights on each call."""
        torch.manual_seed(0)
        model = self.model_class(self.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Some classes leave parameters (of experts, say) uninitialized, or so small that nothing gets through.
                if parameter.dim() > 1:
                    inputs = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
                    parameter.normal_(0, (1.5 / inputs) ** 0.5)
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.reset_parameters()
        model.tie_weights()
        return model


def images(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def _decoder(name: str, model_class: Any, config_class: Any, **changes: Any) -> Family:
    config = {**DECODER, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    return Family(name, model_class, lambda: config_class(**config), {"input_ids": TOKENS}, generates=True)


def _encoder(name: str, model_class: Any, config_class: Any, **changes: Any) -> Family:
    config = {
        key: value for key, value in {**TEXT, "pad_token_id": 0, **changes}.items() if value is not None
    }
    return Family(name, model_class, lambda: config_class(**config), {"input_ids": TOKENS})


def _vision(name: str, model_class: Any, config_class: Any, left: str = "", **config: Any) -> Family:
    size = config.get("image_size", 32)
    return Family(
        name, model_class, lambda: config_class(**config), {"pixel_values": images(size)}, left_in_float=left
    )


def _whisper() -> Any:
    return hf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=40,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.1,
        **SPECIAL,
    )


def _wav2vec2() -> Any:
    return hf.Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=8,
        initializer_range=0.1,
        mask_time_prob=0.0,
    )


def _two_towers(config_class: Any, text_class: Any) -> Any:
    text = text_class(**TEXT, **SPECIAL)
    return config_class(
        text_config=text.to_dict(),
        vision_config=VISION,
        **({"projection_dim": 64} if config_class is hf.CLIPConfig else {}),
    )


def _llava() -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=64),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_index=95,
    )


def _qwen2_5_vl() -> Any:
    return hf.Qwen2_5_VLConfig(
        text_config={
            **DECODER,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=95,
        video_token_id=94,
        vision_start_token_id=93,
        vision_end_token_id=92,
        **SPECIAL,
    )


def _image_tokens(image_token: int, count: int) -> Tensor:
    return torch.cat(
        [TOKENS[:, :4].clamp(max=90), torch.full((2, count), image_token), TOKENS[:, 4:].clamp(max=90)], 1
    )


def _vision_encoder_decoder() -> Any:
    return hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**VISION),
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=32,
            add_cross_attention=True,
            initializer_range=0.1,
            **SPECIAL,
        ),
        decoder_start_token_id=1,
        pad_token_id=0,
        eos_token_id=2,
    )


def _audio() -> Tensor:
    return torch.randn(2, 800, generator=torch.Generator().manual_seed(1))


_FEATURES = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(1))
_SEQ2SEQ_INPUTS = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}

FAMILIES = [
    _decoder("Llama", hf.LlamaForCausalLM, hf.LlamaConfig),
    _decoder("Qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config, head_dim=16),
    _decoder("Gemma 3", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, head_dim=16, sliding_window=8),
    _decoder("Mistral", hf.MistralForCausalLM, hf.MistralConfig, head_dim=16),
    _decoder("Phi-3", hf.Phi3ForCausalLM, hf.Phi3Config, original_max_position_embeddings=64),
    Family(
        "GPT-2",
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.1,
            **SPECIAL,
        ),
        {"input_ids": TOKENS},
        generates=True,
    ),
    _decoder("GPT-NeoX", hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, num_key_value_heads=None),
    _decoder(
        "OPT",
        hf.OPTForCausalLM,
        hf.OPTConfig,
        num_key_value_heads=None,
        intermediate_size=None,
        initializer_range=None,
        ffn_dim=128,
        init_std=0.1,
        word_embed_proj_dim=64,
    ),
    _decoder(
        "Falcon", hf.FalconForCausalLM, hf.FalconConfig, num_key_value_heads=None, intermediate_size=None
    ),
    Family(
        "Mamba",
        hf.MambaForCausalLM,
        lambda: hf.MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            state_size=8,
            time_step_rank=8,
            **SPECIAL,
        ),
        {"input_ids": TOKENS},
        generates=True,
    ),
    _decoder("Mixtral", hf.MixtralForCausalLM, hf.MixtralConfig, num_local_experts=4),
    _decoder("Qwen3-MoE", hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, head_dim=16, num_experts=4, **EXPERTS),
    _decoder(
        "DeepSeek-V3",
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        **EXPERTS,
    ),
    _decoder(
        "gpt-oss",
        hf.GptOssForCausalLM,
        hf.GptOssConfig,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    _decoder(
        "Llama 4",
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig,
        head_dim=16,
        num_local_experts=4,
        intermediate_size_mlp=128,
    ),
    _encoder("BERT", hf.BertForSequenceClassification, hf.BertConfig),
    _encoder(
        "ModernBERT",
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig,
        initializer_range=None,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    _encoder(
        "DeBERTa-v2",
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
    ),
    Family(
        "T5",
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        ),
        _SEQ2SEQ_INPUTS,
        generates=True,
        generation={"input_ids": TOKENS},
    ),
    Family(
        "BART",
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_position_embeddings=64,
            init_std=0.1,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **SPECIAL,
        ),
        _SEQ2SEQ_INPUTS,
        generates=True,
        generation={"input_ids": TOKENS},
    ),
    Family(
        "Whisper",
        hf.WhisperForConditionalGeneration,
        _whisper,
        {"input_features": _FEATURES, "decoder_input_ids": TOKENS[:, :5]},
        generates=True,
        generation={"input_features": _FEATURES},
    ),
    Family("Wav2Vec2", hf.Wav2Vec2ForCTC, _wav2vec2, {"input_values": _audio()}),
    Family(
        "CLIP",
        hf.CLIPModel,
        lambda: _two_towers(hf.CLIPConfig, hf.CLIPTextConfig),
        {"input_ids": TOKENS, "pixel_values": images()},
    ),
    Family(
        "SigLIP",
        hf.SiglipModel,
        lambda: _two_towers(hf.SiglipConfig, hf.SiglipTextConfig),
        {"input_ids": TOKENS, "pixel_values": images()},
    ),
    _vision("ViT", hf.ViTForImageClassification, hf.ViTConfig, **VISION),
    _vision("DINOv2", hf.Dinov2Model, hf.Dinov2Config, **VISION),
    _vision(
        "ResNet",
        hf.ResNetForImageClassification,
        hf.ResNetConfig,
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[2, 2],
    ),
    _vision(
        "ConvNeXt",
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        num_stages=2,
        initializer_range=0.1,
    ),
    _vision(
        "EfficientNet",
        hf.EfficientNetForImageClassification,
        hf.EfficientNetConfig,
        image_size=32,
        kernel_sizes=[3, 3],
        in_channels=[32, 24],
        out_channels=[24, 40],
        depthwise_padding=[],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 6],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        num_labels=2,
    ),
    _vision(
        "DETR",
        hf.DetrForObjectDetection,
        hf.DetrConfig,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=hf.ResNetConfig(
            embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], out_features=["stage2"]
        ).to_dict(),
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=8,
        init_std=0.1,
    ),
    _vision(
        "SegFormer",
        hf.SegformerForSemanticSegmentation,
        hf.SegformerConfig,
        image_size=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[32, 32, 64, 64],
        decoder_hidden_size=64,
        initializer_range=0.1,
    ),
    Family(
        "LLaVA",
        hf.LlavaForConditionalGeneration,
        _llava,
        {"input_ids": _image_tokens(95, 16), "pixel_values": images()},
        generates=True,
    ),
    Family(
        "Qwen2.5-VL",
        hf.Qwen2_5_VLForConditionalGeneration,
        _qwen2_5_vl,
        {
            "input_ids": _image_tokens(95, 16),
            "mm_token_type_ids": (_image_tokens(95, 16) == 95).int(),
            "pixel_values": torch.randn(2 * 64, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
            "image_grid_thw": torch.tensor([[1, 8, 8], [1, 8, 8]]),
        },
        generates=True,
    ),
    Family(
        "ViT and GPT-2 (vision encoder-decoder)",
        hf.VisionEncoderDecoderModel,
        _vision_encoder_decoder,
        {"pixel_values": images(), "decoder_input_ids": TOKENS[:, :5]},
        generates=True,
        generation={"pixel_values": images()},
    ),
]
