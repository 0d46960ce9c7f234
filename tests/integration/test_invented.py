"""A transformers model that no list can hold, with a Linear, convolutions and experts of its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.modules import QuantizedModule

from .measure import dequantized_by_hand, outputs, relative_error

X = {"x": torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))}


class OrchardConfig(PreTrainedConfig):
    model_type = "orchard"

    def __init__(self, width=16, branches=4, **kwargs):
        self.width, self.branches = width, branches
        super().__init__(**kwargs)


class Branches(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.grow = nn.Parameter(torch.empty(config.branches, config.width * 2, config.width))
        self.prune = nn.Parameter(torch.empty(config.branches, config.width * 2, config.width))
        self.prune_bias = nn.Parameter(torch.empty(config.branches, config.width))

    def forward(self, x, branch):
        y = torch.zeros_like(x)
        for i in branch.unique():
            rows = branch == i
            y[rows] = torch.tanh(F.linear(x[rows], self.grow[i])) @ self.prune[i] + self.prune_bias[i]
        return y


class Orchard(PreTrainedModel):
    config_class = OrchardConfig
    base_model_prefix = "orchard"
    main_input_name = "x"

    def __init__(self, config):
        super().__init__(config)
        self.soil = nn.Conv1d(8, config.width, 3, padding=1)
        self.trunk = nn.Linear(config.width, config.width)
        self.branches = Branches(config)
        self.crown = nn.ConvTranspose1d(config.width, config.width, 2, stride=2)
        self.fruit = nn.Linear(config.width, 3)
        self.post_init()

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x, return_dict=None):
        x = self.trunk(self.soil(x).mT)
        flat = x.reshape(-1, x.shape[-1])
        branch = torch.arange(len(flat)) % self.config.branches
        x = x + self.branches(flat, branch).reshape(x.shape)
        return {"fruit": self.fruit(self.crown(x.mT).mT)}


def make():
    torch.manual_seed(0)
    return Orchard(OrchardConfig()).eval()


@pytest.mark.parametrize(
    ("weights", "symmetric"),
    [("int8", False), ("int8", True), ("float16", True)],
    ids=["asym", "sym", "fp16"],
)
def test_it_is_handled_by_the_same_mechanism(tmp_path, weights, symmetric):
    model = make()
    model.save_pretrained(tmp_path / "float")
    config = MonoQuantConfig(weights=weights, symmetric=symmetric)
    quantized = Orchard.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    classes = [type(quantized.get_submodule(name)).__name__ for name in ("soil", "trunk", "crown")]
    assert classes == ["QuantizedConv1d", "QuantizedLinear", "QuantizedConvTranspose1d"]
    assert isinstance(quantized.branches, QuantizedModule) and isinstance(quantized.branches, Branches)
    assert set(quantized.branches.weight_axes) == {"grow", "prune"}
    decisions = quantized.hf_quantizer.decisions
    assert {d.module for d in decisions if not d.quantized} == set()
    found = outputs(quantized, X)
    assert relative_error(outputs(dequantized_by_hand(model, decisions), X), found) < 1e-3
    assert relative_error(outputs(model, X), found) < 0.05
    quantized.save_pretrained(tmp_path / "quantized", max_shard_size="2KB")
    again = Orchard.from_pretrained(tmp_path / "quantized").eval()
    assert torch.equal(outputs(again, X)[0], found[0])
    in_memory = quantize_model(make(), config)
    assert torch.equal(outputs(in_memory, X)[0], found[0])
    restored = again.dequantize()
    assert type(restored.branches) is Branches
    assert relative_error(outputs(restored, X), found) < 1e-3


def test_on_disk(tmp_path):
    make().save_pretrained(tmp_path / "float")
    expected = outputs(Orchard.from_pretrained(tmp_path / "float", quantization_config=MonoQuantConfig()), X)
    device_map = {"soil": "cpu", "trunk": "cpu", "branches": "disk", "crown": "disk", "fruit": "cpu"}
    for step, kwargs in enumerate(({"quantization_config": MonoQuantConfig()}, {})):
        source = tmp_path / ("quantized" if step else "float")
        model = Orchard.from_pretrained(
            source, device_map=dict(device_map), offload_folder=tmp_path / f"offload{step}", **kwargs
        )
        assert torch.equal(outputs(model, X)[0], expected[0])
        if not step:
            model.save_pretrained(tmp_path / "quantized")
