"""Components of diffusers pipelines: quantized in memory, saved, reloaded, and run in the pipeline."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mono_quant_hf import MonoQuantConfig, load_quantized, quantize_model, save_quantized
from mono_quant_hf.modules import QuantizedConv2d, QuantizedLinear, QuantizedModule
from tests.tiny_models import relative_error

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed (pip install 'mono-quant-hf[diffusers]')"
)
CONFIGS = [MonoQuantConfig(), MonoQuantConfig(symmetric=True), MonoQuantConfig(weights="float16")]


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(16,), norm_num_groups=8, latent_channels=4, sample_size=16
    )


def unet_pipeline():
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


def transformer_pipeline():
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
        transformer=transformer.eval(), vae=vae().eval(), scheduler=diffusers.DDIMScheduler()
    )


PIPELINES = {"unet": unet_pipeline, "transformer": transformer_pipeline}


def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    labels = {"class_labels": [1, 2]} if hasattr(pipe, "transformer") else {"batch_size": 2}
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipe(**labels, num_inference_steps=2, generator=generator, output_type="np").images
    )


def dequantized_by_hand(model):
    """A float copy whose weights are (codes - zero_point) * scale, computed here."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if not isinstance(module, QuantizedModule):
            continue
        plain = module.to_float()
        if module.weights == "int8":
            zero_point = 0 if module.weight_zero_point is None else module.weight_zero_point.float()
            plain.weight.data = (module.weight.float() - zero_point) * module.weight_scale
        twin.set_submodule(name, plain)
    return twin


@pytest.mark.parametrize("config", CONFIGS, ids=["int8", "int8 symmetric", "float16"])
@pytest.mark.parametrize("component", PIPELINES)
def test_quantized_saved_and_reloaded_in_its_pipeline(component, config, tmp_path):
    pipe = PIPELINES[component]()
    float_image = image(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    model = getattr(pipe, component)
    assert quantize_model(model, config) is model
    kinds = {type(module) for module in model.modules()}
    assert QuantizedLinear in kinds
    # The convolution that the transformer begins with stays float beside float16: its dtype is the model's.
    assert (QuantizedConv2d in kinds) == (component == "unet" or config.weights == "int8")
    quantized_image = image(pipe)
    assert 0 < relative_error(quantized_image, float_image) < 0.05
    save_quantized(model, tmp_path / "component", max_shard_size="20KB")
    assert len(list((tmp_path / "component").glob("*.safetensors"))) > 1

    reloaded = load_quantized(type(model), tmp_path / "component")
    assert type(reloaded) is type(model) and reloaded.config.sample_size == model.config.sample_size
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", **{component: reloaded})
    assert torch.equal(image(again), quantized_image)

    setattr(pipe, component, dequantized_by_hand(model))
    assert relative_error(quantized_image, image(pipe)) < 1e-3


def test_a_pipeline_saved_as_a_whole_is_not_read_as_float(tmp_path):
    pipe = unet_pipeline()
    quantize_model(pipe.unet)
    expected = image(pipe)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mono_quant"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    unet = load_quantized(diffusers.UNet2DModel, tmp_path / "unet")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, unet=unet)
    assert torch.equal(image(again), expected)


def test_half_precision_keeps_the_dtype_that_the_pipeline_casts_to(tmp_path):
    transformer = transformer_pipeline().transformer.to(torch.bfloat16)
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
