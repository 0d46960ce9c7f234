"""Components of diffusers pipelines: quantized in memory, saved, reloaded, and run in the pipeline."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant_hf import MonoQuantConfig, load_quantized, quantize_model, save_quantized
from mono_quant_hf.modules import QuantizedModule
from tests.tiny_models import relative_error

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install diffusers)")
CONFIGS = [MonoQuantConfig(), MonoQuantConfig(symmetric=True), MonoQuantConfig(weights="float16")]


VECTORS = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
"""What a text encoder would say of a prompt: the pipelines here have none."""


def vae(**config):
    torch.manual_seed(1)
    config = {
        "block_out_channels": (16,),
        "norm_num_groups": 8,
        "latent_channels": 4,
        "sample_size": 16,
    } | config
    return diffusers.AutoencoderKL(**config).eval()


def ddpm():
    """An unconditional pipeline around a UNet of convolutions and attention."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.DDPMPipeline(unet=unet.eval(), scheduler=diffusers.DDIMScheduler())


def stable_diffusion():
    """A UNet whose attention looks at a text."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def dit():
    """A class-conditional pipeline around a diffusion transformer."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
    )
    return diffusers.DiTPipeline(
        transformer=transformer.eval(), vae=vae(), scheduler=diffusers.DDIMScheduler()
    )


