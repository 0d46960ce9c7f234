"""What a float model predicted on a text, kept on disk, so that another model can be compared with it
later."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.calibration.blocks import evaluating
from mono_quant_hf.calibration.resume import fingerprint_of
from mono_quant_hf.evaluation.perplexity import PerplexityResult, summarize
from mono_quant_hf.evaluation.results import jsonable
from mono_quant_hf.evaluation.scoring import negative_log_likelihood, score
from mono_quant_hf.evaluation.windows import MaskedOptions, MaskedWindows, Passage, Plan, plan
from mono_quant_hf.files import check_room, file_written_aside

_MANIFEST = "reference.json"
_FORMAT = "mono_quant_hf.reference/1"


@dataclass(frozen=True)
class Reference:
    """A float model's logits on a text, in a folder: `reference.json` and one safetensors file per window.

    Attributes:
        folder: where it is.
        perplexity: of the float model on the same tokens (of a masked model: on the masked tokens,
            exp of the mean negative log-likelihood of the true token).
        windows: how many windows there are.
        vocabulary: the size of the last axis of the logits.
    """

    folder: Path
    perplexity: PerplexityResult
    windows: int
    vocabulary: int

    @property
    def settings(self) -> dict[str, Any]:
        """What it was recorded with."""
        return self.perplexity.settings

    def passages(self) -> Iterator[Passage]:
        """The tokens that were fed and scored, window by window."""
        for passage, _ in self.logits():
            yield passage

    def logits(self) -> Iterator[tuple[Passage, Tensor]]:
        """Each window with its logits [scored, vocabulary], read from disk one at a time.

        Raises:
            ValueError: a file is missing or damaged.
        """
        for number in range(self.windows):
            path = self.folder / _file_name(number)
            try:
                tensors = load_file(path)
                passage = Passage(tensors["input_ids"], tensors["positions"], tensors["targets"])
                yield passage, tensors["logits"]
            except (OSError, SafetensorError, KeyError) as error:
                raise ValueError(f"{path} cannot be read ({error}): record the reference again.") from error


def record_reference(
    model: nn.Module,
    tokenizer: Any,
    text_or_dataset: Any,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    **options: Unpack[MaskedOptions],
) -> Reference:
    """Run `model` over a text and keep its logits in `folder`, for `divergence` to compare others with.

    The folder takes scored tokens x vocabulary x bytes per logit: 2.1 GB for 10,000 tokens of a vocabulary of
    51,200 in float32.  A run that was interrupted goes on where it stopped when it is called again with the
    same model and arguments.

    Args:
        model: a causal or masked language model.  Of a causal one every token but the first is scored, as in
            `perplexity`; of a masked one the tokens that were masked.
        tokenizer, text_or_dataset, window, stride, batch_size, column, separator, max_tokens, progress: as in
            `perplexity`; the windows of a masked model do not overlap, so it has no stride.
        folder: where to write; made if it is missing.
        mask_probability: for masked models, the share of tokens masked.
        seed: for masked models, what draws them.
        dtype: how logits are stored.  Default: as the model gives them, which loses nothing; torch.float16
            halves the space of float32 at the cost of a divergence of about 1e-6 where there is none.

    Raises:
        ValueError: as `perplexity`, or the folder holds the reference of another model or text.
        OSError: the disk has too little space.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mono_quant_hf.evaluation import divergence
        >>> config = LlamaConfig(vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, max_position_embeddings=16)
        >>> model = LlamaForCausalLM(config)
        >>> tokenizer = lambda text, **_: {"input_ids": list(text.encode())}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     reference = record_reference(model, tokenizer, "to be or not to be", folder, progress=False)
        ...     result = divergence(reference, model, progress=False)
        >>> reference.windows, reference.vocabulary, result.tokens, result.kl_mean
        (2, 128, 17, 0.0)
    """
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"dtype is {dtype}, but logits are stored as torch.float32, torch.float16 or torch.bfloat16."
        )
    folder = Path(folder)
    planned = plan(model, tokenizer, text_or_dataset, MaskedWindows(**options))
    fed = [(passage.input_ids, passage.positions, passage.targets) for passage in planned.passages]
    fingerprint = fingerprint_of(model, planned.settings["task"], str(dtype), fed)
    _open(folder, fingerprint)
    started = time.perf_counter()
    _record(model, planned, folder, dtype, progress)
    return _finish(planned, folder, fingerprint, time.perf_counter() - started)


def _record(model: nn.Module, planned: Plan, folder: Path, dtype: torch.dtype | None, progress: bool) -> None:
    """Write the windows that the folder does not hold yet."""
    missing = {n: p for n, p in enumerate(planned.passages) if not (folder / _file_name(n)).exists()}
    left = sum(len(passage.targets) for passage in missing.values())
    done = planned.scored - left
    with (
        evaluating(model),
        tqdm(total=left + done, initial=done, unit="token", desc="reference", disable=not progress) as bar,
    ):
        scored = score(model, missing.values(), planned.settings["batch_size"])
        for number, (passage, logits) in zip(missing, scored, strict=True):
            stored = _stored(logits, dtype)
            if number == next(iter(missing)):
                needed = left * stored.shape[-1] * stored.element_size()
                check_room(folder, needed, "the reference", "give a smaller max_tokens or another folder")
            tensors = {
                "input_ids": passage.input_ids,
                "positions": passage.positions,
                "targets": passage.targets,
                "nll": negative_log_likelihood(logits, passage.targets),
                "logits": stored,
            }
            with file_written_aside(folder / _file_name(number)) as new:
                save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, new)
            bar.update(len(passage.targets))


def _finish(planned: Plan, folder: Path, fingerprint: str, seconds: float) -> Reference:
    """Sum up the windows of the folder in its manifest."""
    parts = []
    for number in range(len(planned.passages)):
        # not load_file, which would read the logits too
        with safe_open(folder / _file_name(number), framework="pt") as file:
            parts.append(file.get_tensor("nll"))
            vocabulary = file.get_slice("logits").get_shape()[-1]
    summary = summarize(torch.cat(parts), planned, seconds)
    sizes = {"windows": len(parts), "vocabulary": vocabulary}
    _write_manifest(folder, fingerprint, complete=True, **sizes, perplexity=summary.to_dict())
    return Reference(folder=folder, perplexity=summary, **sizes)


def load_reference(folder: str | os.PathLike[str]) -> Reference:
    """The reference that `record_reference` wrote to `folder`.

    Raises:
        ValueError: there is none, or its recording was interrupted.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, max_position_embeddings=16)
        >>> tokenizer = lambda text, **_: {"input_ids": list(text.encode())}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     recorded = record_reference(LlamaForCausalLM(config), tokenizer, "to be", folder, progress=False)
        ...     load_reference(folder) == recorded
        True
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder} holds no reference ({_MANIFEST} is missing): make one with record_reference()."
        )
    if not manifest.get("complete"):
        raise ValueError(
            f"the recording of the reference in {folder} was interrupted: call record_reference() again with "
            "the same arguments, and it goes on where it stopped."
        )
    numbers: dict[str, Any] = {
        key: float("nan") if value is None else value for key, value in manifest["perplexity"].items()
    }
    return Reference(
        folder=folder,
        perplexity=PerplexityResult(**numbers),
        windows=manifest["windows"],
        vocabulary=manifest["vocabulary"],
    )


def _stored(logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    stored = logits if dtype is None else logits.to(dtype)
    if dtype == torch.float16 and bool((stored.isinf() & ~logits.isinf()).any()):
        raise ValueError(
            "a logit is larger than float16 can hold: record the reference with dtype=torch.float32."
        )
    return stored.cpu()


def _file_name(number: int) -> str:
    return f"window-{number:06d}.safetensors"


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): record the reference again, in another folder."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not of the format {_FORMAT}: record the reference again, in another folder."
        )
    return manifest


def _write_manifest(folder: Path, fingerprint: str, **about: Any) -> None:
    manifest = jsonable({"format": _FORMAT, "fingerprint": fingerprint, **about})
    with file_written_aside(folder / _MANIFEST) as new:
        new.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _open(folder: Path, fingerprint: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(folder)
    if manifest is not None and manifest["fingerprint"] != fingerprint:
        raise ValueError(
            f"{folder} holds the reference of another model, text or setting: choose another folder, or "
            "delete it."
        )
    if manifest is None:
        if any(folder.glob("window-*.safetensors")):
            raise ValueError(
                f"{folder} holds windows of an unknown reference: choose another folder, or delete it."
            )
        _write_manifest(folder, fingerprint, complete=False)
