"""What a checkpoint's files hold is in the page cache before it is used, and nothing waits for ever."""

import copy
import os
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.integration import read_ahead
from mono_quant_hf.integration.read_ahead import CHUNK, ReadAhead
from tests import tiny_models

pytestmark = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs preadv2, of Linux")


def in_the_cache(file, start):
    with open(file, "rb", buffering=0) as opened:
        try:
            return os.preadv(opened.fileno(), [bytearray(1)], start, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError:
            pytest.skip("this file system does not say what is in the page cache")


def put_out_of_the_cache(file):
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_the_cache(file, os.path.getsize(file) - 1):
        pytest.skip("this file system keeps every file in memory")


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def file(tmp_path):
    """Sixteen tensors of 1 MiB, "t.0" to "t.15"."""
    save_file(
        {f"t.{i}": torch.full((CHUNK,), i, dtype=torch.int8) for i in range(16)}, tmp_path / "x.safetensors"
    )
    return str(tmp_path / "x.safetensors")


@pytest.fixture
def fetched(monkeypatch):
    """The places that would be read ahead, as they come."""
    places = []
    monkeypatch.setattr(read_ahead, "_fetch", lambda descriptor, start, buffer: places.append(start))
    return places


@pytest.fixture
def used(monkeypatch):
    """The names that are said to be used, as they come."""
    names = []
    monkeypatch.setattr(ReadAhead, "reached", lambda self, name: names.append(name))
    return names


def is_running():
    return any(thread.name == "mono_quant read-ahead" for thread in threading.enumerate())


def test_the_whole_file_gets_into_the_page_cache(file):
    put_out_of_the_cache(file)
    with ReadAhead([file]):
        ends = range(CHUNK, os.path.getsize(file), CHUNK)
        assert until(lambda: all(in_the_cache(file, end) for end in ends))
        assert until(lambda: not is_running())


def test_it_stays_a_bounded_way_ahead_of_use(file, fetched, monkeypatch):
    monkeypatch.setattr(read_ahead, "LEAD", 3 * CHUNK)
    with ReadAhead([file], order=lambda name: int(name.partition(".")[2])) as ahead:
        assert until(lambda: len(fetched) == 4)  # one begins where the lead ends
        ahead.reached("another")
        assert not until(lambda: len(fetched) > 4, 0.2)
        ahead.reached("t.1")
        assert until(lambda: len(fetched) == 6)
    assert not is_running()


def test_it_ends_when_told_to(file, fetched, monkeypatch):
    monkeypatch.setattr(read_ahead, "LEAD", 0)
    with ReadAhead([file]):
        assert until(lambda: len(fetched) == 1)
    assert len(fetched) == 1
    assert not is_running()


def test_the_order_is_that_of_use(file, fetched):
    with ReadAhead([file], order=lambda name: -int(name.partition(".")[2])):
        assert until(lambda: len(fetched) == 16)
    backwards = list(fetched)
    fetched.clear()
    with ReadAhead([file]):
        assert until(lambda: len(fetched) == 16)
    assert fetched == sorted(fetched)
    assert sorted(backwards) == fetched
    assert backwards != fetched


def test_what_is_in_the_page_cache_is_not_read_again(file, monkeypatch):
    preadv, lengths = os.preadv, []

    def record(descriptor, buffers, *rest):
        lengths.append(len(buffers[0]))
        return preadv(descriptor, buffers, *rest)

    assert in_the_cache(file, 0)
    monkeypatch.setattr(os, "preadv", record)
    with ReadAhead([file]):
        assert until(lambda: len(lengths) == 16)
        assert until(lambda: not is_running())
    assert lengths == [1] * 16


def test_it_gives_up_where_nothing_is_used(file, fetched, monkeypatch):
    monkeypatch.setattr(read_ahead, "LEAD", 0)
    monkeypatch.setattr(read_ahead, "PATIENCE", 0.05)
    ReadAhead([file]).start()
    assert until(lambda: not is_running())
    assert len(fetched) == 1


def header(content):
    return len(content).to_bytes(8, "little") + content


UNREADABLE = {
    "empty": b"",
    "no header": b"\xff" * 64,
    "no JSON": header(b"\xff\xfe{"),
    "a list": header(b"[]"),
    "no offsets": header(b'{"t": {}}'),
    "offsets that are no numbers": header(b'{"t": {"data_offsets": ["a", "b"]}}'),
    "offsets past the end": header(b'{"t": {"data_offsets": [0, 99999999999999999999999]}}'),
    "offsets before the start": header(b'{"t": {"data_offsets": [-999, 0]}}'),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [*UNREADABLE, "missing"])
def test_a_file_that_it_cannot_read_ends_it_without_a_word(tmp_path, fetched, kind):
    bad = tmp_path / "bad.safetensors"
    if kind in UNREADABLE:
        bad.write_bytes(UNREADABLE[kind])
    ReadAhead([str(bad)]).start()
    assert until(lambda: not is_running())
    assert not fetched


@pytest.mark.parametrize("device_map", [None, "auto", {"model": "cpu", "lm_head": "disk"}], ids=str)
def test_loading_says_what_it_uses_and_ends_it(tmp_path, used, monkeypatch, device_map):
    tiny_models.llama().save_pretrained(tmp_path / "float", max_shard_size="20KB")
    monkeypatch.setattr(read_ahead, "LEAD", 0)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float",
        quantization_config=MonoQuantConfig(),
        device_map=device_map,
        offload_folder=tmp_path / "offload",
    )
    weights = {f"{d.module}.weight" for d in model.hf_quantizer.decisions if d.quantized}
    assert weights
    assert weights <= set(used)
    assert not is_running()
    copy.deepcopy(model)


def test_names_are_also_those_of_the_files(tmp_path, used):
    tiny_models.llama().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, quantization_config=MonoQuantConfig())
    assert {f"model.{d.module}.weight" for d in model.hf_quantizer.decisions if d.quantized} <= set(used)


def test_comparing_checksums_is_followed_too(tmp_path, used):
    quantize_model(tiny_models.llama()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sorted(used) == sorted(model.state_dict())
    assert not is_running()


def test_a_load_that_fails_leaves_nothing_running(tmp_path, monkeypatch):
    monkeypatch.setattr(read_ahead, "LEAD", 0)
    monkeypatch.setattr(read_ahead, "PATIENCE", 0.5)
    model = tiny_models.llama()
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"up_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MonoQuantConfig())
    assert until(lambda: not is_running())
