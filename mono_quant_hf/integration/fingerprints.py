"""A checksum of every tensor, kept in config.json, so that damage to a checkpoint is found and not loaded.

They are in the config and not in the metadata of the safetensors files, since that is written in random order: the same
model saved twice would be two files, and uploaded twice. And a file of another save does not fit the config.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mono_quant_hf.config import XXH3, MonoQuantConfig
from mono_quant_hf.weight_files import opener

from .by_version import converted
from .checkpoint import Flaw, FlawedCheckpoint
from .read_ahead import ReadAhead

ENTRY = struct.Struct(">II")  # hash of the name and of the tensor
SETTINGS = ""
"""Name of the entry of the config itself; no tensor has it."""


def fingerprint(tensor: Tensor) -> int:
    """32 bits of the XXH3 hash of dtype, shape and bytes."""
    found = _hash(f"{tensor.dtype}{list(tensor.shape)}".encode())
    if tensor.numel() > 0:
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found = _hash(raw.data, found)
    return _short(found)


def _hash(data: Any, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(data, seed)  # as quick as the memory, and lets other threads run


def _short(found: int) -> int:
    return found & 0xFFFFFFFF


def _of_name(name: str) -> int:
    return _short(_hash(name.encode()))


def _of_settings(config: MonoQuantConfig) -> int:
    """Of what a config says otherwise than the defaults."""
    usual = MonoQuantConfig().to_dict()
    settings = {
        field: value
        for field, value in config.to_dict().items()
        if field != "checksums" and value != usual[field]
    }
    return _short(_hash(json.dumps(settings, sort_keys=True).encode()))


def checksums_of(model: PreTrainedModel, config: MonoQuantConfig) -> str | None:
    """The checksums of what `save_pretrained` will write with `config`, also from modules that are offloaded, as text.

    None where tensors are spread over processes: they are gathered after the config was written.
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {
        name: tensor
        for name, tensor in remove_tied_weights_from_state_dict(dict(model.state_dict()), model).items()
        if name not in ignored and isinstance(tensor, Tensor)  # not extra state
    }
    if any(type(tensor).__name__ == "DTensor" for tensor in state.values()):
        return None
    both, original, own = [_entry(SETTINGS, _of_settings(config))], [], []
    for written, held in _written_by(model, state):
        common = {name for name, tensor in written.items() if held.get(name) is tensor}
        both += [_entry(name, fingerprint(written[name])) for name in common]
        original += [_entry(name, fingerprint(t)) for name, t in written.items() if name not in common]
        own += [_entry(name, fingerprint(t)) for name, t in held.items() if name not in common]
    return _as_text(both, original, own)


def checksums_of_tensors(tensors: Iterable[tuple[str, Tensor]], config: MonoQuantConfig) -> str:
    """The checksums of named tensors, and of the config that they are saved with."""
    entries = [_entry(name, fingerprint(tensor)) for name, tensor in tensors]
    return _as_text([_entry(SETTINGS, _of_settings(config)), *entries])


def _entry(name: str, found: int) -> bytes:
    return ENTRY.pack(_of_name(name), found)


def _as_text(*parts: list[bytes]) -> str:
    """base64; after a colon each what is written by default, and by `save_pretrained(save_original_format=False)`.

    Which of the two it will be, `save_pretrained` does not say.
    """
    return XXH3 + ":".join(base64.b64encode(b"".join(sorted(part))).decode() for part in parts).rstrip(":")


def _recorded(checksums: str, there: set[int]) -> dict[int, list[int]]:
    """`{hash of a name: hashes of tensors}`, in that of both formats which the names that are there are more like."""
    parts = [base64.b64decode(part) for part in checksums.removeprefix(XXH3).split(":")]
    both, original, own = ([*ENTRY.iter_unpack(part)] for part in (*parts, b"", b"")[:3])
    forms = [both + original, both + own]
    recorded: dict[int, list[int]] = {}  # some names of many have the same hash
    for name, tensor in min(forms, key=lambda form: len({name for name, _ in form} ^ there)):
        recorded.setdefault(name, []).append(tensor)
    return recorded


def _written_by(
    model: PreTrainedModel, state: dict[str, Tensor]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What is written with the model's own conversions undone and without; what is offloaded, little by little."""
    if not any(tensor.is_meta for tensor in state.values()):
        yield revert_weight_conversion(model, state), state
        return
    conversions = [c.reverse_transform() for c in reversed(getattr(model, "_weight_conversions", None) or ())]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    together: dict[str, list[str]] = {}  # what is joined into one tensor on disk
    for name in state:
        together.setdefault(converted(name, converters), []).append(name)
    for names in together.values():
        loaded = {n: load_offloaded_parameter(model, n) if state[n].is_meta else state[n] for n in names}
        yield revert_weight_conversion(model, loaded), loaded


def check_fingerprints(files: Sequence[str], config: MonoQuantConfig, names: Iterable[str]) -> None:
    """Compare a checkpoint with the checksums in its config.

    Args:
        files: the safetensors files of the checkpoint.
        config: with checksums.
        names: what the model itself may call its tensors.

    Raises:
        FlawedCheckpoint: the first of `flaws_by_fingerprint`.
    """
    for flaw in flaws_by_fingerprint(files, config, names):
        raise FlawedCheckpoint(flaw)


def flaws_by_fingerprint(
    files: Sequence[str],
    config: MonoQuantConfig,
    names: Iterable[str],
    on_each: Callable[[str], None] | None = None,
) -> Iterator[Flaw]:
    """The tensors that are not what was saved or were not saved at all, and last those that are missing.

    Args:
        files, config, names: as in `check_fingerprints`.
        on_each: called with the name of each tensor when it was compared.
    """
    assert config.checksums is not None
    opened = opener()
    stored = [(file, name) for file in files for name in opened(file).offset_keys()]
    recorded = _recorded(config.checksums, {_of_name(name) for _, name in stored})
    if _of_settings(config) not in recorded.pop(_of_name(SETTINGS), ()):
        file = str(Path(files[0]).with_name("config.json"))
        yield Flaw(
            file,
            "",
            f"quantization_config in {file} is not what was saved with its checksums; restore the file that was "
            "saved, or save the model again.",
        )

    def compute(place: tuple[str, str]) -> int:
        file, name = place
        read_ahead.reached(name)
        return fingerprint(opened(file).get_tensor(name))

    with ReadAhead(files) as read_ahead, ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        for (file, name), found in zip(stored, pool.map(compute, stored), strict=True):
            saved = recorded.get(_of_name(name))
            if not saved:
                yield Flaw(
                    file,
                    name,
                    f"{name} in {file} was not saved with this config.json: it was added or renamed; "
                    "download or save the model again.",
                )
            elif found not in saved:
                saved.pop()
                yield Flaw(
                    file,
                    name,
                    f"{name} in {file} is not what was saved with this config.json: the file was changed or damaged, "
                    "or is of another save; download or save the model again.",
                )
            else:
                saved.remove(found)
            if on_each is not None:
                on_each(name)
    if any(recorded.values()):
        known = {_of_name(name): name for name in names}
        unknown = "a tensor that this model does not name"
        missing = sorted(known.get(code, unknown) for code, left in recorded.items() for _ in left)
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        yield Flaw(
            files[0],
            missing[0],
            f"{missing[0]}{more} is missing from {files[0]}; download or save the model again.",
        )
