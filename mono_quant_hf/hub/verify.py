"""Whether a checkpoint is what its config says, and what a float model rounds to: read from its files, not loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.core_model_loading import revert_weight_conversion

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.core import calculate_scale_zp_per_channel, sqnr
from mono_quant_hf.core.metrics import decibels
from mono_quant_hf.core.quantizers import BLOCK_ELEMENTS
from mono_quant_hf.integration.checkpoint import (
    Flaw,
    FlawedCheckpoint,
    decide_by_checkpoint,
    flaws_of_stored_tensors,
    stems_of_codes,
)
from mono_quant_hf.integration.conversions import checkpoint_of
from mono_quant_hf.integration.expected import expected_tensors
from mono_quant_hf.integration.fingerprints import flaws_by_fingerprint
from mono_quant_hf.integration.selection import Decision, aliases_of, decide_recorded
from mono_quant_hf.json_files import read_index
from mono_quant_hf.modules.base import DTYPE_NAME
from mono_quant_hf.texts import one_line
from mono_quant_hf.weight_files import INDEX, StoredTensor, opener, read_headers, weight_files

from .checkpoint import (
    bytes_of,
    check_float,
    check_ours,
    local_folder,
    quantization_of,
    settings_of,
    skeleton_of,
)
from .errors import HubError

HALF_A_STEP = 0.5 + 1e-3
"""Rounding to the nearest code is off by half a step at most; the rest is for float32 arithmetic at code 255."""
_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
_TORCH_DTYPES = {torch.int8: "I8", torch.float16: "F16"}


@dataclass(frozen=True)
class ComparedWeight:
    """A quantized weight beside the float one it was made from.

    Attributes:
        tensor: its name on disk.
        weights: `"int8"` or `"float16"`.
        rounding: `"nearest"`, or `"calibrated"` where scales and zero-points are those of the float weight but codes
            were chosen otherwise; `"other"` where it was not made from this float weight.
        sqnr: of the dequantized weight in dB.
        steps: the largest difference in steps of the grid; None for float16.
        moved: share of the codes that are further than half a step away, 0 to 1; None for float16.
    """

    tensor: str
    weights: str
    rounding: str
    sqnr: float
    steps: float | None
    moved: float | None


@dataclass(frozen=True)
class Verification:
    """What was checked, and what was found.

    Attributes:
        checkpoint: as it was given.
        source: the float model, as it was given; None if there was none.
        config: how the checkpoint says that it is quantized; None where that cannot be read.
        files, tensors, bytes: how many were read.
        compared: how many tensors have a checksum that was compared; None without checksums.
        flaws: what is wrong; none in a sound checkpoint.
        notes: what is worth knowing, and not wrong.
        weights: beside the source, the lowest SQNR first.
    """

    checkpoint: str
    source: str | None
    config: MonoQuantConfig | None
    files: int
    tensors: int
    bytes: int
    compared: int | None
    flaws: tuple[Flaw, ...]
    notes: tuple[str, ...]
    weights: tuple[ComparedWeight, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.flaws

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON data; the checksums of the config are left out, and an infinite SQNR is None."""
        data = asdict(self) | {"ok": self.ok}
        if self.config is not None:
            data["config"] = {
                key: value for key, value in self.config.to_dict().items() if key != "checksums"
            }
        for weight in data["weights"]:
            weight["sqnr"] = weight["sqnr"] if abs(weight["sqnr"]) != float("inf") else None
        return data


def verify_checkpoint(
    checkpoint: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    progress: bool = False,
) -> Verification:
    """Check the files of a quantized model against its config.json, and against the float model if it is at hand.

    Every file, name, dtype and shape; scales finite and positive; zero-points where the config wants them and nowhere
    else; every checksum; an index that names what is there. The model is not loaded: one tensor at a time is.

    Args:
        checkpoint: the folder or Hub name of a model quantized by mono_quant_hf.
        source: folder or Hub name of the float model, as safetensors. Each dequantized weight is then compared with
            it: half a step of the grid, at most, where codes are the nearest. Calibrated codes may differ by more, and
            are told by their scales, which are those of the float weight.
        revision: of a checkpoint on the Hub.
        progress: show a progress bar.

    Raises:
        HubError: there is no such model, or it is not one that mono_quant_hf quantized.
        ValueError: a file of the float model is damaged.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from mono_quant_hf import quantize_model
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     quantize_model(model).save_pretrained(folder)
        ...     verify_checkpoint(folder).ok
        True
    """
    folder = local_folder(checkpoint, revision)
    work = _Verifying(folder, progress)
    work.checkpoint()
    if source is not None and work.model is not None:
        work.against(local_folder(source), str(source))
    return Verification(
        checkpoint=str(checkpoint),
        source=None if source is None else str(source),
        config=work.config,
        files=len({tensor.file for tensor in work.stored.values()}),
        tensors=len(work.stored),
        bytes=bytes_of(work.stored),
        compared=work.compared,
        flaws=tuple(work.flaws.values()),
        notes=tuple(work.notes),
        weights=tuple(sorted(work.weights, key=lambda weight: weight.sqnr)),
    )


