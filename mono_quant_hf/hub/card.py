"""The model card: made from the files of the checkpoint and what was measured, or an older card extended."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from mono_quant_hf.integration.selection import EMBEDDINGS_OFF, Decision, quantized_share
from mono_quant_hf.integration.tags import tags_of
from mono_quant_hf.versions import OWN

from .card_examples import example_of
from .checkpoint import HUB_ID, CheckpointFacts, read_facts
from .errors import HubError
from .evaluation import Evaluation
from .markdown import code_span, fenced, phrase, picture

logger = logging.getLogger("mono_quant_hf")

TEMPLATE = Path(__file__).with_name("card_template.md")
START = "<!-- mono_quant_hf: what follows is written anew by every push, up to the end mark -->"
END = "<!-- mono_quant_hf: end -->"
PLOTS_FOLDER = "plots"
CARRIED_OVER = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
"""Metadata of the original's card that hold for the quantized model too."""
_IN_TEMPLATE: dict[str, Any] = {"start": START, "end": END, "phrase": phrase, "fenced": fenced}


class CardOptions(TypedDict, total=False):
    """What a card says beside the facts of the checkpoint.

    Attributes:
        evaluation: results of `mono_quant_hf.evaluation`, one or more, an `Evaluation` (which adds the name of the data
            and the command), or a JSON file of such.
        base_model: Hub id of the float model.
        license: as the Hub names it, such as `"apache-2.0"`.
        plots: images to show; they are expected in the repo under `plots/`.
        notes: a paragraph of Markdown of your own, put first.
    """

    evaluation: Any
    base_model: str | None
    license: str | None
    plots: Sequence[str | os.PathLike[str]]
    notes: str | None


def model_card(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    original: ModelCard | None = None,
    existing: ModelCard | None = None,
    **options: Unpack[CardOptions],
) -> ModelCard:
    """The card of a quantized checkpoint.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: where it will be, such as `"me/model-int8"`; the code in the card loads it from there.
        original: card of the float model, whose license, language and so on are carried over.
        existing: a card to keep and extend: its text stays, our section in it is written anew or added at the end,
            and its metadata are completed, not changed.
        options: `evaluation`, `base_model`, `license`, `plots`, `notes`; see `CardOptions`.

    Returns:
        a card that is not saved yet.

    Raises:
        HubError: the folder holds no model quantized by mono_quant_hf, the evaluation no known number, or the
            metadata of `existing` cannot be kept.
        ValueError, OSError: a file of the folder is missing or damaged; the message names it.
        TypeError: there is no such option.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from mono_quant_hf import quantize_model
        >>> config = BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     quantize_model(BertModel(config)).save_pretrained(folder)
        ...     card = model_card(folder, "me/bert-int8", base_model="me/bert", license="apache-2.0")
        >>> card.data.base_model, card.data.license, 'from_pretrained("me/bert-int8")' in card.text
        ('me/bert', 'apache-2.0', True)
    """
    check_options("model_card", options, CardOptions)
    facts = read_facts(folder)
    evaluations = Evaluation.of(options.get("evaluation"))
    title = repo_id.rpartition("/")[2]
    data = _metadata(facts, original, existing, options)
    results = [result for one in evaluations for result in one.eval_results(data["pipeline_tag"])]
    if results:
        data |= {"eval_results": results, "model_name": title}
    words = _words(facts, Path(folder), data.get("base_model")) | {
        "title": phrase(title),
        "repo_id": json.dumps(repo_id),
        "plots": [_plot(Path(plot)) for plot in options.get("plots") or ()],
        "notes": options.get("notes"),
    }
    fresh = ModelCard.from_template(
        ModelCardData(**data), str(TEMPLATE), evaluations=evaluations, **_IN_TEMPLATE, **words
    )
    card = fresh if existing is None else _extended(existing, fresh)
    check_card(card)
    return card


