"""What `verify_checkpoint` finds in sound, damaged and foreign checkpoints."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.hub import HubError, verify_checkpoint
from tests import tiny_models
from tests.hub.test_export import mixture
from tests.integration.families import FAMILIES

UP = "model.layers.0.mlp.up_proj.weight"
CODES = f"{UP}_int8"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`float`, `int8` (in shards), `symmetric` and `float16` of one model."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.llama().save_pretrained(folder / "float")
    for name, config in [
        ("int8", MonoQuantConfig()),
        ("symmetric", MonoQuantConfig(symmetric=True)),
        ("float16", MonoQuantConfig(weights="float16")),
    ]:
        size = "20KB" if name == "int8" else "1GB"
        quantize_model(tiny_models.llama(), config).save_pretrained(folder / name, max_shard_size=size)
    return folder


@pytest.fixture
def copy(folders, tmp_path):
    def copied(name):
        return shutil.copytree(folders / name, tmp_path / name)

    return copied


def edit(folder, change, name=CODES):
    """Change the tensors of the file that holds `name`."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata, names = opened.metadata(), opened.keys()
        if name in names:
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, metadata=metadata)
            return file
    raise AssertionError(name)


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["int8", "symmetric", "float16"])
def test_a_sound_checkpoint_beside_its_float_model(folders, name):
    found = verify_checkpoint(folders / name, folders / "float")
    assert found.ok and not found.flaws and not found.notes
    assert found.compared == found.tensors and (found.files > 1) == (name == "int8")
    assert len(found.weights) == 14 and {weight.rounding for weight in found.weights} == {"nearest"}
    assert found.weights[0].sqnr == min(weight.sqnr for weight in found.weights) > 30
    if name != "float16":
        assert all(0.3 < weight.steps <= 0.501 and weight.moved == 0 for weight in found.weights)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_sound(family, tmp_path):
    quantize_model(family.make()).save_pretrained(tmp_path)
    assert verify_checkpoint(tmp_path).flaws == ()


def test_calibrated_codes_are_told_and_not_wrong(folders, tmp_path):
    quantize_model(tiny_models.llama(), calibration="data-free").save_pretrained(tmp_path)
    found = verify_checkpoint(tmp_path, folders / "float")
    assert found.ok and "have calibrated rounding" in found.notes[0]
    assert any(weight.rounding == "calibrated" and 0.5 < weight.steps < 1.5 for weight in found.weights)


def test_another_float_model_is_told(folders, tmp_path):
    other = tiny_models.llama()
    with torch.no_grad():
        other.get_parameter(UP).mul_(1.5)
    other.save_pretrained(tmp_path)
    (flaw,) = verify_checkpoint(folders / "int8", tmp_path).flaws
    assert flaw.tensor == CODES and "made from another float model" in flaw.message


def put(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name])

    return change


def scale_of(value):
    def change(tensors):
        tensors[f"{UP}_scale"][3] = value

    return change


