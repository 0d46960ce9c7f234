"""Modules whose weight's dtype the model's own code reads: found by the source, kept in float, and right for it."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Swinv2Config, Swinv2Model

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.integration.weight_readers import modules_whose_weight_is_read, reads_in_source

from .families import FAMILIES
from .measure import dequantized_by_hand, outputs, relative_error

BY_NAME = {family.name: family for family in FAMILIES}
READERS = {
    "CLIP": ("vision_model.embeddings.patch_embedding", "CLIPVisionEmbeddings.forward"),
    "SigLIP": ("vision_model.embeddings.patch_embedding", "SiglipVisionEmbeddings.forward"),
    "ViT": ("vit.embeddings.patch_embeddings.projection", "ViTModel.forward"),
    "Qwen2.5-VL": ("model.visual.patch_embed.proj", "Qwen2_5_VisionPatchEmbed.forward"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vision_tower_sees_the_image_and_not_its_int8_cast(name, dtype):
    family, (reader, method) = BY_NAME[name], READERS[name]
    model = family.make().to(dtype)
    expected = outputs(model, {key: _cast(x, dtype) for key, x in family.inputs.items()})
    twin = family.make().to(dtype)
    quantize_model(twin)
    decisions = {d.module: d for d in twin.hf_quantizer.decisions}
    assert decisions[reader].reason == f"{method} reads the dtype of its weight"
    assert twin.get_submodule(reader).weight.dtype == dtype
    found = outputs(twin, {key: _cast(x, dtype) for key, x in family.inputs.items()})
    # An image cast to int8 is off by 47 % (CLIP) and 57 % (SigLIP).
    assert relative_error(expected, found) < (0.05 if dtype == torch.float32 else 0.1)


def _cast(x, dtype):
    return x.to(dtype) if x.is_floating_point() else x


def test_a_table_made_while_loading_has_the_dtype_of_the_module_it_is_for(tmp_path):
    """Swin v2 casts its coordinates to the dtype of an MLP's first parameter: int8 would leave their whole numbers."""
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    model = Swinv2Model(Swinv2Config(**sizes, window_size=4)).eval()
    model.save_pretrained(tmp_path)
    quantized = Swinv2Model.from_pretrained(tmp_path, quantization_config=MonoQuantConfig())
    tables = dict(model.named_buffers())
    assert tables and all(torch.equal(table, tables[name]) for name, table in quantized.named_buffers())
    (reason,) = {d.reason for d in quantized.hf_quantizer.decisions if "position_bias_mlp.0" in d.module}
    assert reason == "Swinv2SelfAttention.create_coords_table_and_index reads the dtype of its weight"


def test_t5_takes_care_of_int8_itself_but_not_of_float16():
    model = BY_NAME["T5"].make()
    wo = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert wo not in modules_whose_weight_is_read(model, "int8")
    assert "wo" in "".join(modules_whose_weight_is_read(model, "float16"))
    quantize_model(model)
    decisions = {d.module: d for d in model.hf_quantizer.decisions}
    assert not decisions[wo].quantized
    by_hand = dequantized_by_hand(BY_NAME["T5"].make(), list(decisions.values()))
    inputs = BY_NAME["T5"].inputs
    assert relative_error(outputs(by_hand, inputs), outputs(model, inputs)) < 1e-3


def test_quantized_all_the_same_it_is_an_error_and_no_garbage():
    """What keeps a reader in float is a reading of sources; where there are none, the module itself refuses."""
    from mono_quant_hf.modules import quantize_conv2d_module

    model = BY_NAME["CLIP"].make()
    embeddings = model.vision_model.embeddings
    embeddings.patch_embedding = quantize_conv2d_module(embeddings.patch_embedding)
    with pytest.raises(TypeError, match=r"dtype int8.*modules_to_not_convert"):
        outputs(model, BY_NAME["CLIP"].inputs)


def test_every_reader_of_the_installed_transformers_is_found():
    scan = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "weight_dtype_readers.py"))
    places = [place for path in scan["modeling_files"]() for place in scan["places_in"](path)]
    assert len({place.file for place in places}) > 80
    assert [place for place in places if not place.found] == []


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(4, 8, 3)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 2)})
        self.called = nn.Linear(8, 8)
        self.measured = nn.Linear(8, 8)
        self.tower = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
        self.names = nn.Sequential(nn.Embedding(4, 8))

    def forward(self, x):
        stem = self.stem
        x = stem(x.to(stem.weight.dtype)).mT
        for layer in self.layers:
            x = nn.functional.linear(x, layer.weight)
        x = self.called(x.to(self.measured.weight.device))
        x = self.tower(x.to(next(self.tower.parameters()).dtype))
        x = x.to(next(self.called.parameters()).device, next(self.names.parameters()).dtype)
        return self.heads["a"](x.to(self.heads["a"].weight.dtype))


def test_reads_through_local_names_loops_and_indices_of_an_invented_class():
    found = modules_whose_weight_is_read(nn.Sequential(Reader()), "int8")
    assert found == {
        "0.stem": "Reader.forward reads the dtype of its weight",
        "0.layers.0": "Reader.forward reads its weight",
        "0.layers.1": "Reader.forward reads its weight",
        "0.heads.a": "Reader.forward reads the dtype of its weight",
        "0.tower.0.0": "Reader.forward reads the dtype of its weight",
    }
    model, x = nn.Sequential(Reader()), torch.randn(2, 4, 9)
    expected = model(x)
    quantize_model(model, MonoQuantConfig(quantize_embeddings=True))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.05)


def test_reads_in_source_name_class_and_line():
    source = "class A:\n    def f(self, x):\n        return x.to(self.b.weight.dtype)\n"
    ((name, (read,)),) = reads_in_source(source).items()
    assert (name, read.line, read.path, read.reads_dtype, read.handles_int8) == ("A", 3, ("b",), True, False)
