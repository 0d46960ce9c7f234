"""What the README says of configs and files is there."""

import re
from pathlib import Path

import pytest
from transformers import BitsAndBytesConfig, QuantoConfig

from mono_quant_hf import MonoQuantConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MIGRATION = re.findall(r"^\| `(\w+Config\(.*\))` \| `(MonoQuantConfig\(.*\))` \|$", README, flags=re.M)


def test_there_is_a_table_for_every_library():
    assert {theirs.partition("(")[0] for theirs, _ in MIGRATION} == {
        "BitsAndBytesConfig",
        "QuantoConfig",
        "TorchAoConfig",
    }


@pytest.mark.parametrize(("theirs", "ours"), MIGRATION, ids=[theirs for theirs, _ in MIGRATION])
def test_each_config_can_be_made(theirs, ours):
    config = eval(ours, {"MonoQuantConfig": MonoQuantConfig})
    assert config.weights == "int8" and config.symmetric
    assert config.quantize_embeddings == ("embeddings" in theirs)
    assert config.modules_to_not_convert == (["q_proj"] if "q_proj" in theirs else None)
    if not theirs.startswith("TorchAo"):  # needs torchao itself
        eval(theirs, {"BitsAndBytesConfig": BitsAndBytesConfig, "QuantoConfig": QuantoConfig})


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
