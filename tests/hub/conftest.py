"""The local Hub, and huggingface_hub pointed at it."""

import types

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import constants
from huggingface_hub.utils import _http

from tests.hub.hub_server import Hub


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Such small models are slower on several threads, and much slower where another program runs too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of its own, with the token of the user "me" in the environment and an empty cache."""
    server = Hub().start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", "token-of-me")
    # huggingface_hub waits longer and longer between two tries; here it need not.
    clock = types.SimpleNamespace(**{**vars(_http.time), "sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", clock)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.stop()


@pytest.fixture
def environment(hub, tmp_path):
    """Environment variables that point a new process at the Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "new-home"),
        "HF_TOKEN": "token-of-me",
        "OMP_NUM_THREADS": "1",
    }
