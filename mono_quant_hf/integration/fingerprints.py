"""A checksum of every tensor, kept in config.json, so that damage to a checkpoint is found and not loaded.

They are in the config and not in the metadata of the safetensors files, since that is written in random order: the same
model saved twice would be two files, and uploaded twice. And a file of another save does not fit the config.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, apply_converters, revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mono_quant_hf.config import XXH3

from .checkpoint import Flaw, opener
from .read_ahead import ReadAhead

ENTRY = struct.Struct(">II")  # hash of the name and of the tensor

Hash = Callable[[Any, int], int]
"""Of bytes, given what was hashed before them (0 at first)."""

xxh3: Hash = xxhash.xxh3_64_intdigest  # as quick as the memory, and lets other threads run


def fingerprint(tensor: Tensor, hashed: Hash = xxh3) -> int:
    """32 bits of the hash of dtype, shape and bytes."""
    found = hashed(f"{tensor.dtype}{list(tensor.shape)}".encode(), 0)
    if tensor.numel() > 0:
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found = hashed(raw.data, found)
    return _short(found)


def _short(found: int) -> int:
    return found & 0xFFFFFFFF


def _of_name(name: str, hashed: Hash = xxh3) -> int:
    return _short(hashed(name.encode(), 0))


def checksums_of(model: PreTrainedModel) -> str:
    """The checksums of what `save_pretrained` will write, also from modules that are offloaded, as text."""
    return checksums_of_tensors(_written_by(model), set(model.state_dict()))


def checksums_of_tensors(tensors: Iterable[tuple[str, Tensor]], own: Container[str] | None = None) -> str:
    """The checksums of named tensors: base64, and after a colon those of names that are not the model's `own`.

    `save_pretrained(..., save_original_format=False)` writes the latter otherwise, and does not say that it does.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name, tensor in tensors:
        parts[own is not None and name not in own].append(ENTRY.pack(_of_name(name), fingerprint(tensor)))
    return XXH3 + ":".join(base64.b64encode(b"".join(sorted(part))).decode() for part in parts).rstrip(":")


def _decoded(checksums: str) -> tuple[dict[int, int], set[int], Hash]:
    """`{hash of the name: hash of the tensor}`, which of them the model names otherwise, and by which hash."""
    hashed = xxh3 if checksums.startswith(XXH3) else zlib.crc32  # of the first checkpoints
    parts = [base64.b64decode(part) for part in checksums.removeprefix(XXH3).split(":")]
    own, converted = (dict(ENTRY.iter_unpack(part)) for part in (*parts, b"")[:2])
    return own | converted, set(converted), hashed


def _written_by(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What `save_pretrained` writes, with the model's own conversions undone; what is offloaded, little by little."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {
        name: tensor
        for name, tensor in remove_tied_weights_from_state_dict(dict(model.state_dict()), model).items()
        # Not extra state, nor a shard of a tensor that is gathered later.
        if name not in ignored and isinstance(tensor, Tensor) and type(tensor).__name__ != "DTensor"
    }
    if not any(tensor.is_meta for tensor in state.values()):
        yield from revert_weight_conversion(model, state).items()
        return
    conversions = [c.reverse_transform() for c in reversed(getattr(model, "_weight_conversions", None) or ())]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    together: dict[str, list[str]] = {}  # what is joined into one tensor on disk
    for name in state:
        together.setdefault(apply_converters(name, converters)[0], []).append(name)
    for names in together.values():
        loaded = {n: load_offloaded_parameter(model, n) if state[n].is_meta else state[n] for n in names}
        yield from revert_weight_conversion(model, loaded).items()


def check_fingerprints(files: Sequence[str], checksums: str, names: Iterable[str]) -> None:
    """Compare the tensors of a checkpoint with its checksums.

    Args:
        files: the safetensors files of the checkpoint.
        checksums: as `checksums_of` made them.
        names: what the model itself may call its tensors.

    Raises:
        ValueError: a tensor is missing, or has changed since it was saved; names the tensor and its file.
    """
    for flaw in flaws_by_fingerprint(files, checksums, names):
        raise ValueError(flaw.message)


def flaws_by_fingerprint(
    files: Sequence[str],
    checksums: str,
    names: Iterable[str],
    on_each: Callable[[str], None] | None = None,
) -> Iterator[Flaw]:
    """The tensors that are not what was saved, and last those that are missing.

    Args:
        files, checksums, names: as in `check_fingerprints`.
        on_each: called with the name of each tensor when it was compared.
    """
    recorded, converted, hashed = _decoded(checksums)
    others: set[int] = set()  # without a record
    opened = opener()
    stored = [(file, name) for file in files for name in opened(file).offset_keys()]

    def compute(place: tuple[str, str]) -> int:
        file, name = place
        read_ahead.reached(name)
        return fingerprint(opened(file).get_tensor(name), hashed)

    with ReadAhead(files) as read_ahead, ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        for (file, name), found in zip(stored, pool.map(compute, stored), strict=True):
            code = _of_name(name, hashed)
            if code not in recorded:
                others.add(code)
            elif recorded.pop(code) != found:
                yield Flaw(
                    file,
                    name,
                    f"{name} in {file} is not what was saved with this config.json: the file was changed or damaged, "
                    "or is of another save; download or save the model again.",
                )
            if on_each is not None:
                on_each(name)
    known = {_of_name(name, hashed): name for name in names}
    if converted <= recorded.keys() and any(code in known for code in others):
        # None is there, but what the model makes of them is: it was saved with save_original_format=False.
        recorded = {code: found for code, found in recorded.items() if code not in converted}
    if recorded:
        missing = sorted(known.get(code, "a tensor that this model does not name") for code in recorded)
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        yield Flaw(
            files[0],
            missing[0],
            f"{missing[0]}{more} is missing from {files[0]}; download or save the model again.",
        )