def _plot(file: Path) -> str:
    return picture(file.stem.replace("_", " "), f"{PLOTS_FOLDER}/{file.name}")


def check_options(function: str, given: Mapping[str, Any], known: Any) -> None:
    """Refuse options that a TypedDict does not know, with a TypeError as Python's own."""
    unknown = next((name for name in given if name not in known.__annotations__), None)
    if unknown is not None:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown!r}")


def _metadata(
    facts: CheckpointFacts, original: ModelCard | None, existing: ModelCard | None, options: CardOptions
) -> dict[str, Any]:
    data = _carried_over(_data(original), CARRIED_OVER)
    license = options.get("license")
    if license is not None:
        data = {key: value for key, value in data.items() if not key.startswith("license")}
        data["license"] = license
    base = options.get("base_model") or _carried_over(_data(existing), ["base_model"]).get("base_model")
    if base:
        data |= {"base_model": base, "base_model_relation": "quantized"}
    data.setdefault("pipeline_tag", facts.task)
    data |= {"library_name": "transformers", "tags": tags_of(facts.config)}
    return data


def load_card(where: str | os.PathLike[str], token: str | bool | None = None) -> ModelCard | None:
    """The card in a folder or, where that is none, of a model on the Hub; None where there is none in reach."""
    try:
        if Path(where).is_dir():
            file = Path(where) / "README.md"
            return ModelCard.load(file, ignore_metadata_errors=True) if file.is_file() else None
        name = str(where)
        return ModelCard.load(name, token=token) if HUB_ID.fullmatch(name) else None  # type: ignore[arg-type]
    except (HfHubHTTPError, OSError, ValueError):
        return None  # no card, no repo, no network, or none that can be read: there is nothing to carry over


def _data(card: ModelCard | None) -> dict[str, Any]:
    return {} if card is None else {key: value for key, value in card.data.to_dict().items() if value}


