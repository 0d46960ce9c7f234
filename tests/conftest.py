"""Settings and fixtures that every test shares."""

import os

# Before transformers is imported: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, with its tokenizer (`LlamaForCausalLM`)."""
    return _real("smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 in float32, with its tokenizer (`BertModel`)."""
    return _real("minilm")


@pytest.fixture(scope="session")
def efficientnet() -> Path:
    """Folder of EfficientNet-Lite0 in float32 (`EfficientNetForImageClassification`)."""
    return _real("efficientnet")


def _real(name: str) -> Path:
    from tests import real_models  # here, so that tests without a real model start without what it needs

    try:
        folder: Path = getattr(real_models, name)()
    except real_models.NotInstalled as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))
    return folder
