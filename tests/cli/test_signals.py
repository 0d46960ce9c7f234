"""Commands that are ended from outside, in processes of their own: nothing is left, or it is found by the next run."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mono_quant_hf import quantize_model
from mono_quant_hf.cli.main import Interruption, signals_raise
from mono_quant_hf.files import SCRATCH
from tests import tiny_models
from tests.hub.test_export import byte_level_tokenizer

# Minutes of work, were it not ended.
LONG = ["--calibration", "self", "--samples", "2000", "--length", "60"]


@pytest.fixture
def folder(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "float")
    byte_level_tokenizer().save_pretrained(tmp_path / "float")
    quantize_model(tiny_models.llama()).save_pretrained(tmp_path / "int8")
    (tmp_path / "tmp").mkdir()
    return tmp_path


def start(folder, *arguments, **options):
    command = [sys.executable, "-m", "mono_quant_hf", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder / "tmp")}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def restored_signals():
    """Not so where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for_scratch(folder, process):
    """Until the command has made its temporary folder in `folder`."""
    while not (found := [path for path in folder.iterdir() if path.name.startswith(SCRATCH)]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return found


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("number", "command", "where"),
    [
        (signal.SIGTERM, ["quantize", "float", "int8", "--overwrite", *LONG], "."),
        (signal.SIGINT, ["quantize", "float", "new", *LONG, "--resume", "kept"], "."),
        (signal.SIGHUP, ["evaluate", "float", "int8", "--max-tokens", "all"], "tmp"),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_a_signal_leaves_what_was_there_and_nothing_else(number, command, where, folder):
    before = content(folder / "int8")
    process = start(folder, *command, preexec_fn=restored_signals)
    wait_for_scratch(folder / where, process)
    for _ in range(3):  # as from one who is impatient
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert said.splitlines()[-1].endswith("interrupted" if number == signal.SIGINT else "terminated")
    assert "Traceback" not in said
    assert {path.name for path in folder.iterdir()} - {"kept"} == {"float", "int8", "tmp"}
    assert content(folder / "int8") == before and list((folder / "tmp").iterdir()) == []


def test_what_sigkill_leaves_is_removed_by_the_next_run(folder):
    before = content(folder / "int8")
    process = start(folder, "quantize", "float", "int8", "--overwrite", *LONG)
    (left,) = wait_for_scratch(folder, process)
    process.kill()
    process.communicate(timeout=60)
    assert left.is_dir() and content(folder / "int8") == before
    left.rename(left.with_name(SCRATCH + "0" * 32))  # so that another is waited for
    again = start(
        folder,
        *[
            "quantize",
            "float",
            "int8",
            "--overwrite",
            "--calibration",
            "self",
            "--samples",
            "64",
            "--length",
            "30",
        ],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # as nohup does
    )
    while [path.name for path in wait_for_scratch(folder, again)] == [SCRATCH + "0" * 32]:
        pass
    again.send_signal(signal.SIGHUP)  # which was ignored from the start, and stays so
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert {path.name for path in folder.iterdir()} == {"float", "int8", "tmp"}
    assert content(folder / "int8").keys() >= before.keys() and content(folder / "int8") != before


def test_a_signal_within_a_finalizer_is_not_lost():
    """Python prints what is raised there, and goes on."""

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interruption, match="SIGTERM"), signals_raise():
        Finalized()  # gone at once
        time.sleep(10)
