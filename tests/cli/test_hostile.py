"""Files of strangers: every command ends with one sentence that names the file, whatever is in it."""

import json
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.cli.main import main
from mono_quant_hf.hub import export
from tests.evaluation.conftest import make_llama, make_tokenizer

INDEX = "model.safetensors.index.json"
CASES = int(os.environ.get("MONO_QUANT_FUZZ_CASES", "300"))
"""Of the fuzzer; more find more."""

COMMANDS = {
    "inspect": ["inspect", "{int8}"],
    "inspect a float model": ["inspect", "{float}"],
    "inspect --float": ["inspect", "{sound}/int8", "--float", "{float}"],
    "verify": ["verify", "{int8}"],
    "verify --float": ["verify", "{sound}/int8", "--float", "{float}"],
    "evaluate": ["evaluate", "{float}", "{int8}", "--max-tokens", "32"],
    "search": ["search", "{float}", "--max-size", "1GB", "--max-tokens", "32", "--save", "{new}"],
    "quantize": ["quantize", "{float}", "{new}"],
    "quantize --calibration": ["quantize", "{float}", "{new}", "--calibration", "self", "--samples", "1"],
    "quantize compressed-tensors": ["quantize", "{compressed}", "{new}"],
    "export": ["export", "{int8}", "{new}", "--format", "bitsandbytes"],
    "export to GGUF": ["export", "{int8}", "{new}.gguf", "--format", "gguf"],
    "push": ["push", "{int8}", "me/model"],
    "estimate": ["estimate", "{float}"],
}
"""With the folders that are hostile in braces; what is sound is in {sound}."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Sound models in shards: float, int8, and int8 in the format of compressed-tensors."""
    folder = tmp_path_factory.mktemp("sound")
    model = make_llama()
    model.save_pretrained(folder / "float", max_shard_size="20kB")
    quantized = quantize_model(model, MonoQuantConfig(symmetric=True))
    quantized.save_pretrained(folder / "int8", max_shard_size="10kB")
    export(quantized, folder / "compressed", "compressed-tensors", max_shard_size="10kB")
    for name in ("float", "int8", "compressed"):
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def hostile(sound, tmp_path):
    """Copies of the folders, made hostile by `edit`, and a command run on them: its exit code and what it said."""

    def run(command, edit, capsys):
        for name in ("float", "int8", "compressed"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(sound / name, tmp_path / name)
            edit(tmp_path / name)
        new = tmp_path / "new"
        shutil.rmtree(new, ignore_errors=True)
        new.with_suffix(".gguf").unlink(missing_ok=True)
        folders = {name: str(tmp_path / name) for name in ("float", "int8", "compressed", "new")}
        capsys.readouterr()
        code = main([part.format(sound=sound, **folders) for part in COMMANDS[command]])
        captured = capsys.readouterr()
        assert code in (0, 1, 2), captured.err
        for printed in (captured.out, captured.err):
            assert all(c.isprintable() or c in "\n\r\t" for c in re.sub(r"\x1b\[A", "", printed)), printed
        errors = [line for line in captured.err.splitlines() if line.startswith("mono-quant-hf: error: ")]
        assert len(errors) == (code == 2), captured.err
        assert "Traceback" not in captured.err
        if code == 2:
            assert not new.exists() and not new.with_suffix(".gguf").exists() and len(errors[0]) < 2000
        return code, errors[0] if errors else captured.out

    return run


def written(file, content):
    def edit(folder):
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def changed(file, **fields):
    """The fields of a JSON file set; those that are `...` taken away."""

    def edit(folder):
        if (folder / file).is_file():
            content = json.loads((folder / file).read_text())
            content |= fields
            content = {key: value for key, value in content.items() if value is not ...}
            (folder / file).write_text(json.dumps(content))

    return edit


def settings(**fields):
    def edit(folder):
        content = json.loads((folder / "config.json").read_text())
        if "quantization_config" in content:
            content["quantization_config"] |= fields
            (folder / "config.json").write_text(json.dumps(content))

    return edit


def index(change):
    def edit(folder):
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def renamed(new):
    """A tensor that no model needs, under another name."""

    def edit(folder):
        file = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(file)
        tensors[new] = torch.ones(2)
        save_file(tensors, file, {"format": "pt"})

    return edit


def stray(name):
    def edit(folder):
        shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / name)

    return edit


