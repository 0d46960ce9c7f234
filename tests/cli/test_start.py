"""The command from its very start, in a process of its own."""

import signal
import subprocess
import sys

import pytest

from mono_quant_hf.calibration import Compensation
from mono_quant_hf.cli.main import parser
from mono_quant_hf.hub.export import FORMATS
from mono_quant_hf.names import EXPORT_FORMATS
from tests.cli.test_conventions import COMMANDS

# Ends as the installed script does, and says what was imported; or says when torch is being imported.
SCRIPT = """
import builtins, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # not so where the tests run in the background
original = builtins.__import__
def telling(name, *rest, **more):
    if name == "torch" and not hasattr(builtins, "told"):
        builtins.told = True
        print("importing", flush=True)
    return original(name, *rest, **more)
builtins.__import__ = telling
from mono_quant_hf.cli.main import main
sys.exit(main())
"""


def start(*arguments):
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=pipe, stderr=pipe, text=True)


def run(*arguments):
    process = start(*arguments)
    return *process.communicate(timeout=120), process.returncode


@pytest.mark.parametrize("arguments", [(), *((command,) for command in COMMANDS)])
def test_help_waits_for_no_import_of_torch(arguments):
    said, _, code = run(*arguments, "--help")
    assert code == 0 and said.startswith("usage:")


def test_nor_does_the_refusal_of_an_option():
    said, error, code = run("quantize", "a", "b", "--simetric")
    assert (said, code) == ("", 2) and "did you mean --symmetric?" in error


def test_an_interruption_during_the_import_is_one_line():
    process = start("verify", "./no-such-folder")
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "mono-quant-hf: interrupted\n")


def test_it_runs_the_command():
    _, said, code = run("verify", "./no-such-folder")
    assert code == 2 and "no-such-folder" in said and "Traceback" not in said


def test_a_version_that_is_refused_is_one_line():
    code = (
        "from importlib import metadata; import sys; found = metadata.version; "
        "metadata.version = lambda name: '2.7.0' if name == 'torch' else found(name); "
        "from mono_quant_hf.cli.main import main; sys.exit(main(['verify', 'model']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mono-quant-hf: error: mono_quant_hf works with torch")
    assert done.stderr.count("\n") == 1


def test_what_the_parser_knows_without_the_package_is_what_the_package_has():
    assert tuple(FORMATS) == EXPORT_FORMATS
    assert parser().parse_args(["quantize", "a", "b"]).damping == Compensation().damping
