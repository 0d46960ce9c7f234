"""What the commands may replace, what they copy, and what they never follow or destroy."""

import importlib
import json
import logging
import os
import shutil

import pytest
import torch

from mono_quant_hf import quantize_model, save_quantized
from mono_quant_hf.cli.main import main
from mono_quant_hf.hub import HubError, export, push_to_hub
from mono_quant_hf.hub.folders import check_destination, copy_companions, is_inside
from tests import tiny_models
from tests.hub.test_export import byte_level_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_models.llama(layers=1).save_pretrained(folder / "float")
    byte_level_tokenizer().save_pretrained(folder / "float")
    quantize_model(tiny_models.llama(layers=1)).save_pretrained(folder / "int8")
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """A folder of its own with a float model, a quantized one, and documents."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder):
    """Each path in a folder with what it holds."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def with_more(here, name, content="mine"):
    (here / "int8" / name).parent.mkdir(exist_ok=True)
    (here / "int8" / name).write_text(content)
    return "int8"


def link(here, name):
    (here / "link").symlink_to(name)
    return "link"


def inside(here, name, folder):
    os.chdir(here / folder)
    return name


def around(here):
    (here / "all").mkdir()
    (here / "float").rename(here / "all" / "float")
    (here / "float").symlink_to("all/float")
    return "all"