def _carried_over(data: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Metadata of another card that are names, or lists of names."""
    carried: dict[str, Any] = {}
    for key in keys:
        names = _names(data.get(key))
        if names:
            carried[key] = names if isinstance(data[key], list) else names[0]
        elif key in data:
            logger.warning("What the card says of %s is no name, and is left out of the new card.", key)
    return carried


def _names(value: Any) -> list[str]:
    """The names in a field of metadata that holds one or a list; none where one of them is no name."""
    names = value if isinstance(value, list) else [value]
    return (
        names
        if all(isinstance(name, str) and name.isprintable() and "<" not in name for name in names)
        else []
    )


def _words(facts: CheckpointFacts, folder: Path, base: Any) -> dict[str, Any]:
    """What the template says of a checkpoint."""
    bases = [f"[{one}](/{one})" if HUB_ID.fullmatch(one) else phrase(one) for one in _names(base)]
    config = facts.config
    scheme = "float16 weights"
    if config.weights == "int8":
        zero_points = "" if config.symmetric else " and zero-point"
        scheme = f"int8 weights with a scale{zero_points} per output channel"
    if config.activations:
        scheme += " and int8 activations"
    processor = _processor(folder)
    return {
        "introduction": f"{', '.join(bases) or facts.architecture} with {scheme}, quantized by mono_quant_hf.",
        "auto_class": facts.auto_class,
        "processor": processor,
        "example": example_of(folder, facts, processor[1] if processor else ""),
        "loads": ", ".join(sorted({facts.auto_class, *processor[:1]})),
        "groups": _rows(facts.decisions, quantized=True),
        "kept": _rows(facts.decisions, quantized=False),
        "share": f"{quantized_share(facts.decisions):.1%}",
        "more": _what_would_help(facts),
        "size": f"{facts.bytes_on_disk / 1e6:,.2f}",
        "float_size": f"{facts.bytes_as_float / 1e6:,.2f}",
        "version": OWN,
        "transformers_version": transformers.__version__,
        "torch_version": torch.__version__.partition("+")[0],
        "settings": fenced(config.as_code(), "python"),
    }


def _what_would_help(facts: CheckpointFacts) -> str:
    """A sentence where less than half was quantized, and embeddings are a part of what was not."""
    tables = sum(d.parameters for d in facts.decisions if d.reason == EMBEDDINGS_OFF)
    if not tables or quantized_share(facts.decisions) >= 0.5:
        return ""
    total = sum(d.parameters for d in facts.decisions)
    return f"The embeddings hold {tables / total:.1%}: `quantize_embeddings=True` quantizes them too."


def _processor(folder: Path) -> tuple[str, ...]:
    """Auto class and variable name of what prepares the inputs, if the folder holds it."""
    for file, auto_class, variable in (
        ("processor_config.json", "AutoProcessor", "processor"),
        ("tokenizer.json", "AutoTokenizer", "tokenizer"),
        ("tokenizer_config.json", "AutoTokenizer", "tokenizer"),
        ("preprocessor_config.json", "AutoProcessor", "processor"),
        ("image_processor_config.json", "AutoProcessor", "processor"),
    ):
        if (folder / file).is_file():
            return auto_class, variable
    return ()


def _rows(decisions: list[Decision], quantized: bool) -> list[dict[str, str]]:
    """The modules that are quantized by class and form, or those in float by reason: a row of a table for each."""
    grouped: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        if decision.quantized == quantized:
            symmetry = {True: ", symmetric", False: ", asymmetric", None: ""}[decision.symmetric]
            stored = decision.kind, decision.weights + symmetry
            key = stored if quantized else (decision.reason or "the settings", "")
            grouped.setdefault(key, []).append(decision)
    rows = []
    for (name, stored_as), members in grouped.items():
        parameters = sum(decision.parameters for decision in members)
        row = {"modules": f"{len(members):,}", "parameters": f"{parameters:,}" if parameters else "shared"}
        if quantized:
            row |= {"kind": code_span(name), "stored": stored_as}
        else:
            row |= {"reason": phrase(name), "example": code_span(members[0].module)}
        rows.append(row)
    return rows


def _extended(existing: ModelCard, fresh: ModelCard) -> ModelCard:
    """The existing card with our section and the metadata it lacks."""
    begin, stop = fresh.content.find(START), fresh.content.find(END)
    section = fresh.content[begin : stop + len(END)]
    text: str = existing.text
    first, last = text.find(START), text.find(END)
    before, after = (
        (text[:first], text[last + len(END) :]) if 0 <= first < last else (f"{text.rstrip()}\n\n", "\n")
    )
    text = before + section + after
    data, ours = existing.data.to_dict(), fresh.data.to_dict()
    index = _merged_index(existing.data, fresh.data)
    data.pop("model-index", None)
    ours.pop("model-index", None)
    for key, value in ours.items():
        if key == "tags":
            data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), *value]))
        elif not data.get(key):
            data[key] = value
    merged = ModelCardData(**data, **index)
    return ModelCard(f"---\n{merged}\n---\n{text}")


def _merged_index(existing: Any, fresh: Any) -> dict[str, Any]:
    """The results of both; where the same was measured again, the new one."""
    ours: list[EvalResult] = list(fresh.eval_results or [])
    theirs = [
        result
        for result in existing.eval_results or []
        if not any(result.is_equal_except_value(other) for other in ours)
    ]
    if not ours and not theirs:
        return {}
    name = getattr(existing, "model_name", None) or getattr(fresh, "model_name", None)
    return {"eval_results": theirs + ours, "model_name": name}


def check_card(card: ModelCard) -> None:
    """Raise a HubError if the metadata cannot be read back as they were meant."""
    try:
        again = ModelCard(str(card))
    except (ValueError, TypeError) as problem:
        raise HubError(f"The model card's metadata are not valid: {problem}") from problem
    if again.data.to_dict() != card.data.to_dict():
        raise HubError(
            "The model card's metadata change when they are read back; simplify the existing card's."
        )
