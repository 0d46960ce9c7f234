"""Results of `mono_quant_hf.evaluation` as a model card shows them, with the command that measured them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from mono_quant_hf.evaluation.results import Result
from mono_quant_hf.json_files import read_json
from mono_quant_hf.texts import one_line, shown

from .errors import HubError


class Metric(NamedTuple):
    """One number of a result: its key there, its name for readers, its type for the Hub, and how it is written."""

    key: str
    name: str
    type: str
    form: str


METRICS = [
    Metric("perplexity", "perplexity", "perplexity", ".4f"),
    Metric("reference_perplexity", "perplexity of the float model", "perplexity", ".4f"),
    Metric("kl_mean", "mean KL divergence from the float model, nats", "kl_divergence", ".3g"),
    Metric("kl_p99", "99th percentile of it, nats", "kl_divergence", ".3g"),
    Metric("top1_agreement", "same top-1 answer as the float model", "agreement", ".2%"),
    Metric(
        "cosine_mean", "mean cosine similarity with the float model's embeddings", "cosine_similarity", ".6f"
    ),
    Metric("cosine_min", "the smallest", "cosine_similarity", ".6f"),
    Metric("relative_error", "relative error of the output against the float model", "relative_error", ".3g"),
]
REFERENCE = "reference_perplexity"
"""The one that is the float model's."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what, and how anybody can measure it again.

    Args:
        results: results of `mono_quant_hf.evaluation`, or their `to_dict()`.
        dataset: name of the text or data, such as `"wikitext-2-raw-v1, test"`.
        command: the command line or the code that measured it.

    Example:
        >>> Evaluation([{"perplexity": 21.5, "tokens": 4095}], dataset="pydoc_data.topics").rows()
        [('perplexity', '21.5000'), ('tokens scored', '4,095')]
    """

    results: list[Result | Mapping[str, Any]]
    dataset: str = "a text of the author's"
    command: str | None = None
    values: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        values = [result.to_dict() if isinstance(result, Result) else result for result in self.results]
        known = {metric.key for metric in METRICS}
        for value in values:
            if not isinstance(value, Mapping) or not known & value.keys():
                raise HubError(
                    f"An evaluation holds none of the numbers that a model card shows ({', '.join(sorted(known))}); "
                    "give results of mono_quant_hf.evaluation."
                )
        object.__setattr__(self, "values", values)

    @classmethod
    def of(cls, given: Any) -> list[Evaluation]:
        """What a user may hand over, as a list: nothing, one or more results, evaluations, dicts or JSON files.

        A dict, also one in a JSON file, is a result or holds `"results"`, a list of them; `"dataset"` (or `"data"`)
        and `"command"` in it are those of the evaluation. So are the files that `mono-quant-hf evaluate` writes.
        """
        if given is None:
            return []
        if isinstance(given, Evaluation):
            return [given]
        if isinstance(given, (str, Path)):
            return cls.of(_read(Path(given)))
        if isinstance(given, Result):
            return [cls([given])]
        if isinstance(given, Mapping):
            results = given.get("results", [given])
            results = list(results.values()) if isinstance(results, Mapping) else results
            if not isinstance(results, (list, tuple)) or not results:
                raise HubError(f"The results of an evaluation must be a list, not {shown(results)}.")
            about = {"dataset": given.get("dataset") or given.get("data"), "command": given.get("command")}
            return [cls(list(results), **{key: str(value) for key, value in about.items() if value})]
        if isinstance(given, Iterable):
            return [one for item in given for one in cls.of(item)]
        raise HubError(
            f"An evaluation must be a result of mono_quant_hf.evaluation, not {type(given).__name__}."
        )

    def rows(self) -> list[tuple[str, str]]:
        """The numbers for a table: `(name, value)`."""
        rows: dict[str, str] = {}
        # Those of a comparison first, whose two perplexities are of the same tokens.
        found = _found(sorted(self.values, key=lambda value: REFERENCE not in value))
        for metric in METRICS:
            if metric not in found:
                continue
            number, value = found[metric]
            rows[metric.name] = format(number, metric.form)
            if metric.key == "kl_mean" and _finite(error := value.get("kl_standard_error")):
                rows[metric.name] += f" ± {error:.1g}"
            if metric.key == "perplexity" and _finite(reference := value.get(REFERENCE)) and reference:
                rows[metric.name] += f" ({100 * (number / reference - 1):+.3f} %)"
        for key, name in (("tokens", "tokens scored"), ("samples", "samples")):
            counts = [value[key] for value in self.values if _finite(value.get(key))]
            if counts:
                rows[name] = f"{counts[-1]:,}"
        return list(rows.items())

    def eval_results(self, task: str) -> list[EvalResult]:
        """The numbers of the quantized model for the Hub's `model-index`."""
        return [
            EvalResult(
                task_type=task,
                dataset_type="text" if "tokens" in value else "custom",
                dataset_name=re.sub(
                    "[<>]", "", one_line(self.dataset)
                ),  # some readers take metadata for text
                metric_type=metric.type,
                metric_name=metric.name,
                metric_value=number,
            )
            for metric, (number, value) in _found(self.values).items()
            if metric.key != REFERENCE
        ]


def _found(values: Iterable[dict[str, Any]]) -> dict[Metric, tuple[float, dict[str, Any]]]:
    """Each metric once, the first there is, with the result that it is of."""
    found: dict[Metric, tuple[float, dict[str, Any]]] = {}
    for value in values:
        for metric in METRICS:
            if _finite(value.get(metric.key)):
                found.setdefault(metric, (value[metric.key], value))
    return found


def _finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e300


def _read(file: Path) -> Any:
    try:
        return read_json(file, (dict, list))
    except (OSError, ValueError) as problem:
        raise HubError(f"The evaluation cannot be read: {problem}") from problem
