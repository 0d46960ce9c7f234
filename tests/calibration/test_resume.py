"""What an interrupted calibration left is gone on from for the same model and samples alone, and only where whole."""

import copy
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.calibration import Compensation, Sampling
from mono_quant_hf.calibration.resume import fingerprint_of, load_kept, save_kept
from tests import tiny_models

SAMPLING = Sampling(samples=4, length=6)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(64, (4, 24), generator=generator),
            "attention_mask": torch.ones(4, 24).long(),
        }
        for _ in range(2)
    ]


def calibrate(folder, model=None, samples=None, config=None, **options):
    model = tiny_models.llama() if model is None else model
    return quantize_model(model, config, calibration=samples or batches(), resume_folder=folder, **options)


def codes(model):
    return {name: value for name, value in model.state_dict().items() if value.dtype == torch.int8}


def same(a, b):
    a, b = codes(a), codes(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A calibration that nothing interrupted, with the folder of another."""
    folder = tmp_path_factory.mktemp("plain")
    calibrate(folder)
    return calibrate(None), folder


@pytest.fixture
def done(plain, tmp_path):
    """A folder in which a calibration was done."""
    shutil.copytree(plain[1], tmp_path / "kept")
    return tmp_path / "kept"


def other_weight(name, index):
    model = tiny_models.llama()
    with torch.no_grad():
        model.get_parameter(name)[index] += 1e-3
    return model


def other_config():
    model = tiny_models.llama()
    model.config.rms_norm_eps = 1e-5
    return model


def other_sample(batch, key, index):
    samples = batches()
    samples[batch][key][index] += 1
    return samples


@pytest.mark.parametrize(
    "other",
    {
        "the last value of a weight": lambda: {
            "model": other_weight("model.layers.1.mlp.down_proj.weight", (-1, -1))
        },
        "an embedding": lambda: {"model": other_weight("model.embed_tokens.weight", (-1, -1))},
        "a norm": lambda: {"model": other_weight("model.norm.weight", -1)},
        "another dtype": lambda: {"model": tiny_models.llama().to(torch.float64)},
        "the config": lambda: {"model": other_config()},
        "the last token": lambda: {"samples": other_sample(-1, "input_ids", (-1, -1))},
        "a mask": lambda: {"samples": other_sample(0, "attention_mask", (-1, -1))},
        "a sample less": lambda: {"samples": batches()[:1]},
        "the order of samples": lambda: {"samples": batches()[::-1]},
        "a setting": lambda: {"compensation": Compensation(damping=0.2)},
        "zero-points": lambda: {"config": MonoQuantConfig(symmetric=True)},
        "which layers": lambda: {"config": MonoQuantConfig(modules_to_not_convert=["o_proj"])},
        "its own text": lambda: {"samples": "self", "sampling": SAMPLING},
    }.items(),
    ids=lambda item: item[0],
)
def test_another_model_or_sample_is_refused(other, done):
    before = {file.name: file.read_bytes() for file in done.iterdir()}
    with pytest.raises(
        ValueError, match=r"kept holds the calibration of another model, samples or settings: choose"
    ):
        calibrate(done, **other[1]())
    assert {name: (done / name).read_bytes() for name in before} == before


def test_the_same_model_from_elsewhere_goes_on(plain, done, tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "copied")
    model = type(tiny_models.llama()).from_pretrained(tmp_path / "copied")
    times = {file.name: file.stat().st_mtime_ns for file in done.iterdir()}
    assert same(calibrate(done, model), plain[0])
    assert {file.name: file.stat().st_mtime_ns for file in done.iterdir()} == times


def edit(change):
    def apply(path):
        tensors = load_file(path)
        change(tensors)
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        save_file(tensors, path, metadata=header["__metadata__"])

    return apply


def first(tensors):
    return min(name for name in tensors if name.endswith("weight_int8"))


def cut(path, size=-1):
    path.write_bytes(path.read_bytes()[:size])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap(path):
    path.write_bytes((path.parent / "stage-0000.safetensors").read_bytes())


MANIFEST, STAGE = "calibration.json", "stage-0001.safetensors"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (MANIFEST, lambda path: cut(path, 9)),
        (MANIFEST, lambda path: path.write_text("[]")),
        (MANIFEST, lambda path: path.write_text("{}")),
        (MANIFEST, lambda path: path.write_bytes(b"\xff")),
        (MANIFEST, lambda path: path.write_text('{"fingerprint": "0"}')),
        (MANIFEST, lambda path: path.unlink()),
        (STAGE, cut),
        (STAGE, lambda path: cut(path, 5)),
        (STAGE, lambda path: cut(path, 0)),
        (STAGE, flip),
        (STAGE, swap),
        (STAGE, edit(lambda tensors: tensors.pop(first(tensors)))),
        (STAGE, edit(lambda tensors: tensors.update({first(tensors): tensors[first(tensors)][:-1].clone()}))),
        (STAGE, edit(lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].short()}))),
        (STAGE, edit(lambda tensors: tensors.update(more=torch.zeros(1)))),
        (STAGE, lambda path: save_file(load_file(path), path)),
        ("thesis.txt", lambda path: path.write_text("mine")),
    ],
)
def test_what_is_damaged_is_refused_in_one_sentence(name, damage, plain, done):
    damage(done / name)
    before = {file.name: file.read_bytes() for file in done.iterdir()}
    with pytest.raises(ValueError, match=r"kept") as caught:
        calibrate(done)
    said = str(caught.value)
    assert "\n" not in said and ("delete" in said or "choose" in said)
    assert {file.name: file.read_bytes() for file in done.iterdir()} == before
    if damage is cut:  # the remedy that is named
        (done / name).unlink()
        assert same(calibrate(done), plain[0])


def test_a_write_that_is_killed_leaves_what_was_there(plain, done, monkeypatch):
    stages = sorted(done.glob("stage-*"))
    stages[-1].unlink()
    before = {file.name: file.read_bytes() for file in done.iterdir()}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(done)
    assert {file.name: file.read_bytes() for file in done.iterdir()} == before
    assert same(calibrate(done), plain[0]) and stages[-1].exists()


def test_the_text_that_a_model_writes_is_kept(tmp_path, monkeypatch):
    expected = calibrate(None, samples="self", sampling=SAMPLING)
    calibrate(tmp_path, samples="self", sampling=SAMPLING)
    with monkeypatch.context() as patched:
        patched.setattr(
            "mono_quant_hf.calibration.samples.write_text", lambda *_, **__: pytest.fail("written anew")
        )
        assert same(calibrate(tmp_path, samples="self", sampling=SAMPLING), expected)
    for file in tmp_path.glob("stage-*"):
        file.unlink()
    (tmp_path / "calibration.json").unlink()
    text = load_file(tmp_path / "text.safetensors")
    assert text["input_ids"].shape == (4, 6)
    with pytest.raises(ValueError, match="of another model, samples or settings"):
        calibrate(tmp_path, other_weight("model.norm.weight", 0), samples="self", sampling=SAMPLING)
    flip(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        calibrate(tmp_path, samples="self", sampling=SAMPLING)


@pytest.mark.parametrize("samples", ["self", None])
def test_a_folder_that_cannot_be_used_is_refused_before_the_work(samples, tmp_path, monkeypatch):
    tiny_models.llama().save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("mono_quant_hf.calibration.samples.write_text", lambda *_, **__: pytest.fail("begun"))
    for name, said in (("model", "holds"), ("file", "no folder")):
        with pytest.raises(ValueError, match=said):
            calibrate(tmp_path / name, samples=samples)
    assert not list((tmp_path / "model").glob("stage-*"))


def test_no_room_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and type("Usage", (), {"free": 9})
    )
    with pytest.raises(OSError, match=r"The calibration needs 0\.0 GB in .*: make room"):
        calibrate(tmp_path)
    assert not list(tmp_path.glob("stage-*"))


def test_fingerprints_tell_apart_what_is_not_the_same():
    class Scaled(nn.Linear):
        def extra_repr(self):
            return f"{self.factor}"

    one, other = Scaled(2, 2, device="meta"), Scaled(2, 2, device="meta")
    one.factor, other.factor = 1, 2
    ones = torch.ones(2, 3)
    values = [
        *(ones, ones.half(), ones.T.contiguous(), ones[:, :2], ones[0], ones.bool(), torch.tensor(1.0)),
        *(
            [ones],
            [[ones]],
            {"a": ones},
            {"b": ones},
            [],
            [[]],
            {},
            None,
            "",
            "None",
            0,
            0.0,
            False,
            b"",
            "a",
        ),
        *([1, 23], [12, 3], ["a", "bc"], ["ab", "c"], one, other, nn.ReLU(), nn.GELU()),
    ]
    assert len({fingerprint_of(value) for value in values}) == len(values)
    assert fingerprint_of(copy.deepcopy(values)) == fingerprint_of(values)
    strided = torch.arange(12).reshape(3, 4).T
    assert fingerprint_of(strided) == fingerprint_of(strided.contiguous())


def test_a_kept_file_is_read_for_the_same_fingerprint_alone(tmp_path):
    tensors = {"codes": torch.arange(6, dtype=torch.int8).reshape(3, 2).T}
    save_kept(tmp_path / "file", "a", tensors)
    expected = {"codes": (torch.int8, (2, 3))}
    assert torch.equal(load_kept(tmp_path / "file", "a", expected)["codes"], tensors["codes"])
    assert load_kept(tmp_path / "none", "a", expected) is None
    with pytest.raises(ValueError, match="of another model"):
        load_kept(tmp_path / "file", "b", expected)
