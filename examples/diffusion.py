"""Quantize the UNet or transformer of a diffusers pipeline, save it, and run the pipeline with the reloaded one.

    python examples/diffusion.py                      # a tiny pipeline with random weights, to see that it works
    python examples/diffusion.py org/model unet-int8  # a pipeline of your own: a folder, or a name on the Hub

Needs `pip install diffusers`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel

from mono_quant_hf import MonoQuantConfig, load_quantized, quantize_model, save_quantized


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
    parser.add_argument("destination", nargs="?", type=Path, help="folder to write the component to")
    options = parser.parse_args(arguments)

    pipe = DiffusionPipeline.from_pretrained(options.pipeline) if options.pipeline else tiny_pipeline()
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, name)
    before = megabytes(model)
    quantize_model(model, MonoQuantConfig())
    print(f"{name}: {before:.1f} MB in float, {megabytes(model):.1f} MB quantized")

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.destination or Path(scratch) / f"{name}-int8"
        save_quantized(model, folder)
        # The class alone: its config is in the folder. With a real pipeline:
        #   DiffusionPipeline.from_pretrained("org/model", unet=reloaded)
        reloaded = load_quantized(type(model), folder)
    setattr(pipe, name, reloaded)
    if not options.pipeline:
        image = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
        print(f"the pipeline made an image of {image.width} x {image.height} pixels")


if __name__ == "__main__":
    main()
