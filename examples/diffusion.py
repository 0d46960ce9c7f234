"""Load a diffusers pipeline with its UNet or transformer quantized, save it, load it again and run it.

    python examples/diffusion.py                      # a tiny pipeline with random weights, to see that it works
    python examples/diffusion.py org/model pipe-int8  # a pipeline of your own: a folder, or a name on the Hub

Needs `pip install diffusers`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, PipelineQuantizationConfig, UNet2DModel

from mono_quant_hf import MonoQuantConfig


def tiny_pipeline() -> DiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet=unet.eval(), scheduler=DDIMScheduler())


def megabytes(model: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", nargs="?", help="folder or Hub name; a tiny random pipeline if left out")
    parser.add_argument("destination", nargs="?", type=Path, help="folder to write the pipeline to")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        source = options.pipeline or Path(scratch) / "float"
        if not options.pipeline:
            tiny_pipeline().save_pretrained(source)
        folder = options.destination or Path(scratch) / "int8"
        before = DiffusionPipeline.from_pretrained(source)
        name = "unet" if hasattr(before, "unet") else "transformer"
        size = megabytes(getattr(before, name))
        del before

        how = PipelineQuantizationConfig(quant_mapping={name: MonoQuantConfig()})
        pipe = DiffusionPipeline.from_pretrained(source, quantization_config=how)
        print(f"{name}: {size:.1f} MB in float, {megabytes(getattr(pipe, name)):.1f} MB quantized")
        pipe.save_pretrained(folder)
        pipe = DiffusionPipeline.from_pretrained(folder)  # quantized, as it was saved
    if not options.pipeline:
        image = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
        print(f"the pipeline made an image of {image.width} x {image.height} pixels")


if __name__ == "__main__":
    main()
