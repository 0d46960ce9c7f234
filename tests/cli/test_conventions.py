"""What holds for every command: help with examples, exit codes, `--json`, and no traceback for a user's error."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from mono_quant_hf import MonoQuantConfig, hub, quantize_model
from mono_quant_hf.cli import inspect, search, verify
from mono_quant_hf.cli import main as main_module
from mono_quant_hf.cli.main import main
from tests import tiny_models
from tests.evaluation.conftest import make_llama

COMMANDS = [
    "chat",
    "compile",
    "demo",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "push",
    "quantize",
    "search",
    "verify",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_and_json(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--json [FILE]" in said
    assert f"\n  mono-quant-hf {command}" in said.partition("examples:")[2]


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_wraps_at_the_width_of_the_terminal(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        main([command, "--help"])
    prose = (
        capsys.readouterr()
        .out.partition("\n\n")[2]
        .partition("\n\npositional")[0]
        .partition("\n\noptions")[0]
    )
    assert max(map(len, prose.splitlines())) in range(width - 20, width)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "a", "b", "--symetric"], "unknown option --symetric; did you mean --symmetric?"),
        (["verify", "a", "--flaot=b"], "unknown option --flaot=b; did you mean --float?"),
        (["inspect", "a", "b"], "unexpected argument 'b'"),
        (["search", "a", "--max-size", "150"], "'150' is not a size with a unit"),
    ],
)
def test_a_wrong_option_shows_the_usage_of_its_command(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and error.startswith(f"usage: mono-quant-hf {arguments[0]} ") and said in error
    )


def test_a_size_that_nothing_fits_is_refused_at_once(models, monkeypatch, capsys):
    monkeypatch.setattr(search, "load_model", lambda *_, **__: pytest.fail("begun"))
    assert main(["search", str(models / "float"), "--max-size", "1kB"]) == 2
    assert "--max-size 0.00MB is less than" in capsys.readouterr().err


def test_every_command_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n    {command} " in said for command in COMMANDS) and "exit codes" in said


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["inspect", "{}/int8"], "modules"),
        (["evaluate", "{}/int8", "--float", "{}/float", "--max-tokens", "64"], "kl_mean"),
        (["search", "{}/float", "--max-size", "1GB", "--max-tokens", "64"], "module_overrides"),
        (["generate", "{}/float", "--prompt", "a", "--max-new-tokens", "4"], "answer"),
        (["estimate", "{}/float"], "forms"),
        (["verify", "{}/int8", "--float", "{}/float"], "flaws"),
        (["quantize", "{}/float", "{new}"], "bytes"),
        (["export", "{}/int8", "{new}", "--format", "compressed-tensors"], "destination"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_json_is_all_that_is_printed_or_goes_to_a_file(arguments, key, models, tmp_path, capsys):
    if arguments[0] == "export":
        pytest.importorskip("compressed_tensors")

    def filled(new):
        return [argument.format(models, new=tmp_path / new) for argument in arguments]

    assert main([*filled("one"), "--json"]) == 0
    assert key in json.loads(capsys.readouterr().out)
    assert main([*filled("two"), "--json", str(tmp_path / "result.json")]) == 0
    assert key in json.loads((tmp_path / "result.json").read_text())
    assert not capsys.readouterr().out.startswith("{")


def test_verify_exits_with_1_and_names_what_is_wrong(models, tmp_path, capsys):
    quantize_model(tiny_models.llama()).save_pretrained(tmp_path / "int8")
    tiny_models.llama(layers=1).save_pretrained(tmp_path / "other")
    assert main(["verify", str(tmp_path / "int8")]) == 0
    assert "Nothing is wrong." in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "int8"), "--float", str(tmp_path / "other")]) == 1
    said = capsys.readouterr().out
    assert "WRONG: model.layers.1.mlp.down_proj.weight_int8 is not in" in said


@pytest.mark.parametrize("command", ["evaluate", "inspect", "verify"])
def test_wrong_paths_are_one_line(command, models, tmp_path, capsys):
    (tmp_path / "file").write_text("no model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for path in [tmp_path / "none", tmp_path / "file", tmp_path, "no-such-org/model"]:
        assert main([command, str(path)]) == 2, path
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("mono-quant-hf: error: ") and str(path) in line
    assert main([command, str(tmp_path / "broken")]) == (1 if command == "verify" else 2)
    captured = capsys.readouterr()
    assert "config.json" in captured.out + captured.err and "Traceback" not in captured.err


def test_json_does_not_take_the_model_for_its_file(models, capsys):
    assert main(["inspect", "--json", str(models / "float"), str(models / "int8")]) == 2
    assert "is a folder with files in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/models"),
            2,
            "/models may not be read or written",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (MemoryError(), 2, "not enough memory"),
        (ConnectionError("no route"), 2, "no route"),
        (KeyError("bug"), 3, "please report"),
    ],
)
def test_exit_codes(problem, code, said, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise problem

    monkeypatch.setattr(hub, "verify_checkpoint", fail)
    assert main(["verify", "folder"]) == code
    error = capsys.readouterr().err
    assert said in error and ("Traceback" in error) == (code == 3)
    monkeypatch.setenv(main_module.TRACEBACK, "1")
    if code == 2:
        assert main(["verify", "folder"]) == 3 and "Traceback" in capsys.readouterr().err


def run(arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "mono_quant_hf", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        **options,
    )


def test_a_reader_that_has_gone_is_no_error(models):
    reading, writing = os.pipe()
    os.close(reading)
    done = run(["inspect", str(models / "int8")], stdout=writing)
    os.close(writing)
    assert done.returncode == 141 and "Broken" not in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_leaves_nothing(models, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = run(
        ["quantize", str(models / "float"), str(tmp_path / "new")], stdout=subprocess.PIPE, preexec_fn=limit
    )
    assert done.returncode == 2 and "the disk is full" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_lists_a_part_of_many_flaws(models, tmp_path, capsys):
    torch.manual_seed(1)
    LlamaForCausalLM(make_llama().config).save_pretrained(tmp_path / "other")
    listed = []
    for options in ([], ["--top", "12"], ["--top", "0"]):
        assert main(["verify", str(models / "int8"), "--float", str(tmp_path / "other"), *options]) == 1
        said = capsys.readouterr().out
        listed.append(said.count("WRONG"))
        assert ("more (--top 0 shows all)" in said) == (options != ["--top", "0"])
    assert listed[:2] == [verify.FLAWS, 12] and listed[2] > 12


def test_search_prints_a_config_that_can_be_used(models, capsys):
    main(["search", str(models / "float"), "--max-kl", "1e-9", "--max-tokens", "64"])
    _, found, config = capsys.readouterr().out.partition("MonoQuantConfig(")
    made = eval(found + config, {"MonoQuantConfig": MonoQuantConfig})
    assert made.module_overrides and config.count("\n") == len(made.module_overrides) + 2


@pytest.mark.parametrize("command", [["inspect"], ["search", "--max-kl", "1"]], ids=lambda c: c[0])
def test_a_picture_that_nothing_can_draw_is_refused_before_the_work(command, models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    module = {"inspect": inspect, "search": search}[command[0]]
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("the work was begun"))
    assert main([*command, str(models / "float"), "--png", str(tmp_path / "x.png")]) == 2