def pixart():
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=False,
    )
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer.eval(),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def flux():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        transformer=transformer.eval(),
        vae=vae(latent_channels=1, shift_factor=0.0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


MASK = torch.ones(1, 6)
PROMPT = {"prompt_embeds": VECTORS, "negative_prompt_embeds": -VECTORS}
MASKS = {"prompt_attention_mask": MASK, "negative_prompt_attention_mask": MASK}
SIZE = {"height": 8, "width": 8}
INPUTS = {
    ddpm: {"batch_size": 2},
    stable_diffusion: {**PROMPT, **SIZE},
    dit: {"class_labels": [1, 2]},
    pixart: {"negative_prompt": None, **PROMPT, **MASKS, **SIZE, "use_resolution_binning": False},
    flux: {"prompt_embeds": VECTORS, "pooled_prompt_embeds": VECTORS[:, 0], **SIZE},
}


def component_of(pipe):
    return "unet" if hasattr(pipe, "unet") else "transformer"


def image(make, pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipe(**INPUTS[make], num_inference_steps=2, generator=generator, output_type="np").images
    )


def settings(model):
    settings = json.loads(model.to_json_string())
    return {k: v for k, v in settings.items() if not k.startswith("_") and k != "quantization_config"}


def dequantized_by_hand(model):
    """A float copy whose weights are (codes - zero_point) * scale, computed here."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if not isinstance(module, QuantizedModule):
            continue
        plain = module.to_float()
        if module.quantization.weights == "int8":
            codes, scale, zero_point = module.stored()
            plain.weight.data = (codes.float() - (0 if zero_point is None else zero_point.float())) * scale
        twin.set_submodule(name, plain)
    return twin


@pytest.mark.parametrize("config", CONFIGS, ids=["int8", "int8 symmetric", "float16"])
@pytest.mark.parametrize("make", INPUTS)
def test_quantized_saved_and_reloaded_in_its_pipeline(make, config, tmp_path):
    pipe = make()
    float_image = image(make, pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    component = component_of(pipe)
    model = getattr(pipe, component)
    convolutions = any(type(module) is nn.Conv2d for module in model.modules())
    assert convolutions == (make is not flux)
    assert quantize_model(model, config) is model
    kinds = {type(module).__name__ for module in model.modules()}
    assert "QuantizedLinear" in kinds and ("QuantizedConv2d" in kinds) == convolutions
    quantized_image = image(make, pipe)
    assert 0 < relative_error(quantized_image, float_image) < 0.05
    save_quantized(model, tmp_path / "component", max_shard_size="20KB")
    assert len(list((tmp_path / "component").glob("*.safetensors"))) > 1

    reloaded = load_quantized(type(model), tmp_path / "component")
    assert type(reloaded) is type(model) and settings(reloaded) == settings(model)
    parts = {name: part for name, part in pipe.components.items() if part is None} | {component: reloaded}
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", **parts)
    assert torch.equal(image(make, again), quantized_image)

    setattr(pipe, component, dequantized_by_hand(model))
    assert relative_error(quantized_image, image(make, pipe)) < 1e-3


def load(folder, **options):
    return diffusers.DiffusionPipeline.from_pretrained(folder, **options)


def without(pipe):
    """The components that a pipeline does without, to be named when it is loaded."""
    return {name: part for name, part in pipe.components.items() if part is None}


@pytest.mark.parametrize(
    ("make", "config"),
    [*((make, MonoQuantConfig()) for make in INPUTS), (dit, MonoQuantConfig(weights="float16"))],
)
def test_diffusers_itself_quantizes_saves_and_loads(make, config, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "float", max_shard_size="20KB")
    component = component_of(pipe)
    how = diffusers.PipelineQuantizationConfig(quant_mapping={component: config})
    loaded = load(tmp_path / "float", quantization_config=how, **without(pipe))
    quantize_model(getattr(pipe, component), config)
    expected = image(make, pipe)
    assert torch.equal(image(make, loaded), expected)
    for saved, name in ((loaded, "loaded"), (pipe, "in_memory")):
        saved.save_pretrained(tmp_path / name)
        again = load(tmp_path / name, **without(pipe))
        assert torch.equal(image(make, again), expected)
    reloaded = getattr(again, component)
    assert {d.weights for d in reloaded.hf_quantizer.decisions if d.quantized} == {config.weights}
    setattr(pipe, component, reloaded.dequantize())
    assert relative_error(image(make, pipe), expected) < 1e-3
    assert not any(isinstance(module, QuantizedModule) for module in reloaded.modules())
    reloaded.save_pretrained(tmp_path / "float_again")
    again = type(reloaded).from_pretrained(tmp_path / "float_again")
    assert not hasattr(again, "hf_quantizer") and "quantization_config" not in again.config


def test_a_backend_by_name_quantizes_parts_of_both_libraries(tmp_path):
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path)
    how = diffusers.PipelineQuantizationConfig(
        quant_backend="mono_quant", quant_kwargs={"symmetric": True}, components_to_quantize=["unet"]
    )
    loaded = load(tmp_path, quantization_config=how, **without(pipe))
    assert loaded.unet.conv_in.quantization.symmetric and isinstance(loaded.vae.encoder.conv_in, nn.Conv2d)
    assert not isinstance(loaded.vae.encoder.conv_in, QuantizedModule)


def test_codes_are_those_of_the_checkpoint_whatever_the_dtype(tmp_path):
    model = dit().transformer
    model.save_pretrained(tmp_path / "float")
    load = type(model).from_pretrained
    config = MonoQuantConfig()
    loaded = load(tmp_path / "float", quantization_config=config, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    stored = {
        name: tensor for name, tensor in quantize_model(model, config).state_dict().items() if "_int8" in name
    }
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in stored.items()) and stored
    loaded.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8", torch_dtype=torch.float16)
    assert (
        again.dtype == torch.float16
        and again.transformer_blocks[0].ff.net[2].weight_scale.dtype == torch.float32
    )
    with pytest.raises(ValueError, match="without the disk"):
        load(
            tmp_path / "float",
            quantization_config=config,
            device_map={"": "disk"},
            offload_folder=tmp_path / "offload",
        )


def test_what_save_quantized_wrote_is_loaded_and_checked_by_diffusers(tmp_path):
    model = quantize_model(ddpm().unet)
    save_quantized(model, tmp_path, max_shard_size="20KB")
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 255
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not what was saved with this config\.json"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("first", ["mono_quant_hf", "diffusers.quantizers.auto"])
def test_registered_whichever_is_imported_first(first):
    code = f"""
import {first}
import mono_quant_hf, diffusers
kept = {{"unet": mono_quant_hf.MonoQuantConfig()}}
diffusers.PipelineQuantizationConfig(quant_mapping=kept)
diffusers.PipelineQuantizationConfig(quant_backend="mono_quant", quant_kwargs={{"weights": "int8"}})
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["mono_quant"].__name__ == "MonoQuantDiffusersQuantizer"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_half_precision_keeps_the_dtype_that_the_pipeline_casts_to(tmp_path):
    transformer = dit().transformer.to(torch.bfloat16)
    quantize_model(transformer)
    assert transformer.dtype == torch.bfloat16
    save_quantized(transformer, tmp_path / "component")
    reloaded = load_quantized(type(transformer), tmp_path / "component").to(torch.bfloat16)
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    inputs = {"timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}
    with torch.no_grad():
        assert torch.equal(reloaded(x, **inputs).sample, transformer(x, **inputs).sample)


def test_the_example_runs():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "examples" / "diffusion.py")],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "MB quantized" in done.stdout and "an image of 16 x 16 pixels" in done.stdout
