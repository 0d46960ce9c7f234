"""The command from its very start, before the package is imported."""

import signal
import subprocess
import sys
from pathlib import Path

import mono_quant_hf

LAUNCH = Path(mono_quant_hf.__file__).parent / "launch.py"
# As the installed module does, and with a word to say when the import is under way.
SCRIPT = """
import builtins, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # not so where the tests run in the background
original = builtins.__import__
def telling(name, *rest, **more):
    if name == "torch" and not hasattr(builtins, "told"):
        builtins.told = True
        print("importing", flush=True)
    return original(name, *rest, **more)
builtins.__import__ = telling
sys.exit(runpy.run_path(sys.argv.pop(1))["main"]())
"""


def start(*arguments):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SCRIPT, str(LAUNCH), *arguments]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def test_an_interruption_during_the_import_is_one_line():
    process = start("--help")
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "mono-quant-hf: interrupted\n")


def test_it_runs_the_command():
    process = start("verify", "./no-such-folder")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "no-such-folder" in said and "Traceback" not in said


def test_a_version_that_is_refused_is_one_line(tmp_path):
    package = tmp_path / "mono_quant_hf"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('torch 1.0 is too old')\n")
    run = f"sys.exit(runpy.run_path({str(LAUNCH)!r})['main']())"
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); {run}"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "mono-quant-hf: error: torch 1.0 is too old\n")
