"""A checksum of every tensor, kept in config.json, so that damage to a checkpoint is found and not loaded.

They are in the config and not in the metadata of the safetensors files, since that is written in random order: the same
model saved twice would be two files, and uploaded twice. And a file of another save does not fit the config.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mono_quant_hf.config import XXH3

from .checkpoint import Flaw, opener

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
    """The checksums of what `save_pretrained` will write, also from modules that are offloaded, as base64 text.

    Tensors that the model's own conversions rename or rearrange on the way to disk are left out.
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    reversed_conversions = [c.reverse_transform() for c in getattr(model, "_weight_conversions", None) or ()]
    tensors = []
    for name, tensor in remove_tied_weights_from_state_dict(dict(model.state_dict()), model).items():
        if name in ignored or any(c.rename_source_key(name)[1] is not None for c in reversed_conversions):
            continue
        if not isinstance(tensor, Tensor) or type(tensor).__name__ == "DTensor":
            continue  # extra state, or a shard of a tensor that is gathered later
        stored = load_offloaded_parameter(model, name) if tensor.is_meta else tensor
        tensors.append((name, fingerprint(stored)))
    return _encoded(tensors)


def checksums_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The checksums of named tensors, as base64 text."""
    return _encoded((name, fingerprint(tensor)) for name, tensor in tensors)


def _encoded(fingerprints: Iterable[tuple[str, int]]) -> str:
    entries = [ENTRY.pack(_of_name(name), found) for name, found in fingerprints]
    return XXH3 + base64.b64encode(b"".join(sorted(entries))).decode()


def _decoded(checksums: str) -> tuple[dict[int, int], Hash]:
    """What was recorded, `{hash of the name: hash of the tensor}`, and by which hash."""
    hashed = xxh3 if checksums.startswith(XXH3) else zlib.crc32  # of the first checkpoints
    return dict(ENTRY.iter_unpack(base64.b64decode(checksums.removeprefix(XXH3)))), hashed


def check_fingerprints(files: Sequence[str], checksums: str, names: Iterable[str]) -> None:
    """Compare the tensors of a checkpoint with its checksums.

    Args:
        files: the safetensors files of the checkpoint.
        checksums: as `checksums_of` made them.
        names: the names of the model's own tensors, to name one that is missing.

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
    recorded, hashed = _decoded(checksums)
    opened = opener()
    stored = [(file, name) for file in files for name in opened(file).keys()]  # noqa: SIM118

    def compute(place: tuple[str, str]) -> int:
        file, name = place
        return fingerprint(opened(file).get_tensor(name), hashed)

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        for (file, name), found in zip(stored, pool.map(compute, stored), strict=True):
            if recorded.pop(_of_name(name, hashed), found) != found:
                yield Flaw(
                    file,
                    name,
                    f"{name} in {file} is not what was saved with this config.json: the file was changed or damaged, "
                    "or is of another save; download or save the model again.",
                )
            if on_each is not None:
                on_each(name)
    if recorded:
        known = {_of_name(name, hashed): name for name in names}
        missing = sorted(known.get(code, "a tensor that this model does not name") for code in recorded)
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        yield Flaw(
            files[0],
            missing[0],
            f"{missing[0]}{more} is missing from {files[0]}; download or save the model again.",
        )
