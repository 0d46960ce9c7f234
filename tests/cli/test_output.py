"""Where results go: never over what is of others, and whole or not at all."""

import json
import os

import pytest

from mono_quant_hf.cli.main import main


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


COMMANDS = {
    "demo": ["demo"],
    "evaluate": ["evaluate", "{}/float", "{}/int8", "--max-tokens", "64"],
    "export": ["export", "{}/int8", "{new}", "--format", "compressed-tensors"],
    "inspect": ["inspect", "{}/int8"],
    "push": ["push", "{}/int8", "me/int8"],
    "quantize": ["quantize", "{}/float", "{new}"],
    "search": ["search", "{}/float", "--max-size", "1GB", "--max-tokens", "64", "--save", "{new}"],
    "verify": ["verify", "{}/int8"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_result_overwrites_nothing_that_is_of_others(command, models, tmp_path, capsys):
    (tmp_path / "data.json").write_text('{"mine": 1}')
    (tmp_path / "link.json").symlink_to(models / "int8" / "config.json")
    arguments = [argument.format(models, new=tmp_path / "new") for argument in COMMANDS[command]]
    before = content(models) | content(tmp_path)
    taken = [
        models / "int8" / "config.json",
        models / "int8" / "model.safetensors",
        models / "float" / "config.json",
    ]
    for file in [*taken, tmp_path / "data.json", tmp_path / "link.json"]:
        assert main([*arguments, "--json", str(file)]) == 2
        assert "is there already, and no result of this program" in capsys.readouterr().err
    if "{new}" in COMMANDS[command]:
        assert main([*arguments, "--json", str(tmp_path / "new")]) == 2
        assert "which is written too" in capsys.readouterr().err
    assert content(models) | content(tmp_path) == before


def test_a_result_of_an_earlier_run_is_replaced(models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {option: tmp_path / f"result.{option}" for option in ("json", "html", "png")}
    options = [part for option, file in files.items() for part in (f"--{option}", str(file))]
    command = ["inspect", str(models / "int8"), *options]
    assert main(command) == 0
    first = {option: file.read_bytes() for option, file in files.items()}
    assert main([*command, "--float", str(models / "float")]) == 0
    assert all(file.read_bytes() != first[option] for option, file in files.items())
    # each is known by its kind and by who wrote it
    for option, file in files.items():
        file.write_bytes(first[option].replace(b"mono_quant_hf", b"somebody else"))
        assert main(command) == 2
        assert f"result.{option} is there already" in capsys.readouterr().err
        file.write_bytes(first[option])
    assert main([*command[:2], "--html", str(files["png"]), "--png", str(files["png"])]) == 2
    assert "which is written too" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files.values()}


def test_a_result_can_go_to_a_device_or_a_pipe(models):
    assert main(["verify", str(models / "int8"), "--json", os.devnull]) == 0
    reading, writing = os.pipe()
    assert main(["verify", str(models / "int8"), "--json", f"/dev/fd/{writing}"]) == 0
    assert json.loads(os.read(reading, 10**6))["checkpoint"]
    os.close(reading)
    os.close(writing)
