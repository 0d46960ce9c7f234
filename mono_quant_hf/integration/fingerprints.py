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

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from .checkpoint import Flaw

ENTRY = struct.Struct(">II")  # CRC-32 of the name and of the tensor


def fingerprint(tensor: Tensor) -> int:
    """CRC-32 of dtype, shape and bytes."""
    start = zlib.crc32(f"{tensor.dtype}{list(tensor.shape)}".encode())
    if tensor.numel() == 0:
        return start
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(raw.data, start)


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
    entries = [ENTRY.pack(zlib.crc32(name.encode()), found) for name, found in fingerprints]
    return base64.b64encode(b"".join(sorted(entries))).decode()


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
    recorded = dict(ENTRY.iter_unpack(base64.b64decode(checksums)))
    stored = [(file, name) for file in files for name in _names_in(file)]
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:  # zlib lets other threads run
        for (file, name), found in zip(stored, pool.map(_fingerprint_stored, stored), strict=True):
            if recorded.pop(zlib.crc32(name.encode()), found) != found:
                yield Flaw(
                    file,
                    name,
                    f"{name} in {file} is not what was saved with this config.json: the file was changed or damaged, "
                    "or is of another save; download or save the model again.",
                )
            if on_each is not None:
                on_each(name)
    if recorded:
        known = {zlib.crc32(name.encode()): name for name in names}
        missing = sorted(known.get(code, "a tensor that this model does not name") for code in recorded)
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        yield Flaw(
            files[0],
            missing[0],
            f"{missing[0]}{more} is missing from {files[0]}; download or save the model again.",
        )


def _names_in(file: str) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _fingerprint_stored(stored: tuple[str, str]) -> int:
    file, name = stored
    with safe_open(file, framework="pt") as tensors:
        return fingerprint(tensors.get_tensor(name))
