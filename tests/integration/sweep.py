"""A tiny model of every class that transformers has, through the whole life of a quantized model.

    python -m tests.integration.sweep --results sweep.jsonl --report sweep.md

Each class runs in a process of its own, with limits of time and memory, forked from one that has imported everything
and run nothing. Results are appended to a file as JSON lines; what is in it is not run again. What already fails in
float is counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.integration import Decision
from mono_quant_hf.kernels import cpu
from mono_quant_hf.modules import quantized_class_for

from .tiny import WAYS, CannotRun, inputs_that_run, make_model, model_classes, tiny_config

MOST_BYTES = 3 * 2**30
MOST_ERROR = 1e-3
"""Of an output against the dequantized model's: the rounding of float32 in another order, and nothing else."""
KERNEL_ERROR = 3e-5
"""Relative, of a product of many rows, which the kernels make of parts in bfloat16."""
LOW_SHARE = 0.9
SECONDS_OF_TRIES = 15
"""Of the processor, in which a class must have run in float."""

Result = dict[str, Any]
_TABLE = re.compile(r"embed|(^|_)pos_emb")


# ---------------------------------------------------------------- one class


def check(model_type: str, class_name: str, folder: Path) -> Result:
    """Everything that is checked on one class.

    Returns:
        `status`: `"right"`, `"float fails"`, or what is wrong: `"crash"`, `"wrong"`, `"differs after reload"`,
        `"differs in memory"`; with `stage` and `problem` what and where; and the measures.
    """
    result: Result = {"model_type": model_type, "class": class_name, "status": "float fails"}
    model_class = getattr(transformers, class_name)
    try:
        model, inputs, way = _float_model(model_type, model_class)
        result |= {
            "way": way,
            "inputs": sorted(inputs),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        expected = outputs(model, inputs)
        model, by_hand = _saved_in_float(model, inputs, expected, folder / "float")
        expected = outputs(model, inputs)
    except Exception as problem:
        return result | _described("float", problem)

    stage = ""
    wrong: dict[str, str] = {}
    try:
        stage = "quantizing on load"
        quantized = _loaded(model_class, folder / "float", quantization_config=MonoQuantConfig())
        result |= _coverage(model, quantized.hf_quantizer.decisions)
        stage = "forward"
        found = outputs(quantized, inputs)
        result["error_to_float"] = relative_error(expected, found)
        stage = "saving"
        quantized.save_pretrained(folder / "quantized")
        stage = "reloading"
        again = _loaded(model_class, folder / "quantized")
        stage = "forward after reload"
        if (difference := _difference(found, outputs(again, inputs))) is not None:
            wrong["differs after reload"] = difference
        stage = "quantizing in memory"
        quantize_model(by_hand)
        stage = "forward in memory"
        if (difference := _difference(found, outputs(by_hand, inputs))) is not None:
            wrong["differs in memory"] = difference
        stage = "dequantizing"
        twin = copy.deepcopy(quantized)
        twin.dequantize(torch.float32)
        stage = "forward dequantized"
        reference = outputs(twin, inputs)
        result["error"] = relative_error(reference, found)
        if not result["error"] < MOST_ERROR:
            result["error_of_noise"] = _error_of_noise(twin, inputs, reference)
            result["error_of_others"] = min(
                _error_of_other_weights(quantized, inputs, seed) for seed in (1, 2, 3)
            )
            if result["error_of_others"] > MOST_ERROR and result["error_of_noise"] < result["error"] / 10:
                wrong["wrong"] = f"error {result['error']:.1e} against the dequantized model"
    except Exception as problem:
        return result | {"status": "crash"} | _described(stage, problem)
    status = next((s for s in ("wrong", "differs after reload", "differs in memory") if s in wrong), "right")
    return result | {
        "status": status,
        "problem": "; ".join(f"{key}: {value}" for key, value in wrong.items()),
    }


def _float_model(
    model_type: str, model_class: type[PreTrainedModel]
) -> tuple[PreTrainedModel, dict[str, Any], str]:
    """A tiny float model and inputs with which it runs.

    Raises:
        CannotRun: whatever is tried fails.
    """
    problems: list[str] = []
    start = time.process_time()
    for way, whole in [*((way, True) for way in WAYS[:3]), *((way, False) for way in WAYS)]:
        try:
            model = make_model(model_class, tiny_config(CONFIG_MAPPING[model_type], way))
            return model, inputs_that_run(model, outputs, whole), way.name
        except Exception as problem:
            text = str(problem) if isinstance(problem, CannotRun) else f"{type(problem).__name__}: {problem}"
            problems.append(text[:400])
            if time.process_time() - start > SECONDS_OF_TRIES:
                break
    raise CannotRun(" | ".join(dict.fromkeys(problems)))


def _saved_in_float(
    model: PreTrainedModel, inputs: dict[str, Any], expected: list[Tensor], folder: Path
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Save a float model, and load it twice.

    Raises:
        CannotRun: it does not give the same outputs twice, or not after it was loaded.
    """
    if not expected:
        raise CannotRun("no output is floating")
    finite = sum(int(t.isfinite().sum()) for t in expected)
    if finite < sum(t.numel() for t in expected) / 2:
        raise CannotRun("most of its outputs are not finite")
    if (difference := _difference(expected, outputs(model, inputs))) is not None:
        raise CannotRun(f"it does not give the same outputs twice: {difference}")
    model.save_pretrained(folder)
    first, second = (_loaded(type(model), folder) for _ in range(2))
    if not (error := relative_error(expected, outputs(first, inputs))) < 1e-5:
        raise CannotRun(f"it differs after it was saved and loaded: relative error {error:.1e}")
    return first, second


def _loaded(model_class: type[PreTrainedModel], folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return model_class.from_pretrained(folder, **options).eval()


def _described(stage: str, problem: Exception) -> Result:
    frames = traceback.extract_tb(problem.__traceback__)
    where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-3:]]
    return {"stage": stage, "problem": f"{type(problem).__name__}: {problem}"[:1500], "where": where}


# ---------------------------------------------------------------- measures


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Every floating tensor that a forward returns."""
    torch.manual_seed(0)
    with torch.no_grad():
        return list(_floating(model(**copy.deepcopy(inputs))))


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel() > 0:
            yield value.detach().clone()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _floating(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floating(item)


def relative_error(reference: list[Tensor], found: list[Tensor]) -> float:
    """The largest `|found - reference| / |reference|` (2-norms) over pairs of tensors; infinite for other shapes."""
    if [t.shape for t in reference] != [t.shape for t in found]:
        return float("inf")
    largest = 0.0
    for a, b in zip(reference, found, strict=True):
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = (t.double().nan_to_num(0, 0, 0) for t in (a, b))
        largest = max(largest, float((b - a).norm() / a.norm().clamp(min=1e-9)))
    return largest


def _difference(expected: list[Tensor], found: list[Tensor]) -> str | None:
    """How outputs differ that should be the same to the bit; None where they do not."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return "other shapes"
    if all(torch.equal(a.nan_to_num(0.1), b.nan_to_num(0.1)) for a, b in zip(expected, found, strict=True)):
        return None
    return f"relative error {relative_error(expected, found):.1e}"


def _error_of_noise(model: PreTrainedModel, inputs: dict[str, Any], reference: list[Tensor]) -> float:
    """How far outputs of a float model move when its weights do by as little as kernels round.

    Where a model chooses (experts, queries, codes), a rounding error may choose otherwise, in float too.
    """
    generator = torch.Generator().manual_seed(2)
    errors = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in {id(p): p for p in model.parameters() if p.is_floating_point()}.values():
                parameter.mul_(1 + KERNEL_ERROR * torch.randn(parameter.shape, generator=generator))
        errors.append(relative_error(reference, outputs(model, inputs)))
    return max(errors)


def _error_of_other_weights(model: PreTrainedModel, inputs: dict[str, Any], seed: int) -> float:
    """The error against the dequantized model with other random weights, by which another choice may be clear."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    quantized = make_model(type(model), config, seed)
    quantize_model(quantized)
    found = outputs(quantized, inputs)
    quantized.dequantize(torch.float32)
    return relative_error(outputs(quantized, inputs), found)


def _coverage(model: PreTrainedModel, decisions: list[Decision]) -> Result:
    """Share of the parameters outside of embeddings and head that is quantized, and why the rest is not.

    A parameter that is named as an embedding counts as one.

    Args:
        model: the float model.
    """
    outside = {id(p): p.numel() for p in model.parameters()}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    with contextlib.suppress(NotImplementedError, AttributeError):
        tables.append(model.get_output_embeddings())
    for module in tables:
        for parameter in module.parameters(recurse=False) if module is not None else ():
            outside.pop(id(parameter), None)
    total = sum(outside.values())
    left: Counter[str] = Counter()
    by_module = {decision.module: decision for decision in decisions}
    for name, module in model.named_modules():
        decision = by_module.get(name)
        quantized_class = quantized_class_for(module)
        quantized = quantized_class.weight_axes if quantized_class and decision and decision.quantized else {}
        for key, parameter in module._parameters.items():
            size = 0 if parameter is None else outside.pop(id(parameter), 0)
            if size and key not in quantized:
                assert parameter is not None
                kind = type(module).__name__
                if _TABLE.search(key):  # of positions, as a rule: an embedding, though no module of its own
                    total -= size
                elif parameter.dim() < 2:
                    left["vectors (biases, norms)"] += size
                elif decision is not None and not decision.quantized:
                    left[f"{kind}.{key}: {decision.reason}"] += size
                else:
                    left[f"{kind}.{key}: no weight that is known"] += size
    share = 1 - sum(left.values()) / total if total else None
    matrices = total - left["vectors (biases, norms)"]
    of_matrices = 1 - (sum(left.values()) - left["vectors (biases, norms)"]) / matrices if matrices else None
    return {
        "share": share,
        "share_of_matrices": of_matrices,
        "outside": total,
        "left": dict(left.most_common(6)),
    }


# ---------------------------------------------------------------- all classes


def candidates(heads: int = 1) -> list[tuple[str, str]]:
    """`(model type, class)`: every type's base model first, then up to `heads` more classes of each."""
    by_type = {model_type: model_classes(model_type) for model_type in CONFIG_MAPPING.keys()}  # noqa: SIM118  empty until asked for
    found: dict[str, str] = {}
    for place in range(1 + heads):
        for model_type, names in by_type.items():
            for name in names[place : place + 1]:
                named_after = name.lower().startswith(re.sub("[-_]", "", model_type))
                if name not in found or (named_after and place == 0):
                    found[name] = (
                        model_type  # several types may have one class; most often it is named after its own
                    )
    return [(model_type, name) for name, model_type in found.items()]


def sweep(
    classes: Iterable[tuple[str, str]],
    done: Callable[[Result], None],
    *,
    workers: int = 2,
    seconds: float = 240,
) -> None:
    """Check classes, each in a process of its own; `done` is called with each result as it comes."""
    _preload()
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(list(classes)))
    running: dict[Connection, tuple[Any, tuple[str, str], Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            which = waiting.pop()
            folder = Path(tempfile.mkdtemp(prefix="sweep"))
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_in_child, args=(*which, folder, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (process, which, folder, time.monotonic())
        ready = wait(list(running), timeout=0.5)
        for receiver, (process, which, folder, started) in list(running.items()):
            result = None
            if receiver in ready:
                try:
                    result = receiver.recv()
                except EOFError:
                    process.join()
                    result = {
                        "status": "crash",
                        "stage": "process",
                        "problem": f"exit code {process.exitcode}",
                    }
            elif time.monotonic() - started > seconds:
                process.kill()
                result = {"status": "float fails", "stage": "time", "problem": f"more than {seconds:.0f} s"}
                with contextlib.suppress(OSError):
                    if (folder / "float" / "config.json").exists():
                        result["status"] = "crash"
            if result is not None:
                process.join()
                receiver.close()
                del running[receiver]
                shutil.rmtree(folder, ignore_errors=True)
                taken = round(time.monotonic() - started, 1)
                done({"model_type": which[0], "class": which[1], **result, "seconds": taken})


def _preload() -> None:
    """What every class needs, once for all, and without a thread."""
    import transformers.generation.utils
    import transformers.masking_utils
    import transformers.modeling_layers  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")
    cpu.load()


def _in_child(model_type: str, class_name: str, folder: Path, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        result = check(model_type, class_name, folder)
    except Exception as problem:
        result = {"status": "crash", **_described("sweep", problem)}
    sender.send({**result, "processor_seconds": round(time.process_time(), 1)})


# ---------------------------------------------------------------- the report

FAULTS = ("crash", "wrong", "differs after reload", "differs in memory")


def report(results: list[Result]) -> str:
    """The results as Markdown: totals, what is wrong, what is quantized little and why, a line for each class."""
    ran = sorted(
        (r for r in results if r["status"] != "float fails"), key=lambda r: (r["model_type"], r["class"])
    )
    failing = [r for r in results if r["status"] == "float fails"]
    right = [r for r in ran if r["status"] == "right"]
    faults = [r for r in ran if r["status"] in FAULTS]
    measured = [r for r in ran if r.get("share") is not None]
    low = sorted((r for r in measured if r["share"] < LOW_SHARE), key=lambda r: r["share"])
    types = len({r["model_type"] for r in ran})
    totals = [("right", len(right)), *((fault, sum(r["status"] == fault for r in ran)) for fault in FAULTS)]
    unstable = [r for r in right if "error_of_noise" in r]
    sections = [
        "# The sweep",
        f"{len(ran)} classes of {types} model types ran; {len(failing)} more could not be made or fail in float.",
        _table(("", "classes"), [(name, str(number)) for name, number in totals]),
    ]
    if unstable:
        sections.append(
            f"{len(unstable)} of the right ones choose (experts, queries, codes), so that a rounding error may decide "
            "otherwise: with weights moved by as little as a kernel rounds they differ in float too, or with other "
            f"random weights they do not differ: {', '.join(r['class'] for r in unstable)}."
        )
    if measured:
        shares = [
            statistics.median(r[key] for r in measured if r[key] is not None)
            for key in ("share", "share_of_matrices")
        ]
        sections.append(
            f"Median share of the parameters outside embeddings and head that is quantized: {shares[0]:.1%}, without "
            f"biases and norms {shares[1]:.1%}."
        )
    if faults:
        sections += [
            "## Faults",
            _table(
                ("model type", "class", "status", "stage", "problem"),
                [
                    (r["model_type"], r["class"], r["status"], r.get("stage", ""), r.get("problem", "")[:300])
                    for r in faults
                ],
            ),
        ]
    if low:
        sections += [
            "## Less than 90 % quantized",
            _table(
                ("model type", "class", "share", "left in float"),
                [(r["model_type"], r["class"], f"{r['share']:.0%}", _reasons(r)) for r in low],
            ),
        ]
    sections += [
        "## Every class",
        _table(
            ("model type", "class", "made", "inputs", "status", "error", "error to float", "share"),
            [_line(r) for r in ran],
        ),
    ]
    if failing:
        sections += [
            "## Float fails",
            _table(
                ("model type", "class", "why"),
                [(r["model_type"], r["class"], r.get("problem", "")[:200]) for r in failing],
            ),
        ]
    return "\n\n".join(sections) + "\n"


def _line(r: Result) -> tuple[str, ...]:
    errors = [f"{r[key]:.0e}" if key in r else "" for key in ("error", "error_to_float")]
    share = f"{r['share']:.1%}" if r.get("share") is not None else ""
    return (
        r["model_type"],
        r["class"],
        r.get("way", ""),
        " ".join(r.get("inputs", ())),
        r["status"],
        *errors,
        share,
    )


def _reasons(result: Result) -> str:
    return "; ".join(f"{reason} ({size / result['outside']:.0%})" for reason, size in result["left"].items())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in row) + " |" for row in cells)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=Path("sweep.jsonl"), help="JSON lines; what is there is not run again"
    )
    parser.add_argument("--report", type=Path, help="where the report goes; standard output by default")
    parser.add_argument("--only", default="", help="regular expression on model type or class")
    parser.add_argument("--heads", type=int, default=1, help="classes of a model type beside its base model")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="for one class")
    args = parser.parse_args()

    before = (
        [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    )
    known = {r["class"] for r in before}
    chosen = [
        (model_type, name)
        for model_type, name in candidates(args.heads)
        if name not in known and (re.search(args.only, model_type) or re.search(args.only, name))
    ]
    results = list(before)
    with args.results.open("a") as file:

        def done(result: Result) -> None:
            results.append(result)
            print(json.dumps(result), file=file, flush=True)
            print(f"{len(results)} {result['class']}: {result['status']}", file=sys.stderr, flush=True)

        sweep(chosen, done, workers=args.workers, seconds=args.seconds)
    text = report(results)
    if args.report is None:
        print(text)
    else:
        args.report.write_text(text)
    sys.exit(any(r["status"] in FAULTS for r in results))


if __name__ == "__main__":
    main()
