"""What is written aside is there whole or not at all, whatever ends the process and wherever it stands."""

import json
import logging
import os
import subprocess
import sys

import pytest

import mono_quant_hf.files as files_module
from mono_quant_hf.files import SCRATCH, check_room, file_written_aside, folder_written_aside, scratch_folder

FILES = files_module.__file__

# In a process of its own without torch, which can fork: a child for every line of the module that is reached.
ENDED_AT_EACH_LINE = """
import importlib.util, json, os, signal, sys
from pathlib import Path

source, folder, how, exchange = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "exchange"
spec = importlib.util.spec_from_file_location("files", source)
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
if not exchange:
    files._exchanged = lambda one, other: False

def replace(lines):
    left = [lines]
    def trace(frame, event, arg):
        if frame.f_code.co_filename != source:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    with files.folder_written_aside(folder / "model", lambda _: True) as new:
        for name in ("a", "b"):
            (new / name).write_text("new")
    sys.settrace(None)

found, left_there = [], 0
for lines in range(1, 1000):
    (folder / "model").mkdir()
    for name in ("a", "b"):
        (folder / "model" / name).write_text("old")
    child = os.fork()
    if child == 0:
        try:
            replace(lines)
        except KeyboardInterrupt:
            os._exit(1)
        os._exit(0)
    done = os.waitpid(child, 0)[1] == 0
    at_once = (folder / "model").is_dir()
    left_there += len(os.listdir(folder)) > 1
    with files.scratch_folder(folder):  # the next run
        pass
    content = {file.name: file.read_text() for file in sorted((folder / "model").iterdir())}
    found.append((at_once, content, sorted(os.listdir(folder))))
    for file in (folder / "model").iterdir():
        file.unlink()
    (folder / "model").rmdir()
    if done:
        break
print(json.dumps([found, left_there]))
"""


@pytest.mark.parametrize("exchange", ["exchange", "two renames"])
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_an_end_at_any_line_leaves_the_old_or_the_new(how, exchange, tmp_path):
    command = [sys.executable, "-c", ENDED_AT_EACH_LINE, FILES, str(tmp_path), how, exchange]
    found, left = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    contents = [content for _, content, _ in found]
    assert all(set(content.items()) in ({("a", s), ("b", s)} for s in ("old", "new")) for content in contents)
    assert {"old", "new"} == {content["a"] for content in contents} and contents[-1]["a"] == "new"
    assert all(names == ["model"] for _, _, names in found)
    if how == "interrupt" or exchange == "exchange":
        assert all(at_once for at_once, _, _ in found)
    assert left > 10 if how == "kill" else left < 5


def test_only_what_nobody_holds_and_is_ours_is_removed(tmp_path):
    others = [f"{SCRATCH}notes", f"{SCRATCH}{'0' * 31}", ".other-" + "0" * 32, "mono-quant-hf-" + "0" * 32]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / f"{SCRATCH}{'1' * 32}").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{SCRATCH}{'2' * 32}").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"{SCRATCH}{'3' * 32}").mkdir()
    (tmp_path / f"{SCRATCH}{'3' * 32}" / "weights").write_text("left by a killed process")
    before = {path.name for path in tmp_path.iterdir()}
    with scratch_folder(tmp_path) as held, scratch_folder(tmp_path) as second:
        assert held.is_dir() and second.is_dir() and held != second
        script = (
            "import sys, runpy; m = runpy.run_path(sys.argv[1])\nwith m['scratch_folder'](sys.argv[2]): pass"
        )
        subprocess.run([sys.executable, "-c", script, FILES, str(tmp_path)], check=True, timeout=60)
        assert held.is_dir() and second.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == before - {f"{SCRATCH}{'3' * 32}"}


def test_what_others_put_there_meanwhile_stays_and_the_new_is_kept_beside(tmp_path):
    target = tmp_path / "model"
    with (
        pytest.raises(OSError, match=r"others wrote there.*model-1\.") as caught,
        folder_written_aside(target) as new,
    ):
        (new / "weights").write_text("hours of work")
        target.mkdir()
        (target / "thesis").write_text("years of work")
    assert "model-1" in str(caught.value)
    assert (target / "thesis").read_text() == "years of work"
    assert (tmp_path / "model-1" / "weights").read_text() == "hours of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-1"]


def test_an_error_leaves_nothing_and_no_folder_that_was_made_on_the_way(tmp_path):
    for written in (folder_written_aside, file_written_aside):
        with pytest.raises(ZeroDivisionError), written(tmp_path / "a" / "b" / "c") as new:
            (new / "half" if new.is_dir() else new).write_text("half")
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []
    with folder_written_aside(tmp_path / "a" / "b" / "c") as new:
        pass
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_file_is_replaced_whole_through_a_link_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    (tmp_path / "link").symlink_to("folder/file")
    with pytest.raises(ZeroDivisionError), file_written_aside(tmp_path / "link") as new:
        new.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "folder" / "file").read_text() == "old"
    with file_written_aside(tmp_path / "link") as new:
        new.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == "new"
    reading, writing = os.pipe()
    with file_written_aside(f"/dev/fd/{writing}") as new:
        new.write_text("through")
    assert os.read(reading, 100) == b"through"
    os.close(reading)
    os.close(writing)


def test_what_cannot_be_removed_is_said(tmp_path, monkeypatch, caplog):
    def fail(_):
        raise OSError("busy")

    monkeypatch.setattr(files_module.shutil, "rmtree", fail)
    with caplog.at_level(logging.WARNING), scratch_folder(tmp_path):
        pass
    assert "cannot be removed (busy)" in caplog.text


def test_room_is_asked_of_the_disk_that_the_folder_will_be_on(tmp_path):
    check_room(tmp_path / "not" / "there" / "yet", 1, "It")
    with pytest.raises(
        OSError, match=r"The model needs 1000000000\.0 GB in .*new, where .* are free: make room"
    ):
        check_room(tmp_path / "new", 10**18, "The model")
