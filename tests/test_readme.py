"""What the READMEs say is so: their code runs, commands and links lead somewhere, the errors quoted are raised."""

import collections
import importlib
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    QuantoConfig,
    TorchAoConfig,
)

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.cli.main import parser
from mono_quant_hf.hub import export
from mono_quant_hf.modules import registry
from tests import tiny_models
from tests.evaluation.conftest import TEXT, make_llama, make_tokenizer
from tests.hub.conftest import hub  # noqa: F401
from tests.peers import PEERS, int8_linears

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(
            file
            for part in ("mono_quant_hf", "examples", "tests")
            for file in (ROOT / part).rglob("README.md")
        ),
    ]
}
EACH = pytest.mark.parametrize("document", DOCUMENTS)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
MIGRATION = re.findall(r"^\| `(\w+Config\(.*\))` \| `(MonoQuantConfig\(.*\))` \|$", README, flags=re.M)
LIBRARIES = {
    "BitsAndBytesConfig": "bitsandbytes",
    "QuantoConfig": "optimum-quanto",
    "TorchAoConfig": "torchao",
}


def blocks(document, language):
    return [code for name, code in FENCE.findall(DOCUMENTS[document]) if name == language]


def prose(document):
    """The text of a document without code and tables."""
    lines = FENCE.sub("", DOCUMENTS[document]).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("|", "[", "#")))


# ---------------------------------------------------------------- code


