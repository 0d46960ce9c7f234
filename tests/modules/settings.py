"""What the tests of every module have in common."""

import copy
import pickle

import pytest
import torch

from mono_quant_hf.core import dequantize_codes, quantize_to_codes

SETTINGS = pytest.mark.parametrize(
    ("weights", "symmetric"),
    [("int8", False), ("int8", True), ("float16", True)],
    ids=["asym", "sym", "fp16"],
)
SURVIVALS = pytest.mark.parametrize(
    "survive",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half().float(),
        lambda m: m.double(),
        lambda m: m.to(device="cpu", dtype=torch.float16),
        lambda m: m.train().eval().requires_grad_(False),
    ],
    ids=["deepcopy", "pickle", "bfloat16", "half-float", "double", "device and dtype", "modes"],
)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
COMPUTE = pytest.mark.parametrize(
    "compute", list(TOLERANCES), ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def by_hand(weight, weights, symmetric, axis):
    """The weight that the codes of core stand for, in float64."""
    weight = weight.detach()
    if weights == "float16":
        return weight.half().double()
    return dequantize_codes(*quantize_to_codes(weight, symmetric, axis), dtype=torch.float64)


def float_twin(module, axes, weights, symmetric):
    """The float64 module whose weights are those that the codes stand for: what the quantized one must compute."""
    twin = copy.deepcopy(module).double()
    for name, axis in axes.items():
        getattr(twin, name).data = by_hand(getattr(module, name), weights, symmetric, axis)
    return twin


def check_storage_survives(quantized, survivor, before):
    for name in quantized.storage_names():
        tensor = survivor.state_dict()[name]
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    assert survivor.quantization == quantized.quantization
    assert type(survivor) is type(quantized)
