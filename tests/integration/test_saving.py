"""Models that are no transformers models, saved and loaded."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mono_quant_hf import MonoQuantConfig, load_quantized, quantize_model, save_quantized
from mono_quant_hf.modules import QuantizedLinear
from tests import tiny_models


class Own(nn.Module):
    """Convolution, tied layers, a buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.head = nn.Linear(8, 2)
        self.register_buffer("table", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3)) + self.table
        return self.head(self.other(self.one(x)))


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def model(config=None):
    torch.manual_seed(0)
    made = Own()
    made(X)  # batch statistics other than the initial ones
    return quantize_model(made, config).eval()


@pytest.fixture
def folder(tmp_path):
    save_quantized(model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "config",
    [
        MonoQuantConfig(),
        MonoQuantConfig(weights="float16", modules_to_not_convert=["conv"]),
        MonoQuantConfig(symmetric=True, module_overrides={"head": {"weights": "float16"}}),
    ],
)
@pytest.mark.parametrize("how", ["a class", "a model"])
def test_bit_for_bit(config, how, tmp_path):
    saved = model(config)
    save_quantized(saved, tmp_path / "model")
    loaded = load_quantized(Own if how == "a class" else Own(), tmp_path / "model")
    assert torch.equal(loaded(X), saved(X)) and not loaded.training
    assert loaded.one.weight is loaded.other.weight
    assert [repr(m) for m in loaded.modules()] == [repr(m) for m in saved.modules()]
    assert loaded.head.bias.requires_grad and not loaded.norm.running_mean.requires_grad


def three_layers():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 1))


@pytest.mark.parametrize("second", [{"activations": None}, {"weights": "float16"}, {}], ids=str)
def test_what_rounds_its_inputs_does_so_again(second, tmp_path):
    config = MonoQuantConfig(activations="int8", module_overrides={"1": second} if second else None)
    saved = quantize_model(three_layers(), config)
    save_quantized(saved, tmp_path / "model")
    loaded = load_quantized(three_layers, tmp_path / "model")
    expected = ["int8", None if second else "int8", None]
    assert [[m.quantization.activations for m in either] for either in (saved, loaded)] == [
        expected,
        expected,
    ]


def test_saving_again_gives_the_same_checksums(folder, tmp_path):
    save_quantized(load_quantized(Own, folder), tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_layers_quantized_one_by_one_are_saved_too(tmp_path):
    saved = nn.Sequential(QuantizedLinear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(saved[0].weight_scale, 0.5)
    nn.init.zeros_(saved[0].weight_int8)
    nn.init.zeros_(saved[0].weight_zero_point)
    save_quantized(saved, tmp_path / "model")
    loaded = load_quantized(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / "model")
    assert isinstance(loaded[0], QuantizedLinear) and type(loaded[1]) is nn.Linear


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda tensors: tensors["conv.weight_int8"].view(-1)[3:4].add_(1),
            r"conv\.weight_int8 in .* is not what was saved",
        ),
        (lambda tensors: tensors.pop("conv.weight_scale"), r"conv\.weight_scale is missing"),
        (lambda tensors: tensors.pop("norm.running_mean"), r"norm\.running_mean of Own is missing"),
        (lambda tensors: tensors.update(stranger=torch.ones(1)), "stranger in .* is no tensor of Own"),
        (lambda tensors: tensors.update({"head.bias": torch.ones(3)}), r"head\.bias in .* has shape \[3\]"),
        (lambda tensors: tensors["head.weight_scale"].fill_(float("nan")), "no scale"),
    ],
)
def test_damage_is_one_error_that_names_the_tensor(damage, words, folder):
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=words):
        load_quantized(Own, folder)


def test_a_missing_or_cut_file_is_named(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_quantized(Own, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_quantized(Own, folder)


def test_a_config_that_is_not_ours_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_quantized(Own, tmp_path / "nowhere")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "other"}}))
    with pytest.raises(ValueError, match="not of a model that mono_quant_hf quantized"):
        load_quantized(Own, folder)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda folder: save_quantized(Own(), folder / "new"), ValueError, "quantize it first"),
        (lambda folder: save_quantized(model(), folder), FileExistsError, "is there already"),
        (lambda folder: save_quantized(tiny_models.llama(), folder), TypeError, "save_pretrained"),
        (lambda folder: save_quantized("model", folder), TypeError, "not a str"),
        (lambda folder: load_quantized(model(), folder), ValueError, "quantized already"),
        (lambda folder: load_quantized(tiny_models.llama, folder), TypeError, "from_pretrained"),
        (lambda folder: load_quantized("model", folder), TypeError, "'model'"),
        (lambda folder: load_quantized(lambda: nn.Linear(2, 2), folder), ValueError, "no tensor of"),
    ],
)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(wrong, error, words, folder):
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=words):
        wrong(folder)
    assert sorted(folder.iterdir()) == before