def outside(folder):
    shutil.move(sorted(folder.glob("*.safetensors"))[0], folder.parent / "outside.safetensors")
    first = sorted(json.loads((folder / INDEX).read_text())["weight_map"].values())[0]
    index(lambda names: names.update({k: "../outside.safetensors" for k, v in names.items() if v == first}))(
        folder
    )


def without_a_word_of_it(folder):
    changed("config.json", quantization_config=..., compression_config=...)(folder)


ALL = frozenset(COMMANDS)
INT8 = frozenset(["inspect", "verify", "evaluate", "export", "export to GGUF", "push"])
OURS_AND_COMPRESSED = INT8 | {"quantize compressed-tensors"}
COMPRESSED = frozenset(["quantize compressed-tensors"])
NOT_PARSED = frozenset(["inspect --float", "verify --float"])
"""What of the float model they read is its weights alone."""
TEXT = frozenset(["evaluate", "search"])
MODEL = ALL - {"inspect --float"}

DEEP = "[" * 100_000 + "]" * 100_000
NESTED = '{"a": ' * 500 + "1" + "}" * 500
JUNK = {
    "empty": "",
    "half": '{"a": ',
    "a list": "[]",
    "a word": '"word"',
    "null": "null",
    "deep": DEEP,
    "nested": NESTED,
    "twice": '{"a": 1, "a": 2}',
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "BOM": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "a long number": '{"a": ' + "9" * 5000 + "}",
    "NUL": b"\0" * 10,
}
HOSTILE = {
    **{
        f"config.json: {name}": (written("config.json", junk), MODEL, "config.json")
        for name, junk in JUNK.items()
    },
    **{f"index: {name}": (written(INDEX, junk), MODEL, INDEX) for name, junk in JUNK.items()},
    **{
        f"tokenizer_config.json: {name}": (
            written("tokenizer_config.json", JUNK[name]),
            TEXT,
            "tokenizer_config.json",
        )
        for name in ("half", "a list", "deep", "no UTF-8")
    },
    "tokenizer.json": (written("tokenizer.json", '{"model": 1}'), TEXT, "AutoTokenizer"),
    "architectures: a class that is no model": (
        changed("config.json", architectures=["RagRetriever"]),
        ...,
        "no model",
    ),
    "architectures: a function": (
        changed("config.json", architectures=["pipeline"]),
        ...,
        "config.json names pipeline",
    ),
    "architectures: Trainer": (
        changed("config.json", architectures=["Trainer"]),
        ...,
        "config.json names Trainer",
    ),
    "architectures: a dunder": (
        changed("config.json", architectures=["__file__"]),
        ...,
        "config.json names __file__",
    ),
    "architectures: the base": (
        changed("config.json", architectures=["PreTrainedModel"]),
        ...,
        "config.json names",
    ),
    "architectures: another model's": (
        changed("config.json", architectures=["BertModel"]),
        ...,
        "config.json names Bert",
    ),
    "architectures: an escape": (
        changed("config.json", architectures=["a\x1b[31m\n"]),
        ...,
        r"names a\x1b[31m\n",
    ),
    "architectures: null": (changed("config.json", architectures=None), ..., "config.json names no class"),
    "architectures: []": (changed("config.json", architectures=[]), ..., "config.json names no class"),
    "architectures: missing": (changed("config.json", architectures=...), ..., "config.json names no class"),
    "architectures: a number": (changed("config.json", architectures=3), ..., "config.json"),
    "architectures: numbers": (changed("config.json", architectures=[3]), ..., "config.json"),
    "model_type": (changed("config.json", model_type="no such"), ..., "config.json"),
    "model_type: a list": (changed("config.json", model_type=[]), ..., "config.json"),
    "remote code": (
        changed("config.json", model_type="x", auto_map={"AutoConfig": "a.B"}),
        ...,
        "config.json",
    ),
    "hidden_size: a word": (changed("config.json", hidden_size="big"), ..., "config.json"),
    "hidden_size: NaN": (changed("config.json", hidden_size=float("nan")), ..., "config.json"),
    "hidden_size: 10^40": (changed("config.json", hidden_size=10**40), ..., "config.json"),
    "hidden_size: -1": (changed("config.json", hidden_size=-1), ..., "config.json"),
    "heads: 0": (changed("config.json", num_attention_heads=0), ..., "config.json"),
    "rope_parameters": (changed("config.json", rope_parameters=[1]), ..., "config.json"),
    "quantization_config: a word": (
        changed("config.json", quantization_config="int8"),
        ...,
        "config.json has a quant",
    ),
    "quantization_config: empty": (
        changed("config.json", quantization_config={}),
        ...,
        "config.json has a quant",
    ),
    "quant_method: a list": (settings(quant_method=[]), OURS_AND_COMPRESSED, "config.json has a quant"),
    "codes without a word of it": (
        without_a_word_of_it,
        OURS_AND_COMPRESSED,
        "holds int8 codes|that its config.json asks for|is float, not quantized|is not quantized; name",
    ),
    "weights": (settings(weights="int7\x1b"), INT8, r"config.json: MonoQuantConfig: weights='int7\x1b'"),
    "an unknown field": (settings(evil="\u202e"), INT8, "config.json: MonoQuantConfig has no field 'evil'"),
    "overrides": (settings(module_overrides=[1]), INT8, "config.json: MonoQuantConfig: module_overrides"),
    "a pattern": (settings(modules_to_not_convert=["(a{999}){9999}"]), INT8, "config.json: MonoQuantConfig"),
    "config_groups: a list": (settings(config_groups=[1]), COMPRESSED, "config.json has no config_groups"),
    "config_groups: null": (settings(config_groups=None), COMPRESSED, "config.json has no config_groups"),
    "config_groups: words": (
        settings(config_groups={"a": "b"}),
        COMPRESSED,
        "config.json has no config_groups",
    ),
    "weights: a list": (
        settings(config_groups={"a": {"weights": [1]}}),
        COMPRESSED,
        "config.json has no config_groups",
    ),
    "weight_map: a list": (changed(INDEX, weight_map=[]), MODEL, INDEX),
    "weight_map: numbers": (
        index(lambda names: names.update({"a": 1})),
        MODEL,
        f"{INDEX} says that a is in 1",
    ),
    "weight_map: a way out": (
        outside,
        MODEL,
        "'../outside.safetensors', which is no safetensors file beside it",
    ),
    "weight_map: /": (
        index(lambda names: names.update(a="/etc/a.safetensors")),
        MODEL,
        "'/etc/a.safetensors', which is",
    ),
    "weight_map: ..": (
        index(lambda names: names.update(a="..")),
        MODEL,
        "which is no safetensors file beside it",
    ),
    "weight_map: a pickle": (index(lambda names: names.update(a="config.json")), MODEL, "config.json"),
    "weight_map: a file that is missing": (
        index(lambda names: names.update(a="b.safetensors")),
        MODEL,
        "b.safetensors",
    ),
    "weight_map: an escape": (
        index(lambda names: names.update({"a\x1b[31m": "b"})),
        MODEL,
        r"names the tensor 'a\x1b[31m'",
    ),
    "a tensor's name: an escape": (
        renamed("a\x1b]0;title\x07\n\u202e"),
        ALL,
        r"named 'a\x1b]0;title\x07\n\u202e'",
    ),
    "a header": (
        lambda folder: sorted(folder.glob("*.safetensors"))[0].write_bytes(b"\xff" * 99),
        ALL,
        ".safetensors",
    ),
    "a name of a file": (stray("a\x1b[31m\n.safetensors"), frozenset(["verify"]), r"a\x1b[31m\n.safetensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_every_command_names_the_file(case, hostile, capsys):
    edit, commands, said = HOSTILE[case]
    commands = ALL - NOT_PARSED if commands is ... else commands
    for command in sorted(commands):
        code, answer = hostile(command, edit, capsys)
        assert code == 2 or (command == "verify" and code == 1), (command, answer)
        assert any(part in answer for part in said.split("|")), (command, answer)


@pytest.mark.parametrize("case", ["tokenizer_config.json: deep", "tokenizer.json", "a name of a file"])
def test_what_a_command_does_not_read_does_not_matter(case, hostile, capsys):
    edit, _, _ = HOSTILE[case]
    assert hostile("inspect", edit, capsys)[0] == 0


def test_sound_folders_are_fine(hostile, capsys):
    for command in COMMANDS:
        code, answer = hostile(command, lambda folder: None, capsys)
        assert code == 2 * (command == "push"), answer  # there is no network


VALUES: list[object] = [
    *(
        None,
        True,
        0,
        -1,
        1,
        3,
        10**12,
        10**40,
        0.5,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "a",
        "float32",
        "int8",
    ),
    *(
        "\x1b[31m\n",
        "\u202e",
        "../x",
        "/etc/passwd",
        "<script>",
        [],
        [1],
        ["a"],
        [[]],
        {},
        {"a": 1},
        {"a": {"b": []}},
    ),
]


def mutated(content, rng):
    """A JSON object with one value, anywhere in it, replaced, taken away, doubled or moved."""
    content = json.loads(json.dumps(content))
    places = []

    def walk(item):
        for key in item if isinstance(item, dict) else range(len(item)):
            # More layers than memory are refused by no library.
            if key not in ("num_hidden_layers", "checksums"):
                places.append((item, key))
                if isinstance(item[key], (dict, list)):
                    walk(item[key])

    walk(content)
    item, key = rng.choice(places)
    what = rng.choice(["replace", "replace", "replace", "remove", "swap", "nest"])
    if what == "replace":
        item[key] = rng.choice(VALUES)
    elif what == "remove":
        del item[key]
    elif what == "swap":
        other, at = rng.choice(places)
        item[key] = json.loads(json.dumps(other[at]))
    else:
        item[key] = [item[key]] if rng.random() < 0.5 else {"a": item[key]}
    return json.dumps(content)


def mutate_tensors(file, rng):
    """A tensor of a file retyped, reshaped, emptied, renamed, doubled or taken away; or a file cut or scribbled on."""
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    what = rng.randrange(9)
    if what == 0:
        dtype = rng.choice(
            [torch.int8, torch.float16, torch.int32, torch.float8_e4m3fn, torch.bool, torch.uint16]
        )
        tensors[name] = tensor.float().to(dtype)
    elif what == 1:
        tensors[name] = tensor.flatten()
    elif what == 2:
        tensors[name] = tensor[:0]
    elif what == 3:
        tensors[name] = torch.full_like(
            tensor, rng.choice([0, -1, float("nan")]) if tensor.is_floating_point() else 0
        )
    elif what == 4:
        tensors[
            rng.choice([name + "_scale", name + "_packed", name.upper(), "model." + name, "\x1b" + name])
        ] = tensor
    elif what == 5:
        tensors |= {name: tensor, rng.choice([name + "_zero_point", name + "_shape"]): tensor.clone()}
    if what < 7:
        save_file(tensors, file, {"format": "pt"})
    elif what == 7:
        file.write_bytes(file.read_bytes()[: rng.randrange(1, 2000)])
    else:
        content = bytearray(file.read_bytes())
        for _ in range(3):
            content[rng.randrange(min(len(content), 1500))] = rng.randrange(256)
        file.write_bytes(content)


@pytest.mark.parametrize("part", range(10))
def test_fuzz(part, hostile, capsys, caplog):
    """Mutations of every JSON file of a model: the exit code is 0, 1 or 2, and an error is one line."""
    rng = random.Random(part)
    quick = [name for name in COMMANDS if name not in ("evaluate", "search", "quantize --calibration")]
    for _ in range(max(1, CASES // 10)):
        command = rng.choice(quick if rng.random() < 0.97 else list(COMMANDS))
        name = rng.choice(
            ["config.json"] * 5 + [INDEX, "tokenizer_config.json", "generation_config.json", None, None]
        )
        seed, as_text = rng.random(), rng.random() < 0.2

        def edit(folder, name=name, seed=seed, as_text=as_text):
            own = random.Random(seed)
            if name is None:
                mutate_tensors(own.choice(sorted(folder.glob("*.safetensors"))), own)
                return
            file = folder / name
            if not file.is_file():
                return
            text = file.read_text()
            if as_text:
                at = own.randrange(len(text))
                text = (
                    text[:at] + own.choice(['"', "{", "[", "]", "}", ",", "1", "\x1b", ""]) + text[at + 1 :]
                )
            else:
                text = mutated(json.loads(text), own)
            file.write_text(text)

        hostile(command, edit, capsys)