class _Verifying:
    """What was read so far, and what was found; `checkpoint` comes first, then `against`."""

    def __init__(self, folder: Path, progress: bool):
        self.folder, self.config_file, self.progress = folder, folder / "config.json", progress
        self.config: MonoQuantConfig | None = None
        self.model: Any = None
        self.stored: dict[str, StoredTensor] = {}
        self.flaws: dict[tuple[str, str], Flaw] = {}
        self.notes: list[str] = []
        self.weights: list[ComparedWeight] = []
        self.compared: int | None = None
        self.opened = opener()

    def add(self, flaw: Flaw) -> None:
        """One flaw a tensor: what follows from the first is not told again."""
        self.flaws.setdefault((flaw.file, flaw.tensor or flaw.message), flaw)

    def says(self, file: str | Path, tensor: str, message: str) -> None:
        self.add(Flaw(str(file), tensor, one_line(message)))

    @contextmanager
    def told(self, file: Path) -> Iterator[None]:
        """What cannot be read of a file is a flaw of it, and ends the block."""
        try:
            yield
        except FlawedCheckpoint as problem:
            self.add(problem.flaw)
        except (HubError, ValueError, FileNotFoundError) as problem:
            self.says(file, "", str(problem))

    def checkpoint(self) -> None:
        settings = self._settings()
        if settings is None:
            return
        files = self._files()
        with self.told(self.config_file):
            self.config = settings_of(self.folder, settings)
            self.model = skeleton_of(self.folder)
        if self.config is not None and self.model is not None and self.stored:
            self._tensors(self.config)
            self._checksums(self.config, files)
            self._values()

    def _settings(self) -> dict[str, Any] | None:
        """The `quantization_config`; None where something is wrong with it.

        Raises:
            HubError: the model is none of ours, which is no flaw.
        """
        if not self.config_file.is_file():
            return quantization_of(self.folder)  # says so
        with self.told(self.config_file):
            settings = quantization_of(self.folder)
            if settings is None:  # codes without a word of them
                check_float(self.folder, self._headers(sorted(self.folder.glob("*.safetensors"))))
        return None if self.flaws else check_ours(self.folder, settings)

    # Files

    def _files(self) -> list[Path]:
        index, there = self.folder / INDEX, sorted(self.folder.glob("*.safetensors"))
        named: dict[str, str] = {}
        with suppress(ValueError):  # told below
            named = read_index(index) if index.is_file() else {}
        files = [file for file in there if not named or file.name in named.values()]
        with self.told(index if named else self.folder):
            files = weight_files(self.folder)
        self._headers(files)
        for file in there:
            if file not in files:
                told = f"{file} belongs to no index and is not read; remove it, or save the model again."
                self.says(file, "", told)
        for name, at in named.items():
            found = self.stored.get(name)
            if found is None or Path(found.file).name != at:
                where = f"it is in {found.file}" if found else "it is in no file"
                told = f"{index} says that {name} is in {at}, but {where}; save the model again."
                self.says(index, name, told)
        for name in self.stored.keys() - named.keys() if named else ():
            at = self.stored[name].file
            self.says(at, name, f"{name} in {at} is not in {index.name}; save the model again.")
        return files

    def _headers(self, files: Sequence[Path]) -> dict[str, StoredTensor]:
        for file in files:
            found: dict[str, StoredTensor] = {}
            with self.told(file):
                found = read_headers([file])
            for name in found.keys() & self.stored.keys():
                other = self.stored[name].file
                self.says(file, name, f"{name} is both in {other} and in {file}; save the model again.")
            self.stored |= found
        return self.stored

    # Tensors

    def _tensors(self, config: MonoQuantConfig) -> None:
        checkpoint = checkpoint_of(self.model, self.stored)
        planned = decide_recorded(self.model, config)
        decisions: list[Decision] = []
        with self.told(self.config_file):
            decisions = decide_by_checkpoint(self.model, planned, config, checkpoint)
        if not decisions:
            return
        other = [a.module for b, a in zip(planned, decisions, strict=True) if b.weights != a.weights]
        if other:
            self.notes.append(
                f"{len(other)} modules are stored otherwise than the config says, such as {other[0]}; they are loaded "
                "as they are stored."
            )
        expected = expected_tensors(self.model, decisions)
        for flaw in flaws_of_stored_tensors(self.model, checkpoint):
            self.add(flaw)
        self._compare_names(expected)

    def _compare_names(self, expected: dict[str, Tensor]) -> None:
        aliases = aliases_of(self.model)
        flawed = {tensor for _, tensor in self.flaws}
        known: set[str] = set(self.model.all_tied_weights_keys)
        may_lack, may_have = (
            [re.compile(pattern) for pattern in getattr(self.model, f"_keys_to_ignore_on_load_{which}") or ()]
            for which in ("missing", "unexpected")
        )
        for name, tensor in expected.items():
            key = next((alias for alias in aliases(name) if alias in self.stored), None)
            known.add(key or name)
            if key is None:
                if name not in flawed and not any(pattern.search(name) for pattern in may_lack):
                    told = f"{name} is missing from {self.folder}, whose config.json asks for it; save the model again."
                    self.says(self.folder, name, told)
                continue
            found = self.stored[key]
            exact = _TORCH_DTYPES.get(tensor.dtype)  # of codes, zero-points and float16 weights
            fits = found.dtype == exact if exact else found.dtype in _FLOATS or not tensor.is_floating_point()
            if found.shape != tuple(tensor.shape) or not fits:
                wanted = exact or str(tensor.dtype).removeprefix("torch.")
                self.says(
                    found.file,
                    key,
                    f"{key} in {found.file} is {found.dtype} {list(found.shape)} where the config asks for {wanted} "
                    f"{list(tensor.shape)}; save the quantized model again.",
                )
        for name in sorted(self.stored.keys() - known - flawed):
            if not any(pattern.search(name) for pattern in may_have):
                at = self.stored[name].file
                self.says(at, name, f"{name} in {at} belongs to no part of the model; save the model again.")

    def _checksums(self, config: MonoQuantConfig, files: list[Path]) -> None:
        if config.checksums is None:
            self.notes.append("config.json holds no checksums: changed bytes cannot be found.")
            return
        whole = sorted({tensor.file for tensor in self.stored.values()})
        all_there = len(whole) == sum(file.is_file() for file in files)
        with self._bar(len(self.stored), "checksums") as bar:
            for flaw in flaws_by_fingerprint(whole, config, self.stored, lambda _: bar.update()):
                if flaw.tensor in self.stored or all_there:
                    self.add(flaw)
        self.compared = len(self.stored)

    def _values(self) -> None:
        odd = []
        for stem in stems_of_codes(self.stored):
            if f"{stem}_zero_point" not in self.stored and int(self._load(f"{stem}_int8").min()) == -128:
                odd.append(stem)
        if odd:
            self.notes.append(
                f"{len(odd)} symmetric weights hold the code -128, such as {odd[0]}: mono_quant_hf itself rounds to "
                "-127 to 127, other libraries do not; it is read as it is."
            )
        for name, tensor in self.stored.items():
            if name.endswith("_float16") and not bool(self._load(name).isfinite().all()):
                told = f"{name} in {tensor.file} holds NaN or infinite values; save it again."
                self.says(tensor.file, name, told)

    def _load(self, name: str) -> Tensor:
        tensor: Tensor = self.opened(self.stored[name].file).get_tensor(name)
        return tensor

    def _bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=what, unit="tensor", disable=not self.progress)

    # The float model

    def against(self, folder: Path, source: str) -> None:
        if quantization_of(folder) is not None:
            raise HubError(f"{source} is quantized itself; give the float model.")
        exact = read_headers(weight_files(folder))
        broken = {tensor for _, tensor in self.flaws}
        float_names = {f"{stem}_int8": stem for stem in stems_of_codes(self.stored)}
        float_names |= {n: n.removesuffix("_float16") for n in self.stored if n.endswith("_float16")}
        made = {f"{stem}_{suffix}" for stem in float_names.values() for suffix in ("scale", "zero_point")}
        names = [name for name in self.stored if name not in made and not name.endswith(f".{DTYPE_NAME}")]
        missing = []
        with self._bar(len(names), "float weights") as bar:
            for name in names:
                bar.update()
                stem = float_names.get(name, name)
                if broken.intersection((name, f"{stem}_scale", f"{stem}_zero_point")):
                    continue
                for key, parts in self._parts(name, stem, exact).items():
                    if key not in exact:
                        missing.append(name)
                    else:
                        self._compare(name, parts, self.opened(exact[key].file).get_tensor(key), source)
        quantized = next((name for name in missing if name in float_names), None)
        if quantized is not None:
            self.says(
                self.stored[quantized].file,
                quantized,
                f"{quantized} is not in {source}, so it cannot be compared; is that the float model it was made from?",
            )
        calibrated = [weight for weight in self.weights if weight.rounding == "calibrated"]
        if calibrated:
            most = max(calibrated, key=lambda weight: weight.steps or 0)
            self.notes.append(
                f"{len(calibrated)} of {len(self.weights)} weights have calibrated rounding: the scales of the float "
                f"weight, and codes chosen otherwise, up to {most.steps:.1f} steps away ({most.tensor})."
            )

    def _parts(self, name: str, stem: str, exact: dict[str, StoredTensor]) -> dict[str, list[Tensor]]:
        """A stored tensor, with scale and zero-point, by its name in the float checkpoint; in several where that has it
        in several, as the weights of experts are.
        """
        companions = (f"{stem}_scale", f"{stem}_zero_point") if name.endswith("_int8") else ()
        tensors = [self._load(key) for key in (name, *companions) if key in self.stored]
        key = next((alias for alias in aliases_of(self.model)(stem) if alias in exact), None)
        if key is not None:
            return {key: tensors}
        split = [revert_weight_conversion(skeleton_of(self.folder), {stem: tensor}) for tensor in tensors]
        return {key: [parts[key] for parts in split] for key in split[0]}

    def _compare(self, name: str, parts: list[Tensor], weight: Tensor, source: str) -> None:
        """Compare a stored tensor (codes with their scale and zero-point) with the float one."""
        stored, file = parts[0], self.stored[name].file
        if stored.shape != weight.shape:
            self.says(
                file,
                name,
                f"{name} has shape {list(stored.shape)}, in {source} it has {list(weight.shape)}; is that the float "
                "model it was made from?",
            )
            return
        if stored.dtype is not torch.int8:
            # bfloat16 and float32 may hold the same numbers; what is float on both sides was only cast.
            cast = weight.to(stored.dtype)
            if not torch.equal(cast.nan_to_num(), stored.nan_to_num()):
                self.says(file, name, f"{name} in {file} differs from that of {source}; is it that model's?")
            elif name.endswith("_float16"):
                found = ComparedWeight(name, "float16", "nearest", sqnr(weight, stored), None, None)
                self.weights.append(found)
            return
        scale, zero_point = parts[1], parts[2] if len(parts) > 2 else None
        steps, moved, ratio = _distance(weight, stored, scale, zero_point)
        rounding = "nearest"
        if steps > HALF_A_STEP:
            rounding = "calibrated" if _same_grid(weight, scale, zero_point) else "other"
        share = moved / max(1, stored.numel())
        self.weights.append(ComparedWeight(name, "int8", rounding, ratio, steps, share))
        if rounding == "other":
            self.says(
                file,
                name,
                f"{name} in {file} is up to {steps:.3g} steps away from {source} ({ratio:.1f} dB), and its scales are "
                "not those of that weight; it was made from another float model, had an adapter merged into it, or is "
                "damaged.",
            )


