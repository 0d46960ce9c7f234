"""Other quantization libraries, as a user of transformers asks for them."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    HqqConfig,
    QuantoConfig,
    TorchAoConfig,
)

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.modules import FloatView


def _torchao(**more: Any) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), **more)


def _torchao_int8_activations() -> TorchAoConfig:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def _torchao_embeddings() -> TorchAoConfig:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis

    rows = IntxWeightOnlyConfig(torch.int8, PerAxis(0))
    kinds = FqnToConfig({"_default": Int8WeightOnlyConfig(), "model.embed_tokens": rows})
    return TorchAoConfig(kinds, include_input_output_embeddings=True)


def _torchao_experts() -> TorchAoConfig:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    int8 = Int8WeightOnlyConfig()
    return TorchAoConfig(FqnToConfig({"_default": int8, r"re:.*experts\.(gate_up|down)_proj": int8}))


def _compressed_tensors() -> CompressedTensorsConfig:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights}
    return CompressedTensorsConfig(config_groups={"group_0": group}, ignore=["lm_head"])


@dataclass(frozen=True)
class Peer:
    """A library and its configs; where one of its own for a purpose is None, that for int8 is all there is."""

    package: str
    int8: Callable[[], Any]
    embeddings: Callable[[], Any] | None = None
    experts: Callable[[], Any] | None = None
    int8_activations: Callable[[], Any] | None = None
    fewer_bits: Callable[[], Any] | None = None

    def skip_if_missing(self) -> None:
        """Skip the running test where the library is not installed."""
        try:
            found = importlib.util.find_spec(self.package)
        except ModuleNotFoundError:  # of the package that it is a part of
            found = None
        if found is None:
            pytest.skip(f"{self.package} is not installed (make test-peers)")


PEERS = {
    "mono_quant_hf": Peer(
        "mono_quant_hf",
        MonoQuantConfig,
        embeddings=lambda: MonoQuantConfig(quantize_embeddings=True),
        int8_activations=lambda: MonoQuantConfig(activations="int8"),
    ),
    "bitsandbytes": Peer(
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_8bit=True),
        fewer_bits=lambda: BitsAndBytesConfig(load_in_4bit=True),
    ),
    "torchao": Peer(
        "torchao",
        _torchao,
        embeddings=_torchao_embeddings,
        experts=_torchao_experts,
        int8_activations=_torchao_int8_activations,
    ),
    "optimum-quanto": Peer(
        "optimum.quanto",
        lambda: QuantoConfig(weights="int8"),
        int8_activations=lambda: QuantoConfig(weights="int8", activations="int8"),
        fewer_bits=lambda: QuantoConfig(weights="int4"),
    ),
    "HQQ": Peer("transformers", lambda: HqqConfig(nbits=8, group_size=64)),
    "compressed-tensors": Peer("compressed_tensors", _compressed_tensors),
}


def stored_bytes(tensor: torch.Tensor) -> int:
    """What a tensor takes, also one that is made of others; of a quantized weight, the codes."""
    if isinstance(tensor, FloatView):
        return stored_bytes(tensor.stored)
    if type(tensor) is not nn.Parameter and hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def bytes_per_value(linear: Any) -> float:
    """Of the weight of a Linear, whatever class it has become."""
    return stored_bytes(linear.weight) / (linear.in_features * linear.out_features)


def int8_linears(model: nn.Module) -> set[str]:
    """Names of the Linears whose weight takes a byte a value, and a scale for each row of 32 values or more."""
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    return {name for name, linear in linears.items() if bytes_per_value(linear) < 1.3}
