"""Mixtures of experts between checkpoint and model: merged while loading, split again only when saved as float."""

import pytest
import torch
from safetensors import safe_open

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.modules import QuantizedModule

from .families import FAMILIES
from .measure import outputs, relative_error

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
    experts = [
        module
        for module in model.modules()
        if isinstance(module, QuantizedModule) and "down_proj" in module.weight_axes
    ]
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


def test_on_disk_they_are_what_they_are_in_the_model(tmp_path):
    family = next(family for family in MODELS if family.name == "Qwen3-MoE")
    quantized(family, tmp_path).save_pretrained(tmp_path / "quantized")
    tensors = stored(tmp_path / "quantized")
    for projection, shape in (("gate_up_proj", (4, 64, 64)), ("down_proj", (4, 64, 32))):
        name = f"model.layers.1.mlp.experts.{projection}"
        assert (tensors[f"{name}_int8"].dtype, tuple(tensors[f"{name}_int8"].shape)) == (torch.int8, shape)
        assert tuple(tensors[f"{name}_scale"].shape) == (*shape[:2], 1)
        assert tuple(tensors[f"{name}_zero_point"].shape) == (*shape[:2], 1)
    assert not [name for name in tensors if ".experts.0." in name]


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
    expected, tolerance = outputs(reference, family.inputs), 1e-4 if dtype == torch.float32 else 0.02
    assert relative_error(expected, outputs(model, family.inputs)) < tolerance
    assert model.hf_quantizer.is_compileable
    model.set_experts_implementation("batched_mm")
    assert relative_error(expected, outputs(model, family.inputs)) < tolerance


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
    kinds = [isinstance(m, QuantizedModule) for name, m in model.named_modules() if name.endswith(".experts")]
    assert kinds.count(False) == 1