def of_others(here):
    config = json.loads((here / "int8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    return with_more(here, "config.json", json.dumps(config))


@pytest.mark.parametrize(
    ("prepare", "said"),
    {
        "documents": (lambda here: "documents", "documents holds other files"),
        "a float model": (lambda here: (shutil.copytree("float", "other"), "other")[1], "other holds"),
        "a checkpoint of others": (of_others, "int8 holds a checkpoint of others"),
        "a broken config": (lambda here: with_more(here, "config.json", "{"), "int8 holds other files"),
        "a checkpoint and a text": (lambda here: with_more(here, "thesis.txt"), "int8 holds thesis.txt"),
        "a checkpoint and a folder": (
            lambda here: with_more(here, "data/config.json"),
            "int8 holds data/config.json",
        ),
        "a repository": (lambda here: with_more(here, ".git/HEAD"), "int8 holds .git/HEAD"),
        "a file": (lambda here: "documents/thesis.txt", "thesis.txt is a file"),
        "below a file": (lambda here: "documents/thesis.txt/int8", "thesis.txt is a file"),
        "a link to a checkpoint": (lambda here: link(here, "int8"), "link is a link"),
        "a link to documents": (lambda here: link(here, "documents"), "link is a link"),
        "a link to the source": (lambda here: link(here, "float"), "link is, or holds"),
        "a link to nothing": (lambda here: link(here, "nothing"), "link is a link"),
        "the source": (lambda here: "float", "float is, or holds"),
        "the source by another name": (lambda here: "documents/../float", "float is, or holds"),
        "what holds the source": (around, "all is, or holds"),
        "where it runs": (lambda here: inside(here, ".", "int8"), "holds the folder that this runs in"),
        "what holds where it runs": (lambda here: inside(here, "../..", "int8"), "is, or holds"),
        "a checkpoint it runs in": (
            lambda here: inside(here, "../int8", "int8"),
            "holds the folder that this runs in",
        ),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overwrite_destroys_nothing(prepare, said, here, capsys):
    destination = prepare(here)
    before = everything(here)
    assert main(["quantize", str(here / "float"), destination, "--overwrite"]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert everything(here) == before


def test_what_this_package_wrote_is_replaced(here, capsys):
    (here / "float" / "notes of the authors.txt").write_text("a companion")  # copied, so of the checkpoint
    quantize = ["quantize", "float", "--overwrite"]
    assert main([*quantize, "int8", "--symmetric"]) == 0  # what save_pretrained wrote
    assert main([*quantize, "int8"]) == 0 and (here / "int8" / "notes of the authors.txt").exists()
    assert main(["export", "int8", "ct", "--format", "compressed-tensors"]) == 0
    assert main(["export", "int8", "ct", "--format", "compressed-tensors", "--overwrite"]) == 0
    assert main([*quantize, "ct"]) == 0
    save_quantized(quantize_model(torch.nn.Sequential(torch.nn.Linear(4, 4))), here / "saved")
    assert main([*quantize, "saved"]) == 0 and main(["verify", "saved"]) == 0
    (here / "empty").mkdir()
    assert main(["quantize", "float", "empty"]) == 0
    assert {path.name for path in here.iterdir()} == {"float", "int8", "documents", "ct", "saved", "empty"}


def test_a_gguf_file_is_replaced_only_where_this_package_wrote_it(here, capsys):
    pytest.importorskip("gguf")
    command = ["export", "int8", "model.gguf", "--format", "gguf", "--overwrite"]
    assert main(command) == 0 and main(command) == 0
    for content in (b"", b"years of work", b"GGUF" + (here / "model.gguf").read_bytes()[4:900]):
        (here / "model.gguf").write_bytes(content)
        assert main(command) == 2
        assert "no GGUF file that mono_quant_hf wrote" in capsys.readouterr().err
        assert (here / "model.gguf").read_bytes() == content
    with pytest.raises(HubError, match="is read"):
        check_destination(here, source=here / "model.gguf")


def test_an_export_refuses_its_destination_before_it_loads_the_model(here, monkeypatch):
    exporter = importlib.import_module("mono_quant_hf.hub.export.exporter")
    monkeypatch.setattr(exporter, "quantized_model_of", lambda *_: pytest.fail("the model was loaded"))
    for format, name in (("bitsandbytes", "documents"), ("compressed-tensors", "int8"), ("gguf", "x.gguf")):
        if format == "gguf":
            (here / name).write_text("mine")
        with pytest.raises(HubError):
            export("int8", name, format, overwrite=True)


# Links


def test_links_are_not_followed_out_of_the_source(here, caplog):
    (here / "secret").write_text("secret")
    source = here / "float"
    (source / "modules.json").write_text(
        json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}])
    )
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").symlink_to(here / "secret")
    (source / "1_Pooling" / "own.json").write_text("{}")
    (source / "2_Dense").symlink_to(here / "documents")
    (source / "vocab.txt").symlink_to("../secret")
    (source / "loop.txt").symlink_to("loop.txt")
    (source / "nothing.txt").symlink_to("nowhere")
    (source / "same.json").symlink_to("tokenizer.json")
    os.mkfifo(source / "pipe")
    with caplog.at_level(logging.WARNING):
        assert main(["quantize", "float", "new"]) == 0
    content = everything(here / "new")
    assert not any(
        b"secret" in (value or b"") or b"years of work" in (value or b"") for value in content.values()
    )
    assert content["same.json"] == content["tokenizer.json"] and content["1_Pooling/own.json"] == b"{}"
    for name in ("1_Pooling/config.json", "2_Dense", "vocab.txt", "loop.txt", "nothing.txt", "pipe"):
        assert name not in content and f"float/{name} was not copied" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_a_model_would_save_again_is_not_read_from_elsewhere(name, here, capsys):
    secret = json.loads((here / "float" / name).read_text()) | {"password": "secret"}
    (here / "secret.json").write_text(json.dumps(secret))
    for source, command in (
        ("float", ["quantize", "float", "new"]),
        ("float", ["search", "float", "--max-size", "1GB", "--save", "new"]),
        ("int8", ["export", "int8", "new", "--format", "compressed-tensors"]),
    ):
        (here / source / name).unlink()
        (here / source / name).symlink_to("../secret.json")
        assert main(command) == 2 and not (here / "new").exists()
        assert f"{name} is a link that leads out" in capsys.readouterr().err


def test_a_push_refuses_links_that_lead_out_of_the_folder(here):
    (here / "secret").write_text("secret")
    for name, target in (
        ("vocab.txt", here / "secret"),
        ("plots", here / "documents"),
        ("model-2.safetensors", "../x"),
    ):
        (here / "int8" / name).symlink_to(target)
        with pytest.raises(HubError, match=f"{name} is a link that leads out of"):
            push_to_hub("int8", "me/int8")
        (here / "int8" / name).unlink()


def test_the_cache_of_the_hub_holds_links_that_are_followed(here):
    cache = here / "hub"
    snapshot = cache / "models--me--model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shared = cache / "blobs" / "ab" / "abcd"
    for blob in (snapshot.parents[1] / "blobs" / "own", shared):
        blob.parent.mkdir(parents=True)
        blob.write_text(f"{blob.name}")
    (snapshot.parents[1] / "blobs" / "linked").symlink_to(shared)
    other = cache / "models--me--secret" / "blobs" / "token"
    other.parent.mkdir(parents=True)
    other.write_text("secret")
    for name in ("own", "linked"):
        (snapshot / f"{name}.txt").symlink_to(f"../../blobs/{name}")
    (snapshot / "secret.txt").symlink_to(other)
    (here / "new").mkdir()
    copy_companions(snapshot, here / "new")
    assert everything(here / "new") == {"own.txt": b"own", "linked.txt": b"abcd"}
    # and nowhere else is what is called blobs any different
    (here / "model").mkdir()
    (here / "model" / "own.txt").symlink_to(shared)
    assert not is_inside(here / "model" / "own.txt", here / "model")
