"""What the README says of configs and files is there."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from mono_quant_hf import MonoQuantConfig
from tests import tiny_models
from tests.peers import PEERS, int8_linears

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MIGRATION = re.findall(r"^\| `(\w+Config\(.*\))` \| `(MonoQuantConfig\(.*\))` \|$", README, flags=re.M)


LIBRARIES = {
    "BitsAndBytesConfig": "bitsandbytes",
    "QuantoConfig": "optimum-quanto",
    "TorchAoConfig": "torchao",
}


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


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
