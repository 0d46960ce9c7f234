"""A damaged checkpoint loads bit for bit, or is one clear error; never something else."""

import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mono_quant_hf import MonoQuantConfig, load_quantized, quantize_model, save_quantized
from tests import tiny_models
from tests.tiny_models import logits

from .families import FAMILIES
from .measure import outputs

DAMAGES = int(os.environ.get("MONO_QUANT_DAMAGES", "400"))


@pytest.fixture(scope="module")
def model():
    return quantize_model(tiny_models.llama(layers=1))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="10KB")
    return folder


@pytest.fixture(autouse=True)
def quiet():
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("mono_quant_hf").setLevel(logging.ERROR)
    yield
    logging.getLogger("mono_quant_hf").setLevel(logging.NOTSET)
    transformers_logging.enable_progress_bar()
    transformers_logging.set_verbosity(before)


def edit(file, change):
    """Apply `change` to the tensors of a file; its metadata stays."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# Each damage: (folder, source of random choices) -> whether only values were changed, and no dtype, shape or name


def flip_a_byte(folder, draw):
    file = draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    content = bytearray(file.read_bytes())
    place = draw(st.integers(0, len(content) - 1))
    content[place] ^= draw(st.integers(1, 255))
    file.write_bytes(content)
    return place >= 8 + int.from_bytes(content[:8], "little")


def cut_a_file(folder, draw):
    file = draw(st.sampled_from(sorted(folder.iterdir())))
    content = file.read_bytes()
    file.write_bytes(content[: draw(st.integers(0, len(content) - 1))])


def remove_a_file(folder, draw):
    draw(st.sampled_from(sorted(folder.glob("*.safetensors")))).unlink()


def swap_two_files(folder, draw):
    files = sorted(folder.glob("*.safetensors"))
    one, other = draw(st.sampled_from(files)), draw(st.sampled_from(files))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def change_a_tensor(folder, draw):
    file = draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    only_values = []

    def change(tensors):
        name = draw(st.sampled_from(sorted(tensors)))
        kind = draw(st.sampled_from(["remove", "rename", "dtype", "shape", "value", "copy"]))
        tensor = tensors[name]
        if kind == "remove":
            del tensors[name]
        elif kind == "rename":
            tensors[name + draw(st.sampled_from(["x", ".weight", "_int8", "_scale"]))] = tensors.pop(name)
        elif kind == "dtype":
            dtypes = [torch.int8, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64]
            tensors[name] = tensor.to(draw(st.sampled_from(dtypes)))
        elif kind == "shape":
            shapes = [tensor.flatten(), tensor[:-1], tensor[None]] if tensor.dim() else [tensor[None]]
            tensors[name] = draw(st.sampled_from(shapes)).clone()
        elif kind == "value":
            changed = tensor.clone().flatten()
            value = draw(st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf")]))
            if changed.is_floating_point() or value in (0.0, 1.0, -1.0):
                changed[draw(st.integers(0, changed.numel() - 1))] = value
            tensors[name] = changed.reshape(tensor.shape)
        else:
            tensors[name] = tensors[draw(st.sampled_from(sorted(tensors)))].clone()
        now = tensors.get(name)
        only_values.append(now is not None and (now.dtype, now.shape) == (tensor.dtype, tensor.shape))

    edit(file, change)
    return only_values[0]


def add_a_tensor(folder, draw):
    """A companion that a weight has not, the other end of a tie, or one that no model has."""
    file = draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))

    def change(tensors):
        name = draw(st.sampled_from([name for name in sorted(tensors) if tensors[name].dim() > 0]))
        tensor, suffix = tensors[name], draw(st.sampled_from(["_zero_point", "_scale", "x"]))
        rows = (len(tensor), *[1] * (tensor.dim() - 1))
        added = {
            f"{name}{suffix}": torch.ones(rows, dtype=torch.float32 if suffix == "_scale" else torch.int8),
            "lm_head.weight": torch.ones(64, 32),
            "lm_head.weight_zero_point": torch.ones(64, 1, dtype=torch.int8),
        }
        chosen = draw(st.sampled_from([name for name in added if name not in tensors] or ["x"]))
        tensors[chosen] = added.get(chosen, torch.ones(3))

    edit(file, change)


def change_the_config(folder, draw):
    junk = st.sampled_from(
        [None, True, False, 7, -1, "int7", "float16", "int8", [], ["lm_head"], {}, {"a": 1}, 1e308]
    )
    fields = ["weights", "symmetric", "modules_to_not_convert", "module_overrides", "quantize_embeddings"]
    fields += ["format_version", "checksums", "new"]

    def change(content):
        if draw(st.integers(0, 4)):
            content["quantization_config"][draw(st.sampled_from(fields))] = draw(junk)
        else:
            content |= draw(
                st.sampled_from([{"architectures": None}, {"tie_word_embeddings": True}, {"new": 1}])
            )
            content |= draw(st.sampled_from([{}, {"tie_word_embeddings": False}]))

    edit_json(folder / "config.json", change)


def change_the_index(folder, draw):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return

    def change(content):
        names = sorted(content["weight_map"])
        name = draw(st.sampled_from(names))
        if draw(st.booleans()):
            del content["weight_map"][name]
        else:
            files = [
                *sorted(set(content["weight_map"].values())),
                "missing.safetensors",
                "../other.safetensors",
            ]
            content["weight_map"][name] = draw(st.sampled_from(files))

    edit_json(index, change)


EVERY_DAMAGE = [
    flip_a_byte,
    cut_a_file,
    remove_a_file,
    swap_two_files,
    change_a_tensor,
    change_a_tensor,
    add_a_tensor,
    change_the_config,
    change_the_index,
]


@dataclass
class Saved:
    """A checkpoint, and what it gives when it is loaded from a folder."""

    folder: Path
    load: Callable[[Path], list[Tensor]]
    expected: list[Tensor] = field(init=False)

    def __post_init__(self):
        self.expected = self.load(self.folder)


class Small(torch.nn.Module):
    """No transformers model: a convolution, a norm with buffers, and two layers that are one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        self.one, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(self.norm(self.conv(x)).mean((2, 3))))


