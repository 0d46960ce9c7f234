"""Which files hold the weights of a folder."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mono_quant_hf.weight_files import INDEX, read_headers, weight_files


def save(folder, *names):
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.ones(2, 3)}, folder / name)


def index(folder, *names):
    weight_map = {f"t{number}": name for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_decides_then_the_usual_name_then_all(tmp_path):
    save(tmp_path, "b.safetensors", "a.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    save(tmp_path, "model.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    index(tmp_path, "b.safetensors", "b.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["b.safetensors"]


@pytest.mark.parametrize("names", [[], ["gone.safetensors"]])
def test_a_missing_file_is_named(tmp_path, names):
    if names:
        index(tmp_path, *names)
    with pytest.raises(FileNotFoundError, match=f"{names[0] if names else 'model.safetensors'} is missing"):
        weight_files(tmp_path)


def test_headers_say_where_what_and_how_large(tmp_path):
    save(tmp_path, "a.safetensors", "b.safetensors")
    found = read_headers(weight_files(tmp_path))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "t0": ("F32", (2, 3)),
        "t1": ("F32", (2, 3)),
    }
    assert found["t1"].file == str(tmp_path / "b.safetensors")
    save_file({"t0": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"t0 is both in .*a\.safetensors and in .*c\.safetensors"):
        read_headers(weight_files(tmp_path))
