"""A tiny model of any class of transformers, made from its own config class, and inputs for its forward.

Nothing here knows a family: widths, depths, vocabularies and image sizes are told by the names and types of a config's
fields, and inputs by the names of a forward's arguments. Where a guess does not build or run, the next one is tried.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

VOCABULARY = 128
WORDS = 90  # token ids from here to the vocabulary's end are special ones
LENGTH = 12
MOST_PARAMETERS = 62_000_000


class CannotRun(Exception):
    """No config of the class, or no inputs, that were tried build a model that runs."""


# ---------------------------------------------------------------- configs


@dataclass(frozen=True)
class Way:
    """How far to shrink.

    Attributes:
        width: of hidden states; 0 for an eighth of what it is by default.
        heads, head_dim: of attention; 0 to leave all sizes but depths, vocabularies and numbers of experts.
        layers: whether depths are cut.
    """

    name: str
    width: int = 0
    heads: int = 0
    head_dim: int = 0
    layers: bool = True


WAYS = (
    Way("uniform", 64, 4, 16),
    Way("proportional", 0, 4, 16),
    Way("wide", 256, 2, 128),
    Way("shallow"),
    Way("default", layers=False),
)

_LEFT = re.compile(
    r"kernel|stride|padding|dilation|window|chunk|ratio|factor|scale|rate|coefficient|cost|bucket|temperature|theta|eps$"
    r"|range|dropout|prob|loss|seed|group|_base$|bins|level|multiple|divisor|num_labels|type_vocab|mask_time|mask_feature"
    r"|pos_emb_time|max_rel|rel_pos|rel_2d|roi|num_channels|_mult$|expand|n_floor|quantization_config|dtype"
)
_TOKEN = re.compile(
    r"(token_id|token_index|_token_ids|_tokens_ids|(unk|mask|pad|bos|eos|image|audio|video)_index)$"
)
_VOCABULARY = re.compile(
    r"vocab|codebook_size|num_codevectors|num_embeddings$|num_embeds|num_tokens$|n_vocab"
)
_LAYERS = re.compile(
    r"(^|_)(layers?|depths?|blocks|repeats|blocks_per_stage|num_layers)$|^n_layers?$|num_res_blocks"
)
_NO_LAYERS = re.compile(r"^(min|max)_|window_layers|feat_extract|global_layers|no_rope|_dense|stage_num")
_INDICES = re.compile(r"index|indices|idx|layers$|blocks$")
_CHOSEN = re.compile(r"per_tok|per_token|top_?k$|moe_k$|topk_experts")
_GROUPS = re.compile(r"^(topk_group|n_group)$")
_EXPERTS = re.compile(r"(^|_)experts$")
_PERIOD = re.compile(r"(_period|_interval|_frequency|_pattern|sparse_step|first_k_dense_replace)$")
_POSITIONS = re.compile(
    r"position|max_seq|max_len|seq_len|block_size|context_length|n_ctx|max_text|max_pos|^seq_length$"
)
_IMAGE = re.compile(r"(image|img|input|crop|spec)_size$|^resolution$|pretrain_image_size|^size$")
_PATCH = re.compile(r"^(patch_size|patch_sizes|patch_length)$")
_IMAGE_TOKENS = re.compile(r"^(image_seq_length|num_image_tokens|mm_tokens_per_image|num_patches)$")
_STATE_HEADS = re.compile(r"mamba.*heads$")
_KEY_HEADS = re.compile(r"(kv|key_value|key|k)_heads?$|n_head_kv|multi_query_group")
_HEADS = re.compile(r"heads?(_per_stage)?$")
_HEAD_DIM = re.compile(
    r"head_dim$|head_v_dim|^d_kv$|^d_head$|dim_head$|kv_channels|head_size$|mamba_d_head|rotary_dim|d_rel"
)
_INTERMEDIATE = re.compile(
    r"intermediate|ffn|mlp_(hidden_)?dim|d_ff|d_inner|feed_?forward|linear_units|dim_ff"
)
_WIDTH = re.compile(
    r"hidden|dim|size|width|channels?|rank|units|embd|embed|feature|filters|d_model|projection|latent|proj|state"
)
_QUERIES = re.compile(r"num_queries|query_num|query_tokens|num_latents|n_latents|prompt_length|num_denoising")
_WIDTHS_LISTED = re.compile(r"dim|size|channel|width|embed|filter|hidden")

_SERIES = {"prediction_length": 8, "context_length": 16}
_IMAGE_TOKEN = {"image_token_index": VOCABULARY - 1}
_EFFICIENTNET = {
    "hidden_dim": 1280,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "kernel_sizes": [3, 3],
    "in_channels": [32, 24],
    "out_channels": [24, 40],
    "depthwise_padding": [],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6],
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {**_SERIES, "label_length": 8},
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "efficientnet": _EFFICIENTNET,
    "align_vision_model": _EFFICIENTNET,
    "emu3": {
        "vocabulary_map": {
            "<image>": VOCABULARY - 1,
            **{f"<|visual token {place:06d}|>": place for place in range(VOCABULARY - 8)},
        }
    },
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "blip-2": _IMAGE_TOKEN,
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "chameleon": {
        "vocabulary_map": {
            "<image>": VOCABULARY - 1,
            **{
                f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(place))}Z": place
                for place in range(VOCABULARY - 8)
            },
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "instructblip": _IMAGE_TOKEN,
    "instructblipvideo": {"video_token_index": VOCABULARY - 1},
}
"""`{model type: fields}` of configs that no rule can guess."""


def tiny_config(config_class: type[PreTrainedConfig], way: Way) -> PreTrainedConfig:
    """The default config of a class, shrunk."""
    return _Shrinking(way).shrunk(config_class())


class _Shrinking:
    def __init__(self, way: Way):
        self.way = way
        self.special: dict[int, int] = {}  # new ids of special tokens, counted from the end of the vocabulary

    def shrunk(self, config: PreTrainedConfig, given: frozenset[str] = frozenset()) -> PreTrainedConfig:
        """A smaller config.

        Args:
            given: fields that are set though their default is None.
        """
        declared = {f.name: f.default for f in dataclasses.fields(config)}
        of_all = {f.name for f in dataclasses.fields(PreTrainedConfig)}
        specs = type(config).sub_configs_defaults
        values: dict[str, Any] = {}
        counts = {
            value
            for name in declared
            if re.search("layer|block|depth", name) and type(value := _get(config, name)) is int and value > 2
        }
        per_layer = {
            name: list(value)
            for name in declared
            if isinstance(value := _get(config, name), (list, tuple))
            and len(value) in counts
            and (isinstance(value[0], (str, bool)) or "layer" in name)
        }
        maps = list(_get(config, "out_features") or ())  # of a backbone, which may give one a layer
        layers = self._layers_kept(per_layer)
        depth = max(len(layers) or 2, len(maps))
        for name, default in declared.items():
            value = _get(config, name, default)
            if name.startswith("_") or value is None or name == "quantization_config":
                continue
            if type(value).__name__ == "TimmBackboneConfig":
                values[name] = _backbone(value)
            elif isinstance(value, PreTrainedConfig):
                init = frozenset(specs[name].init_kwargs) if name in specs else frozenset()
                values[name] = self.shrunk(value, init)
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], PreTrainedConfig):
                values[name] = [self.shrunk(part) for part in value]
            elif name in per_layer and self.way.layers and len(value) == len(per_layer[name]):
                values[name] = type(value)(per_layer[name][place] for place in layers)
            elif default is None and name not in given and name != "image_grid_pinpoints":
                continue  # derived from other fields
            elif name in of_all and value == default and not _TOKEN.search(name):
                continue
            else:
                values[name] = self._value(name, value, config, depth, counts)
        values |= OVERRIDES.get(config.model_type, {})
        new = type(config)(**values)
        if maps:
            same = len(new.stage_names) == len(config.stage_names)
            new = type(config)(**values, out_features=maps if same else new.stage_names[-len(maps) :])
        return new

    def _layers_kept(self, per_layer: dict[str, list[Any]]) -> list[int]:
        """Places of layers such that there is one of every kind: at least 2, at most 4."""
        longest = max(map(len, per_layer.values()), default=0)
        of_one_length = [kinds for kinds in per_layer.values() if len(kinds) == longest]
        kinds: dict[str, int] = {}
        for place, kind in enumerate(zip(*of_one_length, strict=True)):
            kinds.setdefault(repr(kind), place)
        kept = sorted(kinds.values())[:4]
        return kept if len(kept) > 1 else [*range(longest)][:2]

    def _value(self, name: str, value: Any, config: Any, layers: int, counts: set[int]) -> Any:
        if isinstance(value, (bool, str, float)):
            return False if name == "use_cache" else value
        if name == "image_grid_pinpoints" and self.way.heads:
            return [[32, 64], [64, 32], [64, 64]]
        if isinstance(value, dict):
            return self._of_rope(value) if "rope" in name else value
        if isinstance(value, int):
            return self._number(name, value, config, layers)
        if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            increasing = all(a < b for a, b in itertools.pairwise(value))
            if (
                _INDICES.search(name)
                and increasing
                and self.way.layers
                and counts
                and value[-1] < max(counts)
            ):
                kept = [item for item in value if item < layers] or [layers - 1]
                return type(value)(kept)
            widths = _WIDTHS_LISTED.search(name) and not _LEFT.search(name) and not _IMAGE.search(name)
            if self.way.heads and widths:
                return type(value)(_part(item) for item in value)
            return type(value)(self._number(name, item, config, layers) for item in value)
        return value

    def _of_rope(self, value: dict[str, Any]) -> dict[str, Any]:
        """Sections of a rotary embedding add up to half of a head."""
        half = self.way.head_dim // 2
        new = dict(value)
        for key, sections in value.items():
            if key.endswith("section") and half:
                parts = [half // len(sections)] * len(sections)
                parts[-1] += half - sum(parts)
                new[key] = parts
            elif isinstance(sections, dict):
                new[key] = self._of_rope(sections)
        return new

    def _number(self, name: str, value: int, config: Any, layers: int) -> int:
        way = self.way
        if not way.layers or value < 2:
            return value
        if _TOKEN.search(name):
            return self._token(value)
        if _VOCABULARY.search(name) and "type_vocab" not in name and "size_divisor" not in name:
            return min(value, VOCABULARY if "position" not in name else 64)
        if _CHOSEN.search(name):
            return min(value, 2)
        if _GROUPS.search(name):
            return 1
        if _EXPERTS.search(name) and "shared" not in name:
            return min(value, 4)
        if _PERIOD.search(name):
            return min(value, 2)
        if name.endswith("layer_offset"):
            return 1
        if _LAYERS.search(name) and not _NO_LAYERS.search(name):
            return min(value, layers)
        if not way.heads:
            return value
        if _QUERIES.search(name):
            return min(value, 8)
        if _POSITIONS.search(name) and not name.endswith(("dim", "hidden_size", "per_seconds")):
            return min(value, 128)
        if _PATCH.search(name):
            return min(value, 8)
        if _IMAGE.search(name):
            return _image_size(config)
        if _IMAGE_TOKENS.search(name):
            return 16
        if _STATE_HEADS.search(name) or (name == "num_heads" and hasattr(config, "expand")):
            return self._state_heads(config)
        if _KEY_HEADS.search(name):
            heads = _get(config, "num_attention_heads") or _get(config, "linear_num_value_heads")
            return way.heads if isinstance(heads, int) and value >= heads else max(1, way.heads // 2)
        if _HEAD_DIM.search(name):
            return way.head_dim * (2 if name == "qk_head_dim" else 1)
        if _HEADS.search(name):
            return way.heads if value > 2 else value
        if name.endswith("groups") and value == _get(config, "hidden_size"):
            return way.width or _part(value)
        if _LEFT.search(name) or value <= 16:
            return value
        if _INTERMEDIATE.search(name):
            return 2 * way.width if way.width else _part(value)
        if _WIDTH.search(name):
            return way.width or _part(value)
        return value

    def _state_heads(self, config: Any) -> int:
        """Heads of a state space model: those of its expanded width."""
        expand = next((v for n in ("mamba_expand", "expand") if (v := _get(config, n))), 2)
        width = self.way.width or _part(_get(config, "hidden_size") or 512)
        return max(1, int(expand * width) // self.way.head_dim)

    def _token(self, value: int) -> int:
        if value < WORDS:
            return value
        return self.special.setdefault(value, VOCABULARY - 1 - len(self.special))


def _get(config: Any, name: str, default: Any = None) -> Any:
    """An attribute; the default where there is none, or another in each layer."""
    try:
        return getattr(config, name, default)
    except AmbiguousGlobalPerLayerAttributeError:
        return next((f.default for f in dataclasses.fields(config) if f.name == name), default)


def _backbone(of_timm: Any) -> PreTrainedConfig:
    """A tiny ResNet that gives as many feature maps as a backbone of timm, which is not installed."""
    maps = len(of_timm.out_indices) if of_timm.out_indices else 1
    return transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        out_features=[f"stage{stage}" for stage in range(5 - maps, 5)],
    )


def _part(value: int) -> int:
    """An eighth of a width, in sixteens; equal widths stay equal, wherever they stand."""
    return value if value <= 16 else min(max(round(value / 128), 1), 8) * 16


def _image_size(config: Any) -> int:
    patch = _get(config, "patch_size")
    patch = patch[0] if isinstance(patch, (list, tuple)) and patch else patch
    return 4 * min(patch, 8) if isinstance(patch, int) and patch > 4 else 64


# ---------------------------------------------------------------- models


def make_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0
) -> PreTrainedModel:
    """A model in evaluation mode with random weights that let signals through; the same for a seed."""
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in model_class(config).parameters())
        except (NotImplementedError, RuntimeError, AttributeError, TypeError, ValueError):
            size = 0  # what cannot be made on the meta device is tried as it is
    if size > MOST_PARAMETERS:
        raise CannotRun(f"it has {size:,} parameters")
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if parameter.dim() > 1:
                inputs = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
                parameter.normal_(0, (1.5 / inputs) ** 0.5)
            elif parameter.dim() == 1 and "bias" not in name and float(parameter.abs().max()) < 1e-2:
                parameter.fill_(0.5)  # gates and scales of layers that are closed at first
    model.tie_weights()
    return model


# ---------------------------------------------------------------- inputs


@dataclass
class _Inputs:
    """Candidates for the arguments of a forward."""

    model: PreTrainedModel
    features: int = 0
    """How many image or audio tokens the text must have; 0 where there are none."""
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def __post_init__(self) -> None:
        self.config: Any = self.model.config
        self.parts = list(_parts(self.config))
        self.signature = inspect.signature(self.model.forward).parameters
        self.batch = (
            1 if "pixel_values" in self.signature and self._of("image_token_id", "image_token_index") else 2
        )
        if self.features:
            self.batch = 1

    def _of(self, *names: str, default: Any = None, like: str = "") -> Any:
        """The first config field of one of the names, in the parts whose class name is alike first."""
        parts = (
            sorted(self.parts, key=lambda part: like.lower() not in type(part).__name__.lower())
            if like
            else self.parts
        )
        for part in parts:
            for name in names:
                value = _get(part, name)
                if value is not None and not callable(value):
                    return value
        return default

    def _number(self, *names: str, default: int, like: str = "") -> int:
        value = self._of(*names, default=default, like=like)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, dict):
            value = next(iter(value.values()), default)
        return int(value) if isinstance(value, (int, float)) else default

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _ids(self, batch: int, length: int) -> Tensor:
        sizes = [
            size for part in self.parts if isinstance(size := _get(part, "vocab_size"), int) and size > 8
        ]
        return torch.randint(5, min([WORDS, *sizes]), (batch, length), generator=self.generator)

    # What an argument of each name may be: several shapes, the likeliest first.

    def input_ids(self) -> Iterator[Tensor]:
        token = self._of(
            "image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "media_token_id",
            "video_token_id", "image_patch_id", "im_token_id",
        )  # fmt: skip
        length = self.features + 4 if self.features else LENGTH
        ids = self._ids(self.batch, length)
        if self.features and isinstance(token, int):
            ids[:, 2 : 2 + self.features] = token
            yield ids
            return
        if (eos := self._of("eos_token_id")) is not None and isinstance(eos, int):
            ids[:, -1] = min(eos, VOCABULARY - 1)
        yield ids
        books = self._number("num_codebooks", "num_code_groups", "num_quantizers", "n_codes_given", default=0)
        if books:
            yield self._ids(self.batch, LENGTH * books).view(self.batch, LENGTH, books)
            yield self._ids(self.batch * books, LENGTH)

    def decoder_input_ids(self) -> Iterator[Tensor]:
        yield self._ids(self.batch, 6)
        books = self._number("num_codebooks", "decoder_num_channels", "num_channels", default=1)
        yield self._ids(self.batch * books, 6)
        yield self._ids(self.batch, 6 * books).view(self.batch, 6, books)

    def pixel_values(self) -> Iterator[Tensor]:
        channels = self._number(
            "num_channels", "in_channels", "in_chans", "input_channels", default=3, like="vision"
        )
        channels = channels if channels in (1, 3, 4) else 3
        size = self._number("image_size", "img_size", "input_size", default=64, like="vision")
        patch = self._patch()
        frames = self._number("num_frames", "frames_per_clip", "max_num_frames", default=2)
        batch = self.batch
        if "image_grid_thw" in self.signature or "grid_thw" in self.signature:
            yield self._patches(channels)
        if "spatial_shapes" in self.signature or "pixel_attention_mask" in self.signature:
            yield self._normal(batch, 16, channels * patch * patch)
        yield self._normal(batch, channels, size, size)
        yield self._normal(batch, 1, channels, size, size)
        yield self._normal(batch, frames, channels, size, size)
        yield self._normal(batch, 3, channels, size, size)
        yield self._normal(batch, channels, frames, size, size)
        yield self._normal(batch, 1, self._number("max_num_tiles", default=1), channels, size, size)
        yield self._patches(channels)
        yield self._normal(batch, 16, channels * patch * patch)
        yield self._normal(batch, channels, 224, 224)

    def _patch(self) -> int:
        return self._number("patch_size", "spatial_patch_size", default=4, like="vision")

    def _patches(self, channels: int) -> Tensor:
        depth = self._number("temporal_patch_size", default=1, like="vision")
        return self._normal(64, channels * depth * self._patch() ** 2)

    def grid_thw(self) -> Iterator[Tensor]:
        yield torch.tensor([[1, 8, 8]])

    def image_grid_hw(self) -> Iterator[Tensor]:
        yield torch.tensor([[8, 8]])

    def hidden_states(self) -> Iterator[Tensor]:
        if "grid_thw" in self.signature:
            yield self._patches(self._number("num_channels", "in_channels", "in_chans", default=3))
        yield self._normal(self.batch, LENGTH, self._number("hidden_size", "d_model", default=64))

    def pixel_values_videos(self) -> Iterator[Tensor]:
        size = self._number("image_size", "crop_size", default=64, like="vision")
        frames = self._number("num_frames", "frames_per_clip", default=4, like="vision")
        yield self._normal(1, frames, self._number("num_channels", "in_chans", default=3), size, size)

    def image_sizes(self) -> Iterator[Tensor]:
        size = self._number("image_size", default=64, like="vision")
        yield torch.tensor([[size, size]] * self.batch)

    def spatial_shapes(self) -> Iterator[Tensor]:
        yield torch.tensor([[4, 4]] * self.batch)

    def pixel_attention_mask(self) -> Iterator[Tensor]:
        yield torch.ones(self.batch, 16, dtype=torch.long)
        size = self._number("image_size", default=64, like="vision")
        yield torch.ones(self.batch, size, size, dtype=torch.long)
        yield torch.ones(self.batch, 1, size, size, dtype=torch.long)

    def input_features(self) -> Iterator[Tensor]:
        bins = self._number(
            "num_mel_bins", "input_feat_size", "feature_projection_input_dim", "input_dim", "feat_dim", "mel_dim",
            "n_mel_bins", "feature_size", "num_mels", "spec_size", default=80, like="audio",
        )  # fmt: skip
        frames = 2 * self._number("max_source_positions", default=32, like="audio")
        long = max(frames, 64)
        batch = self.batch
        yield self._normal(batch, bins, frames)
        yield self._normal(batch, frames, bins)
        yield self._normal(batch, long, bins)
        yield self._normal(batch, bins, long)
        yield self._normal(batch, 1, 1001, 64)
        yield self._normal(batch, 1, 1024, bins)
        yield self._normal(batch, 4000)
        yield self._normal(batch, bins, 3000)

    def input_values(self) -> Iterator[Tensor]:
        bins = self._number("num_mel_bins", "mel_dim", default=80)
        length = self._number("max_length", default=64)
        yield self._normal(self.batch, 4000)
        yield self._normal(self.batch, 1, 4000)
        yield self._normal(self.batch, length, bins)
        yield self._normal(self.batch, 64, bins)
        yield self._normal(self.batch, 16000)
        yield self._normal(self.batch, 1, 24000)
        yield self._normal(self.batch, 2, 4000)

    def decoder_input_values(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, 8, self._number("num_mel_bins", default=80))

    def spectrogram(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, 20, self._number("model_in_dim", "num_mel_bins", default=80))

    def attention_mask(self) -> Iterator[Tensor]:
        yield torch.ones(self.batch, self.features + 4 if self.features else LENGTH, dtype=torch.long)

    def mask_of_features(self) -> Iterator[Tensor]:
        features = next(self.input_features())
        yield torch.ones(self.batch, features.shape[-1], dtype=torch.long)
        yield torch.ones(self.batch, features.shape[1], dtype=torch.long)

    def mm_token_type_ids(self) -> Iterator[Tensor]:
        ids = next(_Inputs(self.model, self.features).input_ids())
        yield (ids == self._of("image_token_id", "image_token_index", default=-1)).int()

    def bbox(self) -> Iterator[Tensor]:
        corners = torch.randint(0, 60, (self.batch, LENGTH, 2), generator=self.generator)
        boxes = torch.cat([corners, corners + 5], dim=-1)
        yield boxes
        yield boxes.float() / 100

    def past_values(self) -> Iterator[Tensor]:
        context = self._number("context_length", default=32)
        lags = self._of("lags_sequence", default=[0])
        length = context + max(lags) if isinstance(lags, (list, tuple)) and lags else context
        channels = self._number("num_input_channels", "input_size", default=1)
        yield self._normal(self.batch, length)
        yield self._normal(self.batch, length, channels)
        yield self._normal(self.batch, 64)

    def past_time_features(self) -> Iterator[Tensor]:
        length = next(self.past_values()).shape[1]
        yield self._normal(self.batch, length, self._number("num_time_features", default=0))

    def past_observed_mask(self) -> Iterator[Tensor]:
        yield torch.ones_like(next(self.past_values()))

    def future_values(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, self._number("prediction_length", default=8))

    def future_time_features(self) -> Iterator[Tensor]:
        features = self._number("num_time_features", default=0)
        yield self._normal(self.batch, self._number("prediction_length", default=8), features)

    def zeros(self) -> Iterator[Tensor]:
        yield torch.zeros(self.batch, LENGTH, dtype=torch.long)

    def freq(self) -> Iterator[Tensor]:
        yield torch.zeros(self.batch, 1, dtype=torch.long)

    def past_values_padding(self) -> Iterator[Tensor]:
        yield torch.zeros(next(self.past_values()).shape)

    def states(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, LENGTH, self._number("state_dim", default=17))

    def actions(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, LENGTH, self._number("act_dim", default=4))

    def rewards(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, LENGTH, 1)

    def timesteps(self) -> Iterator[Tensor]:
        yield torch.arange(LENGTH).repeat(self.batch, 1)

    def query_embeds(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, 8, self._number("hidden_size", default=64))

    def encoder_hidden_states(self) -> Iterator[Tensor]:
        width = self._number("encoder_hidden_size", "cross_attention_hidden_size", "hidden_size", default=64)
        yield self._normal(self.batch, 8, width)

    def visual_feats(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, 6, self._number("visual_feat_dim", default=64))

    def visual_pos(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, 6, self._number("visual_pos_dim", default=4))

    def visual_embeds(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, 6, self._number("visual_embedding_dim", default=64))

    def flattened_patches(self) -> Iterator[Tensor]:
        patches = self._normal(self.batch, 16, 2 + 3 * self._patch() ** 2)
        patches[..., :2] = torch.tensor([[row, column] for row in range(1, 5) for column in range(1, 5)])
        yield patches

    def pixel_position_ids(self) -> Iterator[Tensor]:
        yield torch.tensor([[[row, column] for row in range(4) for column in range(4)]] * self.batch)

    def aspect_ratio_ids(self) -> Iterator[Tensor]:
        yield torch.ones(self.batch, 1, dtype=torch.long)

    def aspect_ratio_mask(self) -> Iterator[Tensor]:
        yield torch.ones(self.batch, 1, self._number("max_num_tiles", default=1), dtype=torch.long)

    def prompt_pixel_values(self) -> Iterator[Tensor]:
        size = self._number("image_size", default=64)
        yield self._normal(self.batch, 3, size, size)

    def patch_images(self) -> Iterator[Tensor]:
        yield next(self.prompt_pixel_values())

    def input_points(self) -> Iterator[Tensor]:
        size = self._number("image_size", default=64, like="vision")
        yield torch.rand(self.batch, 1, 2, 2, generator=self.generator) * size

    def xpath_tags(self) -> Iterator[Tensor]:
        yield torch.randint(
            0, 5, (self.batch, LENGTH, self._number("max_depth", default=50)), generator=self.generator
        )

    def audio_codes(self) -> Iterator[Tensor]:
        books = self._number("num_quantizers", "num_codebooks", default=4)
        yield torch.randint(0, 16, (self.batch, books, LENGTH), generator=self.generator)

    def latents(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, LENGTH, self._number("hidden_size", "latent_dim", default=64))
        yield self._normal(self.batch, self._number("hidden_size", "latent_dim", default=64), LENGTH)

    def inputs(self) -> Iterator[Tensor]:
        yield self._normal(self.batch, LENGTH, self._number("d_model", default=64))


_MAKERS: dict[str, Callable[[_Inputs], Iterator[Tensor]]] = {
    "input_ids": _Inputs.input_ids,
    "decoder_input_ids": _Inputs.decoder_input_ids,
    "pixel_values": _Inputs.pixel_values,
    "image": _Inputs.prompt_pixel_values,
    "image_pixel_values": _Inputs.pixel_values,
    "pixel_values_videos": _Inputs.pixel_values_videos,
    "grid_thw": _Inputs.grid_thw,
    "image_grid_thw": _Inputs.grid_thw,
    "image_grid_hw": _Inputs.image_grid_hw,
    "hidden_states": _Inputs.hidden_states,
    "image_sizes": _Inputs.image_sizes,
    "spatial_shapes": _Inputs.spatial_shapes,
    "pixel_attention_mask": _Inputs.pixel_attention_mask,
    "input_features": _Inputs.input_features,
    "input_features_mask": _Inputs.mask_of_features,
    "feature_attention_mask": _Inputs.mask_of_features,
    "audio_mel": _Inputs.input_features,
    "audio_mel_mask": _Inputs.mask_of_features,
    "input_values": _Inputs.input_values,
    "decoder_input_values": _Inputs.decoder_input_values,
    "spectrogram": _Inputs.spectrogram,
    "attention_mask": _Inputs.attention_mask,
    "mm_token_type_ids": _Inputs.mm_token_type_ids,
    "moe_mm_token_type_ids": _Inputs.mm_token_type_ids,
    "bbox": _Inputs.bbox,
    "past_values": _Inputs.past_values,
    "past_time_features": _Inputs.past_time_features,
    "past_observed_mask": _Inputs.past_observed_mask,
    "past_values_padding": _Inputs.past_values_padding,
    "future_values": _Inputs.future_values,
    "future_time_features": _Inputs.future_time_features,
    "freq": _Inputs.freq,
    "states": _Inputs.states,
    "actions": _Inputs.actions,
    "rewards": _Inputs.rewards,
    "returns_to_go": _Inputs.rewards,
    "timesteps": _Inputs.timesteps,
    "query_embeds": _Inputs.query_embeds,
    "encoder_hidden_states": _Inputs.encoder_hidden_states,
    "visual_feats": _Inputs.visual_feats,
    "visual_pos": _Inputs.visual_pos,
    "visual_embeds": _Inputs.visual_embeds,
    "flattened_patches": _Inputs.flattened_patches,
    "pixel_position_ids": _Inputs.pixel_position_ids,
    "image_position_ids": _Inputs.pixel_position_ids,
    "aspect_ratio_ids": _Inputs.aspect_ratio_ids,
    "aspect_ratio_mask": _Inputs.aspect_ratio_mask,
    "prompt_pixel_values": _Inputs.prompt_pixel_values,
    "prompt_masks": _Inputs.prompt_pixel_values,
    "high_res_pixel_values": _Inputs.pixel_values,
    "input_points": _Inputs.input_points,
    "xpath_tags_seq": _Inputs.xpath_tags,
    "xpath_subs_seq": _Inputs.xpath_tags,
    "qformer_input_ids": _Inputs.input_ids,
    "input_shape_ids": _Inputs.zeros,
    "input_pronunciation_ids": _Inputs.zeros,
    "task_inputs": _Inputs.input_ids,
    "audio_codes": _Inputs.audio_codes,
    "latents": _Inputs.latents,
    "inputs": _Inputs.inputs,
}
_MAIN = (
    "input_ids", "pixel_values", "image_pixel_values", "pixel_values_videos", "input_features", "input_values",
    "decoder_input_ids", "flattened_patches", "past_values", "bbox", "image", "states",
)  # fmt: skip
_TEXT = (
    "input_ids",
    "decoder_input_ids",
    "bbox",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "qformer_input_ids",
)
_COMPANIONS = {
    "pixel_values": (
        "image_grid_thw", "image_grid_hw", "image_sizes", "spatial_shapes", "pixel_attention_mask",
        "image_position_ids", "pixel_position_ids", "aspect_ratio_ids", "aspect_ratio_mask",
    ),
    "image_pixel_values": ("image_sizes",),
    "input_features": ("input_features_mask", "feature_attention_mask"),
    "input_values": (),
    "pixel_values_videos": (),
    "flattened_patches": (),
    "image": (),
    "visual_feats": ("visual_pos",),
    "visual_embeds": (),
}  # fmt: skip
"""What a forward takes beside text, with what goes along."""
_ONLY_IF_NEEDED = frozenset(
    ("attention_mask", "encoder_hidden_states", "hidden_states", "query_embeds", "inputs")
)
_COUNTS = re.compile(r"tokens:?\s*(?:tensor\()?(\d+)\)?,?\s*(?:and\s*)?features:?\s*(?:tensor\()?(\d+)")
MOST_TRIES, FEW_TRIES, SMALL = 60, 3, 4_000_000


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def inputs_that_run(
    model: PreTrainedModel, run: Callable[[PreTrainedModel, dict[str, Any]], Any], whole: bool = False
) -> dict[str, Any]:
    """The first of the candidates with which `run(model, inputs)` raises nothing.

    Args:
        whole: not with text alone, where the model takes more.

    Raises:
        CannotRun: there is none; says what the likeliest one raised.
    """
    first = ""
    small = sum(p.numel() for p in model.parameters()) < SMALL
    for names in _sets_of_arguments(model, whole):
        for inputs in itertools.islice(_candidates(model, names), MOST_TRIES if small else FEW_TRIES):
            for _ in range(3):  # the message of one try may say how many image tokens there should be
                try:
                    run(model, inputs)
                    return inputs
                except Exception as problem:
                    first = first or f"{type(problem).__name__}: {problem}"
                    features = _features_wanted(str(problem), model)
                    if not features or "input_ids" not in inputs:
                        break
                    inputs = next(iter(_candidates(model, names, features, inputs)))
    raise CannotRun(first or "none of its arguments is known")


def _features_wanted(message: str, model: PreTrainedModel) -> int:
    """How many image or audio tokens an error message asks for; 0 where it does not."""
    counts = _COUNTS.search(message)
    if counts is None:
        return 0
    tokens, features = int(counts[1]), int(counts[2])
    if tokens == features:  # it counts elements
        features //= model.config.get_text_config().hidden_size
    return features if features <= 2048 else 0


def _sets_of_arguments(model: PreTrainedModel, whole: bool) -> list[list[str]]:
    """Which arguments to give: all that are known, then fewer."""
    parameters = inspect.signature(model.forward).parameters
    known = [name for name in parameters if name in _MAKERS]
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    unknown = [name for name in required if name not in _MAKERS]
    if unknown:
        raise CannotRun(f"no rule for its argument {unknown[0]!r}")
    main = model.main_input_name
    mains = [name for name in ([main] if isinstance(main, str) else main) if name in known]
    optional = [name for name in known if name not in required and name not in _ONLY_IF_NEEDED]
    text = [name for name in _TEXT if name in optional]
    sets = [[*required, *optional], [*required, *(name for name in optional if name in _MAIN)]]
    for modality, companions in _COMPANIONS.items():
        if modality in known:
            beside = [name for name in companions if name in known]
            sets += [
                [*required, *text, modality, *beside],
                [*required, *text, modality],
                [*required, modality, *beside],
            ]
    sets += [
        [*required, *mains, *text],
        [*required, *mains],
        required,
        [*required, *mains, *(name for name in known if name in _ONLY_IF_NEEDED)],
    ]
    unique: list[list[str]] = []
    more_than_text = any(name in known for name in _COMPANIONS)
    for names in ([name for name in known if name in chosen] for chosen in sets):
        enough = not (whole and more_than_text) or any(name in _COMPANIONS for name in names)
        if names and names not in unique and enough:
            unique.append(names)
    return unique


def _candidates(
    model: PreTrainedModel, names: list[str], features: int = 0, like: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Every combination of what the arguments may be, up to a number.

    Args:
        features: how many image or audio tokens the text shall have.
        like: inputs whose other arguments are kept.
    """
    makers = {name: list(_MAKERS[name](_Inputs(model, features))) for name in names}
    if like is not None:
        of_text = ("input_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "attention_mask")
        makers = {name: made if name in of_text else [like[name]] for name, made in makers.items()}
    for combination in itertools.product(*makers.values()):
        yield dict(zip(names, combination, strict=True))


def model_classes(model_type: str) -> list[str]:
    """Names of the classes that transformers' Auto mappings have for a model type, the base model first."""
    from transformers.models.auto import modeling_auto

    first = (
        "MODEL_MAPPING_NAMES",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    )
    mappings = [
        *first,
        *(
            n
            for n in dir(modeling_auto)
            if n.endswith("_MAPPING_NAMES") and n not in (*first, "CONFIG_MAPPING_NAMES")
        ),
    ]
    found: list[str] = []
    for mapping in mappings:
        names = getattr(modeling_auto, mapping).get(model_type, ())
        found += [names] if isinstance(names, str) else list(names)
    return [name for name in dict.fromkeys(found) if getattr(transformers, name, None) is not None]