@pytest.fixture
def surroundings(tmp_path, monkeypatch, hub):  # noqa: F811
    """A folder with the models that the READMEs name, and the names that they take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "WEIGHT_AXES", registry.WEIGHT_AXES.copy())
    tokenizer = make_tokenizer()
    for folder, config in {"org/model": None, "model-int8": MonoQuantConfig()}.items():
        model = make_llama() if config is None else quantize_model(make_llama(), config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {
        "folder": "gguf",
        "inputs": {"input_ids": tiny_models.TOKENS % 24},
        "model": AutoModelForCausalLM.from_pretrained("model-int8"),
        "prompts": [[5, 6, 7], [8, 9]],
        "settings": GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0),
        "text": TEXT,
        "texts": [TEXT] * 8,
    }
    torch.set_num_threads(threads)


def float_model_as_gguf():
    pytest.importorskip("gguf")
    model = quantize_model(tiny_models.llama(), MonoQuantConfig(symmetric=True))
    Path("gguf").mkdir()
    export(model, "gguf/model.gguf", "gguf")


def pipeline():
    pytest.importorskip("diffusers")
    from tests.integration.test_diffusers import ddpm

    ddpm().save_pretrained("org/pipeline")


NEEDED = {
    "gguf_file": float_model_as_gguf,
    "diffusers": pipeline,
    "peft": lambda: pytest.importorskip("peft"),
}
"""A word of a block, and what has to be there before it runs."""


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if blocks(name, "python")])
@pytest.mark.filterwarnings("ignore")  # what transformers and diffusers warn of is theirs
def test_code_runs(document, surroundings):
    for code in blocks(document, "python"):
        for word, prepare in NEEDED.items():
            if word in code:
                prepare()
        exec(compile(code, document, "exec"), surroundings)


@EACH
def test_commands_are_there(document):
    """Every command in a code block, and every target of make, script and module that the text names."""
    text = DOCUMENTS[document]
    for line in "".join(blocks(document, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["mono-quant-hf"]:
            parser().parse_args(words[1:])
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M)) <= set(targets)
    for script in re.findall(r"python ([\w./]+\.py)", text) + re.findall(r"`(examples/\w+\.py)", text):
        assert (ROOT / script).is_file(), script
    for script in re.findall(r"pytest (tests/[\w./]+)", text):
        assert (ROOT / script).exists(), script


# ---------------------------------------------------------------- what is said, and where


def anchors(document):
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", DOCUMENTS[document]), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH
def test_links_lead_somewhere(document):
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "sdist"
    ]
    text = DOCUMENTS[document]
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[\w-]+\]: (\S+)$", text, flags=re.M)
    for target in links:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.relative_to(ROOT).as_posix()), target
        assert f"/{file.relative_to(ROOT).parts[0]}" in [*shipped["include"], "/README.md", "/LICENSE"], (
            target
        )


OF_OTHERS = {
    "compressed_tensors_w8a8_int8",
    "compressed_tensors_wNa16",
    "llm_int8_enable_fp32_cpu_offload",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "max_memory_percent",
    "prepare_model_for_kbit_training",
    "test_readme",
}
"""Names that are in no file but this."""


@pytest.fixture(scope="module")
def names_here():
    """All names in the code, and those of its files."""
    parts = ("mono_quant_hf", "tests", "examples", "model_cards", ".ci")
    files = [file for part in parts for file in (ROOT / part).rglob("*.py") if file != Path(__file__)]
    return {
        word
        for file in files
        for word in re.findall(r"\w+", f"{file.stem} {file.read_text(encoding='utf-8')}")
    }


@EACH
def test_names_in_the_text_are_there(document, names_here):
    code = " ".join(re.findall(r"`([^`\n]+)`", FENCE.sub("", DOCUMENTS[document])))
    assert set(re.findall(r"\b[A-Za-z]\w*_\w+", code)) - names_here <= OF_OTHERS


def test_the_picture_draws_what_the_table_says():
    figures = runpy.run_path(str(ROOT / "model_cards" / "picture.py"))
    assert {*figures["figures"]()} == {*figures["ROWS"]}
    assert figures["PICTURE"].relative_to(ROOT).as_posix() in README


def test_every_document_is_found_from_the_readme():
    linked = set(re.findall(r"([\w/]+/README\.md|CONTRIBUTING\.md)", README))
    assert {*DOCUMENTS} - {"README.md"} <= linked


def test_the_readme_is_read_to_the_end():
    assert len(README.encode()) <= 12_000


def test_nothing_is_said_twice():
    said = collections.Counter()
    for document in DOCUMENTS:
        for paragraph in re.split(r"\n\n|\n- ", prose(document)):
            said.update(
                {part for part in re.split(r"(?<=[.:?]) ", " ".join(paragraph.split())) if len(part) > 40}
            )
    assert [sentence for sentence, times in said.items() if times > 1] == []


# ---------------------------------------------------------------- troubleshooting

PHRASES = re.findall(r'^\*\*"(.*?)"', README, flags=re.M)
CAUSES = {
    "`.half()` is not supported for quantized model": lambda model: model.half(),
    "Expected no change of a quantized weight in place": lambda model: attention(model).weight.add_(1),
    "is not what was saved with this config.json": lambda model: damage("model-int8"),
    "You cannot combine Quantization and loading a model from a GGUF file": lambda model: load(
        "gguf", gguf_file="model.gguf", quantization_config=MonoQuantConfig()
    ),
}
WARNED = {
    "Unknown quantization type, got mono_quant",  # tests/test_autoload.py, in a process without the package
    "matches no module",
}


def attention(model):
    return model.model.layers[0].self_attn.q_proj


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, **more)


def damage(folder):
    file = Path(folder, "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 255
    file.write_bytes(content)
    load(folder)


def test_every_error_quoted_has_a_cause_here():
    assert {*PHRASES} == {*CAUSES} | WARNED


@pytest.mark.parametrize("phrase", CAUSES)
def test_an_error_quoted_is_raised(phrase, surroundings):
    if "GGUF" in phrase:
        float_model_as_gguf()
    with pytest.raises((ValueError, RuntimeError), match=re.escape(phrase)):
        CAUSES[phrase](surroundings["model"])


def test_what_is_said_of_patterns_that_match_nothing(surroundings, caplog):
    load("org/model", quantization_config=MonoQuantConfig(modules_to_not_convert=["q_porj"]))
    assert "matches no module" in caplog.text


def test_what_is_said_of_moving_and_of_sizes(surroundings):
    model = surroundings["model"]
    before = attention(model).weight_int8.clone(), attention(model).weight_scale.clone()
    model.to(torch.bfloat16).to("cpu")
    assert torch.equal(attention(model).weight_int8, before[0])
    assert attention(model).weight_scale.dtype == torch.float32
    assert torch.equal(attention(model).weight_scale, before[1])
    assert load("model-int8").get_memory_footprint() < make_llama().get_memory_footprint() / 2


# ---------------------------------------------------------------- coming from another library


def test_there_is_a_row_for_every_library():
    assert {theirs.partition("(")[0] for theirs, _ in MIGRATION} == {*LIBRARIES}


@pytest.mark.parametrize(("theirs", "ours"), MIGRATION, ids=[theirs for theirs, _ in MIGRATION])
def test_both_configs_quantize_the_same_modules(theirs, ours, tmp_path):
    library = LIBRARIES[theirs.partition("(")[0]]
    PEERS[library].skip_if_missing()
    names = {"BitsAndBytesConfig": BitsAndBytesConfig, "QuantoConfig": QuantoConfig}
    if library == "torchao":
        names = {"TorchAoConfig": TorchAoConfig, **vars(importlib.import_module("torchao.quantization"))}
    tiny_models.llama().save_pretrained(tmp_path)
    there, here = (
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
        for config in (eval(theirs, names), eval(ours, {"MonoQuantConfig": MonoQuantConfig}))
    )
    found = int8_linears(here)
    assert int8_linears(there) == found
    assert len(found) == (12 if "q_proj" in theirs else 14) and "lm_head" not in found
    assert tiny_models.relative_error(tiny_models.logits(here), tiny_models.logits(there)) < 0.06


def test_what_is_said_of_torchaos_embeddings(tmp_path):
    PEERS["torchao"].skip_if_missing()
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    tiny_models.llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert "lm_head" in int8_linears(model) and type(model.model.embed_tokens.weight) is torch.nn.Parameter
    config = MonoQuantConfig(symmetric=True, quantize_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert "lm_head" in int8_linears(model) and model.model.embed_tokens.weight_int8.dtype == torch.int8
