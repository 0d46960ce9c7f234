"""Where a model comes from: a folder, or a name on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from .card import is_hub_id
from .errors import HTTPError, HubError
from .folders import is_inside


def local_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a model, downloaded into the cache of huggingface_hub if `source` is a name on the Hub.

    Raises:
        HubError: it is neither, or cannot be downloaded; or what becomes part of a model's copy lies elsewhere.
    """
    if (folder := Path(source)).is_dir():
        for name in (
            "config.json",
            "generation_config.json",
        ):  # of which transformers saves whatever they hold
            if not is_inside(folder / name, folder):
                raise HubError(
                    f"{folder / name} is a link that leads out of {folder}; put the file itself there."
                )
        return folder
    name = str(source)
    if not is_hub_id(name):
        raise HubError(f"{name} is neither a folder nor the name of a model on the Hub (owner/name).")
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=_unused(name, revision)))
    except GatedRepoError as problem:
        raise HubError(
            f"{name} is gated: ask for access on its page on the Hub, and log in (hf auth login)."
        ) from problem
    except RepositoryNotFoundError as problem:
        raise HubError(
            f"{name} is not on the Hub, or private: check the name, and log in (hf auth login)."
        ) from problem
    except (HfHubHTTPError, HTTPError, OSError) as problem:
        raise HubError(f"{name} could not be downloaded ({type(problem).__name__}: {problem}).") from problem


def _unused(name: str, revision: str | None) -> list[str]:
    """Files that are not needed: weights in other formats where safetensors are there."""
    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except (HTTPError, OSError):
        return []  # offline: what is in the cache is what there is
    others = [
        "*.bin",
        "*.bin.index.json",
        "*.pth",
        "*.pt",
        "*.h5",
        "*.msgpack",
        "*.onnx",
        "*.gguf",
        "original/*",
    ]
    return others if any(file.endswith(".safetensors") for file in files) else []