def small_outputs(folder):
    with torch.no_grad():
        return [load_quantized(Small, folder)(tiny_models.IMAGES)]


def outputs_of(model_class, inputs, folder):
    return outputs(model_class.from_pretrained(folder), inputs)


def saved_kinds(folder):
    """Checkpoints of every kind, made one by one."""
    symmetric, half = MonoQuantConfig(symmetric=True), MonoQuantConfig(weights="float16")
    mixed = MonoQuantConfig(module_overrides={"*.v_proj": {"weights": "float16"}}, quantize_embeddings=True)
    for name, config, tied, size in (
        ("whole", None, False, "5GB"),
        ("sharded", None, False, "10KB"),
        ("tied", None, True, "5GB"),
        ("tied, quantized", MonoQuantConfig(quantize_embeddings=True), True, "10KB"),
        ("symmetric", symmetric, False, "5GB"),
        ("float16", half, False, "5GB"),
        ("mixed", mixed, False, "5GB"),
    ):
        model = quantize_model(tiny_models.llama(tied=tied, layers=1), config)
        model.save_pretrained(folder / name, max_shard_size=size)
        yield name, Saved(folder / name, partial(outputs_of, type(model), {"input_ids": tiny_models.TOKENS}))
    mixtral = next(family for family in FAMILIES if family.name == "Mixtral")
    for name, model, inputs in (
        ("conv", tiny_models.resnet(), {"pixel_values": tiny_models.IMAGES}),
        ("experts", mixtral.make(), mixtral.inputs),
    ):
        quantize_model(model).save_pretrained(folder / name)
        yield name, Saved(folder / name, partial(outputs_of, type(model), inputs))
    for name, config in (("no transformers model", None), ("no transformers model, symmetric", symmetric)):
        torch.manual_seed(0)
        save_quantized(quantize_model(Small(), config), folder / name)
        yield name, Saved(folder / name, small_outputs)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return dict(saved_kinds(tmp_path_factory.mktemp("kinds")))


def scales_are_scales(folder):
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).items()]
    return all(bool((t.isfinite() & (t > 0)).all()) for name, t in tensors if name.endswith("weight_scale"))