def _distance(
    weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> tuple[float, int, float]:
    """The largest difference in steps, how many are over half a step, and the SQNR in dB; by blocks of rows."""
    largest, moved, signal, noise = 0.0, 0, 0.0, 0.0
    rows = max(1, BLOCK_ELEMENTS * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), rows):
        block = slice(start, start + rows)
        channels = block if len(scale) == len(weight) else slice(None)
        exact, grid = weight[block].double(), scale[channels].double()
        steps = codes[block].double()
        if zero_point is not None:
            steps -= zero_point[channels].double()
        error = exact - steps * grid
        signal += float(exact.square().sum())
        noise += float(error.square().sum())
        error = (error / grid).abs_()
        largest = max(largest, float(error.max()))
        moved += int((error > HALF_A_STEP).sum())
    return largest, moved, decibels(signal, noise)


def _same_grid(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> bool:
    axes = tuple(dim for dim, size in enumerate(weight.shape) if scale.shape[dim] == size)
    if not axes:
        return False
    expected, zeros = calculate_scale_zp_per_channel(weight, symmetric=zero_point is None, axis=axes)
    return torch.allclose(expected.reshape(scale.shape), scale, rtol=1e-5, atol=0) and (
        zero_point is None or bool((zeros.reshape(scale.shape) - zero_point).abs().max() <= 1)
    )
