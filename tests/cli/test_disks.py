"""Disks without room: said before the work where it can be known, else one sentence, and the old is still there."""

import re
import shutil
import subprocess
from collections import namedtuple

import pytest
from transformers import PreTrainedModel

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.cli.main import main
from tests import tiny_models
from tests.hub.test_export import byte_level_tokenizer

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_models.llama().save_pretrained(folder / "float")
    byte_level_tokenizer().save_pretrained(folder / "float")
    symmetric = quantize_model(tiny_models.llama(), MonoQuantConfig(symmetric=True))
    symmetric.save_pretrained(folder / "int8")
    return folder


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, which holds an older checkpoint and has 20 KB left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        quantize_model(tiny_models.llama(layers=1)).save_pretrained(disk / "old")
        with (disk / "filling").open("wb") as file:
            file.write(bytes(max(0, shutil.disk_usage(disk).free - 20_000)))
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


COMMANDS = {
    "quantize": ["quantize", "{}/float", "{disk}/old", "--overwrite"],
    "calibrate": ["quantize", "{}/float", "{disk}/new", "--calibration", "data-free"],
    "resume": [
        *["quantize", "{}/float", "{tmp}/new", "--calibration", "self", "--samples", "2", "--length", "4"],
        *["--resume", "{disk}/kept"],
    ],
    "search": ["search", "{}/float", "--max-size", "1GB", "--max-tokens", "64", "--save", "{disk}/new"],
    "compressed-tensors": [
        "export",
        "{}/int8",
        "{disk}/old",
        "--format",
        "compressed-tensors",
        "--overwrite",
    ],
    "bitsandbytes": ["export", "{}/int8", "{disk}/new", "--format", "bitsandbytes"],
    "gguf": ["export", "{}/int8", "{disk}/new.gguf", "--format", "gguf"],
    "evaluate": ["evaluate", "{}/float", "{}/int8", "--max-tokens", "400", "--reference", "{disk}/kept"],
    "inspect": ["inspect", "{}/int8", "--html", "{disk}/report.html", "--json", "{disk}/report.json"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_sentence_and_destroys_nothing(
    command, models, disk, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**18, 0, 10**18))  # it fills up meanwhile
    arguments = [argument.format(models, disk=disk, tmp=tmp_path) for argument in COMMANDS[command]]
    old = {file.name: file.read_bytes() for file in (disk / "old").iterdir()}
    assert main(arguments) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("mono-quant-hf: error: ") and "the disk is full" in last
    assert {file.name: file.read_bytes() for file in (disk / "old").iterdir()} == old
    # what a later run can go on from is kept, each file of it whole
    assert {path.name for path in disk.iterdir()} - {"kept", "report.json"} == {"old", "filling"}
    assert {path.name for path in tmp_path.iterdir()} == {"disk"}
    if (disk / "kept").exists():
        assert not [path for path in (disk / "kept").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "command", ["quantize", "calibrate", "search", "compressed-tensors", "evaluate", "resume"]
)
def test_a_disk_that_is_too_small_is_refused_before_the_work(
    command, models, disk, tmp_path, monkeypatch, capfd
):
    arguments = [argument.format(models, disk=disk, tmp=tmp_path) for argument in COMMANDS[command]]
    if command in ("quantize", "calibrate", "search"):
        monkeypatch.setattr(
            PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the work was begun")
        )
    assert main(arguments) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.search(r" needs 0\.0 GB in .*, where 0\.0 GB are free: (make room|give)", last), last
    assert {path.name for path in disk.iterdir()} - {"kept"} == {"old", "filling"}