@pytest.mark.parametrize("checksums", [True, False], ids=["with checksums", "without checksums"])
def test_random_damage_is_an_error_or_does_no_harm(checksums, kinds, tmp_path_factory, monkeypatch):
    """With checksums always; without, values may differ that are values still."""

    def no_pickle(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(pickle, "Unpickler", no_pickle)
    monkeypatch.setattr(torch, "load", no_pickle)
    counts = Counter()

    @settings(
        max_examples=DAMAGES // 2,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=True,
        database=None,
        phases=[Phase.generate],
    )
    @given(data=st.data())
    def damage_one(data):
        saved = kinds[data.draw(st.sampled_from(sorted(kinds)))]
        folder = tmp_path_factory.mktemp("damaged") / "model"
        shutil.copytree(saved.folder, folder)
        try:
            if not checksums:
                edit_json(folder / "config.json", lambda c: c["quantization_config"].pop("checksums"))
            damage = data.draw(st.sampled_from(EVERY_DAMAGE))
            only_values = damage(folder, data.draw)
            try:
                found = saved.load(folder)
            except (ValueError, OSError, TypeError, RuntimeError) as problem:
                assert str(problem)
                counts["an error"] += 1
                return
            # The last bit of a float router's product depends on where its weight lies in memory.
            close = {"rtol": 1e-4, "atol": 1e-5} if saved.folder.name == "experts" else {"rtol": 0, "atol": 0}
            if all(torch.allclose(a, b, **close) for a, b in zip(found, saved.expected, strict=True)):
                counts["no harm"] += 1
                return
            counts["other values"] += 1
            assert not checksums and only_values and scales_are_scales(folder)
        finally:
            shutil.rmtree(folder.parent)

    damage_one()
    print(f"{'with' if checksums else 'without'} checksums: {dict(counts)}")
    assert counts["an error"] > DAMAGES // 8 and (checksums or counts["other values"])


def other_save(folder):
    """The same model with another head: every tensor has the right name, dtype and shape."""
    changed = tiny_models.llama(layers=1)
    changed.lm_head.weight.data.mul_(2)
    quantize_model(changed).save_pretrained(folder, max_shard_size="10KB")


def test_a_shard_of_another_save_is_named(sharded, tmp_path):
    other_save(tmp_path / "other")
    shutil.copytree(sharded, tmp_path / "mixed")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["lm_head.weight"]
    shutil.copy(tmp_path / "other" / shard, tmp_path / "mixed" / shard)
    with pytest.raises(ValueError, match=rf"{shard} is not what was saved with this config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_changed_bytes_name_the_file_and_the_tensor(kind, request, tmp_path):
    shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight_int8"
    for file in (tmp_path / "model").glob("*.safetensors"):
        if name in load_file(file):
            edit(file, lambda tensors: tensors[name].view(torch.uint8)[3, 4].add_(1))
            with pytest.raises(ValueError, match=rf"{name} in .*{file.name} is not what was saved"):
                AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_none_is_found_without_checksums_too(value, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.up_proj.weight_scale"
    edit(file, lambda tensors: tensors[name][5].fill_(value))
    edit_json(file.with_name("config.json"), lambda content: content["quantization_config"].pop("checksums"))
    with pytest.raises(ValueError, match=rf"{name} in .* holds values that are no scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.fixture(params=["Mixtral", "GPT-NeoX", "LLaVA", "DETR"])
def family(request, tmp_path):
    """Some of its tensors are split or renamed on their way to disk: (class, inputs, folder of floats)."""
    family = next(family for family in FAMILIES if family.name == request.param)
    family.make().save_pretrained(tmp_path / "float")
    return family.model_class, family.inputs, tmp_path / "float"


def reloads_bit_for_bit(family, folder):
    model_class, inputs, floats = family
    saved = model_class.from_pretrained(floats, quantization_config=MonoQuantConfig())
    reloaded = model_class.from_pretrained(folder)
    pairs = zip(outputs(reloaded, inputs), outputs(saved, inputs), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("offload", [False, True], ids=["in memory", "on disk"])
def test_what_is_split_or_renamed_on_disk_has_a_checksum_too(offload, family, tmp_path):
    model_class, _, floats = family
    place = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"} if offload else {}
    saved = model_class.from_pretrained(floats, quantization_config=MonoQuantConfig(), **place)
    saved.save_pretrained(tmp_path / "model")
    assert reloads_bit_for_bit(family, tmp_path / "model")

    file, own = tmp_path / "model" / "model.safetensors", saved.state_dict()
    # What is renamed on disk, if there is any; what is quantized is not split.
    names = sorted(load_file(file), key=lambda n: (n in own, not n.endswith("_int8")))
    name = next(n for n in names if load_file(file)[n].dim() > 1)
    edit(file, lambda tensors: tensors[name].flatten()[:1].add_(1))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} in .* is not what was saved"):
        model_class.from_pretrained(tmp_path / "model")
    edit(file, lambda tensors: tensors.update({f"{name}x": tensors.pop(name)}))
    with pytest.raises(
        ValueError, match=r"is missing|was not saved with this|save the quantized model again"
    ):
        model_class.from_pretrained(tmp_path / "model")


def test_saved_under_the_names_of_the_model_it_loads_too(family, tmp_path):
    model_class, _, floats = family
    saved = model_class.from_pretrained(floats, quantization_config=MonoQuantConfig())
    saved.save_pretrained(tmp_path / "model", save_original_format=False)
    assert reloads_bit_for_bit(family, tmp_path / "model")


def test_saving_twice_writes_the_same_bytes(model, whole, tmp_path):
    # A second push then uploads only what changed.
    model.save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("after", [0.0, 0.005, 0.01, 0.02, 0.04, 0.08])
def test_a_save_that_is_killed_never_leaves_a_mix_that_loads(after, model, sharded, tmp_path):
    """Saving another model over a checkpoint, killed at some moment: the old or the new one loads, or an error."""
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    other_save(tmp_path / "other")
    script = textwrap.dedent(
        f"""
        import sys
        from transformers import AutoModelForCausalLM
        import mono_quant_hf
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "other")!r})
        print("ready", flush=True)
        sys.stdin.readline()
        while True:
            model.save_pretrained({str(folder)!r}, max_shard_size="10KB")
        """
    )
    saver = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert saver.stdout is not None and saver.stdin is not None
    assert saver.stdout.readline().strip() == "ready"
    saver.stdin.write("\n")
    saver.stdin.flush()
    time.sleep(after)
    saver.send_signal(signal.SIGKILL)
    saver.wait()
    allowed = [logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "other"))]
    try:
        loaded = logits(AutoModelForCausalLM.from_pretrained(folder))
    except (ValueError, OSError, RuntimeError) as problem:
        assert str(problem)
        return
    assert any(torch.equal(loaded, expected) for expected in allowed)


@pytest.mark.parametrize("most", [100, 2_000, 6_000, 9_000])
def test_a_save_that_finds_the_disk_full_never_leaves_a_mix_that_loads(most, model, sharded, tmp_path):
    """No file may grow past `most` bytes while another model is saved over a checkpoint: config, index and shards."""
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    other_save(tmp_path / "other")
    script = textwrap.dedent(
        f"""
        import resource, signal
        from transformers import AutoModelForCausalLM
        import mono_quant_hf
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "other")!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))
        model.save_pretrained({str(folder)!r}, max_shard_size="10KB")
        """
    )
    saver = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert saver.returncode != 0 and "File too large" in saver.stderr
    try:
        loaded = logits(AutoModelForCausalLM.from_pretrained(folder))
    except (ValueError, OSError, RuntimeError) as problem:
        assert str(problem)
        return
    allowed = [model, AutoModelForCausalLM.from_pretrained(tmp_path / "other")]
    assert any(torch.equal(loaded, logits(one)) for one in allowed)


def test_a_tensor_in_two_files_or_named_twice_by_the_index(model, sharded, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    shutil.copytree(sharded, tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    other = next(file for file in places.values() if file != places[name])
    # JSON may name a key twice, and the last counts: here the right one, then the wrong one.
    for line in (f'"{name}": "{other}", "{name}": "{places[name]}"', f'"{name}": "{other}"'):
        index.write_text(index.read_text().replace(f'"{name}": "{places[name]}"', line))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model))
    edit(tmp_path / "model" / other, lambda tensors: tensors.update({name: torch.ones(88, 1)}))
    with pytest.raises(ValueError, match=rf"{name} is both in .*safetensors and in"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_the_config_saved_is_the_config_loaded_whatever_was_changed(whole):
    loaded = AutoModelForCausalLM.from_pretrained(whole)
    assert (
        loaded.hf_quantizer.quantization_config.to_dict() | {"checksums": None} == MonoQuantConfig().to_dict()
    )