@pytest.mark.parametrize(
    ("change", "tensor", "said"),
    [
        (scale_of(float("nan")), f"{UP}_scale", "no scale"),
        (scale_of(-1.0), f"{UP}_scale", "no scale"),
        (lambda t: t.pop(f"{UP}_scale"), f"{UP}_scale", "missing"),
        (lambda t: t.pop(f"{UP}_zero_point"), f"{UP}_zero_point", "missing"),
        (put(CODES, lambda t: t[:-1].clone()), CODES, "to be I8"),
        (put(CODES, lambda t: t.to(torch.int32)), CODES, "to be I8"),
        (put(f"{UP}_scale", lambda t: t.flatten()), f"{UP}_scale", "to be F32"),
        (lambda t: t.update(stray=torch.ones(2)), "stray", "is not in model.safetensors.index.json"),
    ],
)
def test_a_damaged_tensor_is_named(copy, change, tensor, said):
    folder = copy("int8")
    edit_config(folder, lambda config: config["quantization_config"].pop("checksums"))
    file = edit(folder, change)
    found = verify_checkpoint(folder)
    flaws = {flaw.tensor: flaw for flaw in found.flaws}
    assert said in flaws[tensor].message and tensor in flaws[tensor].message
    assert str(folder) in flaws[tensor].file and (file.name in flaws[tensor].message or "missing" in said)
    assert "no checksums" in found.notes[0]


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NORM), "is missing from"),
        (put(NORM, lambda t: t[:-1].clone()), r"is F32 \[31\] where the config asks for float32 \[32\]"),
        (put(NORM, lambda t: t.to(torch.int32)), r"is I32 \[32\] where the config asks for float32"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_a_damaged_tensor_that_is_not_quantized_is_named(copy, change, said):
    folder = copy("symmetric")
    edit_config(folder, lambda config: config["quantization_config"].pop("checksums"))
    edit(folder, change)
    (flaw,) = verify_checkpoint(folder).flaws
    assert flaw.tensor == NORM and re.search(said, flaw.message)


def test_every_flaw_is_told_and_not_only_the_first(copy):
    folder = copy("int8")
    other = "model.layers.1.self_attn.q_proj.weight_int8"
    edit(folder, lambda tensors: tensors[CODES].view(torch.uint8)[0, 0].add_(1))
    edit(folder, lambda tensors: tensors[other].view(torch.uint8)[0, 0].add_(1), other)
    found = verify_checkpoint(folder)
    assert sorted(flaw.tensor for flaw in found.flaws) == [CODES, other]
    assert all("is not what was saved" in flaw.message for flaw in found.flaws)


def test_files_and_index(copy):
    folder = copy("int8")
    shards = sorted(folder.glob("*.safetensors"))
    shutil.copy(shards[0], folder / "model.safetensors")
    shards[1].unlink()
    messages = " ".join(flaw.message for flaw in verify_checkpoint(folder).flaws)
    assert f"{shards[1].name} is missing" in messages and "model.safetensors belongs to no index" in messages
    (folder / "model.safetensors.index.json").write_text("{")
    assert any("index.json is no valid JSON" in flaw.message for flaw in verify_checkpoint(folder).flaws)


def test_stray_and_truncated(copy):
    folder = copy("symmetric")
    edit(folder, lambda tensors: tensors.update({"model.layers.7.extra": torch.ones(2)}))
    (flaw,) = verify_checkpoint(folder).flaws
    assert flaw.tensor == "model.layers.7.extra" and "belongs to no part of the model" in flaw.message
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    assert "damaged" in verify_checkpoint(folder).flaws[0].message


def test_zero_points_that_the_config_does_not_want(copy):
    folder = copy("symmetric")
    zero_point = torch.ones(88, 1, dtype=torch.int8)
    edit(folder, lambda tensors: tensors.update({f"{UP}_zero_point": zero_point}))
    (flaw,) = verify_checkpoint(folder).flaws
    assert flaw.tensor == f"{UP}_zero_point" and "says symmetric" in flaw.message


def test_a_code_below_the_symmetric_range_is_a_note(copy):
    folder = copy("symmetric")
    edit(folder, lambda tensors: tensors[CODES][0].fill_(-128))
    edit_config(folder, lambda config: config["quantization_config"].pop("checksums"))
    found = verify_checkpoint(folder)
    assert found.ok and any("-128" in note and UP in note for note in found.notes)


def test_the_config(copy):
    folder = copy("int8")
    edit_config(folder, lambda config: config["quantization_config"].update(weights="int7"))
    (flaw,) = verify_checkpoint(folder).flaws
    assert "config.json" in flaw.file and "int7" in flaw.message
    edit_config(folder, lambda config: config.pop("quantization_config"))
    (flaw,) = verify_checkpoint(folder).flaws
    assert "has no quantization_config" in flaw.message
    (folder / "config.json").write_text("{")
    assert "is no valid JSON" in verify_checkpoint(folder).flaws[0].message


def test_what_cannot_be_verified(folders, tmp_path):
    for arguments, said in [
        ((folders / "float",), "is float"),
        ((tmp_path,), "no config.json"),
        (("./nothing",), "neither a folder"),
        ((folders / "int8", folders / "symmetric"), "quantized itself"),
    ]:
        with pytest.raises(HubError, match=said):
            verify_checkpoint(*arguments)


def test_codes_of_what_cannot_be_quantized_are_named(tmp_path):
    quantize_model(mixture()).save_pretrained(tmp_path)
    router = "model.layers.0.mlp.gate.weight"
    edit(
        tmp_path,
        lambda tensors: tensors.update({f"{router}_int8": tensors.pop(router).to(torch.int8)}),
        router,
    )
    flaws = {flaw.tensor: flaw for flaw in verify_checkpoint(tmp_path).flaws}
    assert "model.layers.0.mlp.gate stays in float" in flaws[f"{router}_int8"].message
    assert flaws[f"{router}_int8"].file == str(tmp_path / "model.safetensors")
