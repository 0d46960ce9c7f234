"""Mixtures of experts between checkpoint and model: merged while loading, split again while saving."""

import pytest
import torch
from safetensors import safe_open

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.modules import QuantizedExperts

from .families import FAMILIES
from .measure import outputs

MODELS = [
    family
    for family in FAMILIES
    if family.name in ("Mixtral", "Qwen3-MoE", "DeepSeek-V3", "gpt-oss", "Llama 4")
]
EACH = pytest.mark.parametrize("family", MODELS, ids=lambda family: family.name)


def quantized(family, folder, config=None, **kwargs):
    family.make().save_pretrained(folder / "float")
    return family.model_class.from_pretrained(
        folder / "float", quantization_config=config or MonoQuantConfig(), **kwargs
    ).eval()


def stored(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    ("weights", "symmetric"),
    [("int8", False), ("int8", True), ("float16", True)],
    ids=["asym", "sym", "fp16"],
)
@EACH
def test_shards_and_what_is_in_them(family, weights, symmetric, tmp_path):
    model = quantized(family, tmp_path, MonoQuantConfig(weights=weights, symmetric=symmetric))
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert experts and all(module.quantization.weights == weights for module in experts)
    model.save_pretrained(tmp_path / "quantized", max_shard_size="60KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 2
    again = family.model_class.from_pretrained(tmp_path / "quantized").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(outputs(again, family.inputs)[0], outputs(model, family.inputs)[0])
    in_memory = quantize_model(family.make(), MonoQuantConfig(weights=weights, symmetric=symmetric))
    in_memory.save_pretrained(tmp_path / "in memory")
    assert stored(tmp_path / "in memory").keys() == stored(tmp_path / "quantized").keys()


def test_on_disk_each_expert_is_a_linear_layer_with_its_scales(tmp_path):
    family = next(family for family in MODELS if family.name == "Qwen3-MoE")
    quantized(family, tmp_path).save_pretrained(tmp_path / "quantized")
    tensors = stored(tmp_path / "quantized")
    for projection, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
        for expert in range(4):
            name = f"model.layers.1.mlp.experts.{expert}.{projection}"
            assert tuple(tensors[f"{name}.weight"].shape) == shape
            assert tensors[f"{name}.weight"].dtype == torch.int8
            assert tuple(tensors[f"{name}.weight_scale"].shape) == (shape[0], 1)
            assert tuple(tensors[f"{name}.weight_zero_point"].shape) == (shape[0], 1)


@EACH
def test_on_disk_while_quantizing_and_after(family, tmp_path):
    expected = outputs(quantized(family, tmp_path), family.inputs)[0]
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    offloaded = quantized(family, tmp_path, device_map=dict(device_map), offload_folder=tmp_path / "offload")
    assert torch.equal(outputs(offloaded, family.inputs)[0], expected)
    offloaded.save_pretrained(tmp_path / "quantized")
    plain = family.model_class.from_pretrained(tmp_path / "quantized").eval()
    assert torch.equal(outputs(plain, family.inputs)[0], expected)
    again = family.model_class.from_pretrained(
        tmp_path / "quantized", device_map=dict(device_map), offload_folder=tmp_path / "offload again"
    ).eval()
    assert torch.equal(outputs(again, family.inputs)[0], expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_that_may_be_selected(implementation, dtype, tmp_path):
    family = next(family for family in MODELS if family.name == "Qwen3-MoE")
    model = quantized(family, tmp_path, experts_implementation=implementation, dtype=dtype)
    assert model.config._experts_implementation == implementation and model.dtype == dtype
    reference = quantized(family, tmp_path, dtype=dtype, experts_implementation="eager")
    assert torch.equal(outputs(model, family.inputs)[0], outputs(reference, family.inputs)[0])
    assert not model.hf_quantizer.is_compileable
    model.set_experts_implementation("batched_mm")
    assert torch.equal(outputs(model, family.inputs)[0], outputs(reference, family.inputs)[0])


@EACH
def test_dequantized_the_original_classes_are_back(family, tmp_path):
    model = quantized(family, tmp_path)
    expected = outputs(model, family.inputs)[0]
    model.dequantize()
    assert {type(m) for m in model.modules()} == {type(m) for m in family.make().modules()}
    torch.testing.assert_close(outputs(model, family.inputs)[0], expected, rtol=1e-2, atol=1e-2)
    model.save_pretrained(tmp_path / "dequantized")
    again = family.model_class.from_pretrained(tmp_path / "dequantized").eval()
    assert torch.equal(outputs(again, family.inputs)[0], outputs(model, family.inputs)[0])


@EACH
def test_overrides_reach_experts(family):
    config = MonoQuantConfig(module_overrides={"*.layers.0.*.experts": {"weights": "float"}})
    if family.name == "DeepSeek-V3":  # whose first layer is dense
        config = MonoQuantConfig(module_overrides={"*.layers.1.*.experts": {"weights": "float"}})
    model = quantize_model(family.make(), config)
    kinds = [
        isinstance(m, QuantizedExperts) for name, m in model.named_modules() if name.endswith(".experts")
    ]
    assert kinds.count(False) == 1
