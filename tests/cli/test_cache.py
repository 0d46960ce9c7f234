import threading
from pathlib import Path

import pytest

from mono_quant_hf.cli.cache import cache_folder, prepared


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MONO_QUANT_CACHE", str(tmp_path / "cache"))


def write(text):
    return lambda folder: (folder / "file").write_text(text)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MONO_QUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mono_quant_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "mono_quant_hf"


def test_built_once():
    folder = prepared("thing", write("first"))
    assert prepared("thing", write("second")) == folder
    assert (folder / "file").read_text() == "first"


def test_a_build_that_fails_leaves_nothing_behind():
    def build(folder):
        write("half")(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepared("thing", build)
    assert list(cache_folder().iterdir()) == []
    assert (prepared("thing", write("whole")) / "file").read_text() == "whole"


def test_two_at_once_both_get_a_whole_folder():
    both_are_building = threading.Barrier(2, timeout=30)
    folders = []

    def build(folder):
        write("whole")(folder)
        both_are_building.wait()

    threads = [threading.Thread(target=lambda: folders.append(prepared("thing", build))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache_folder() / "thing"] * 2
    assert (folders[0] / "file").read_text() == "whole"
    assert list(cache_folder().iterdir()) == [cache_folder() / "thing"]
