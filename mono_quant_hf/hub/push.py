"""Put a quantized model on the Hub: weights, config, tokenizer or processor and card in one commit."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedModel

from mono_quant_hf.files import scratch_folder
from mono_quant_hf.modules import QuantizedModule

from .card import PLOTS_FOLDER, load_card, model_card
from .checkpoint import is_hub_id, read_facts
from .errors import HTTPError, HubError
from .folders import is_inside

OURS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Names of files that a push replaces as a whole: one that is not in the new set is taken away."""


def push_to_hub(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    evaluation: Any = None,
    base_model: str | None = None,
    license: str | None = None,
    plots: Sequence[str | os.PathLike[str]] = (),
    notes: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    max_shard_size: int | str = "50GB",
    token: str | bool | None = None,
) -> CommitInfo:
    """Push a quantized model with a model card, in one commit.

    The repo is made if it is not there. A card that is in it already is kept and extended. Weight files of an earlier
    push that are no longer part of the model are removed in the same commit; files that did not change are not
    uploaded again.

    Args:
        model: a model quantized by mono_quant_hf, or the folder it was saved in.
        repo_id: such as `"me/model-int8"`.
        tokenizer, processor: pushed along; anything with `save_pretrained`. A folder brings its own.
        evaluation: for the card: results of `mono_quant_hf.evaluation`, one or more, an `Evaluation` (which adds the
            name of the data and the command), or a JSON file of such.
        base_model: Hub id of the float model; found in the model's config where it was loaded from the Hub.
        license: as the Hub names it; carried over from the card of the float model if None.
        plots: images to upload and show in the card.
        notes: a paragraph of Markdown of your own for the card.
        private: whether a new repo is private; the owner's default if None.
        revision: branch to push to, made from `main` if it is not there.
        create_pr: open a pull request instead of pushing to the branch.
        commit_message: "Upload <name> quantized by mono_quant_hf" if None.
        max_shard_size: where to split the weights, such as `"5GB"`.
        token: of the Hub; the saved one if None.

    Returns:
        what huggingface_hub says of the commit: `commit_url`, `oid`, ...

    Raises:
        HubError: the model is not quantized by mono_quant_hf, or the Hub refuses or cannot be reached; then nothing
            was committed.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from mono_quant_hf import push_to_hub, quantize_model
        >>> config = BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=32)
        >>> model = BertModel(config)
        >>> push_to_hub(model, "me/bert-int8")
        Traceback (most recent call last):
            ...
        mono_quant_hf.hub.errors.HubError: BertModel is not a transformers model quantized by mono_quant_hf; ...
        >>> push_to_hub(quantize_model(model), "me/bert-int8", license="apache-2.0")  # doctest: +SKIP
    """
    api = HfApi(token=token, library_name="mono_quant_hf")
    with scratch_folder() as folder:
        source = _gather(model, folder, tokenizer, processor, max_shard_size)
        read_facts(
            folder if isinstance(model, PreTrainedModel) else model
        )  # a mistake shows before anything is asked of the Hub
        for plot in plots:
            if not Path(plot).is_file():
                raise HubError(f"The plot {plot} is no file; name an image, or leave it out.")
            (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(plot, folder / PLOTS_FOLDER / Path(plot).name)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            there = _files_there(api, repo_id, revision)
            existing = _existing_card(repo_id, revision, token) if "README.md" in there else None
            original = load_card(source, token) if source else None
            local = load_card(folder)
            card = model_card(
                folder,
                repo_id,
                evaluation=evaluation,
                base_model=base_model or _base_model(source, original, local),
                license=license,
                original=original,
                existing=existing or local,
                plots=plots,
                notes=notes,
            )
            card.save(folder / "README.md")
            return api.create_commit(
                repo_id,
                operations=_operations(folder, there),
                commit_message=commit_message
                or f"Upload {repo_id.rpartition('/')[2]} quantized by mono_quant_hf",
                revision=revision,
                create_pr=create_pr,
            )
        except HfHubHTTPError as problem:
            raise HubError(_explained(repo_id, problem)) from problem
        except HubError:
            raise
        except (OSError, RuntimeError, HTTPError) as problem:
            cause = problem.__cause__ or problem
            raise HubError(
                f"Pushing to {repo_id} failed before the commit, so the repo is as it was "
                f"({type(cause).__name__}: {cause}); check the connection and push again: what was uploaded is kept."
            ) from problem


def _gather(model: Any, folder: Path, tokenizer: Any, processor: Any, max_shard_size: int | str) -> str:
    """Put everything to push into `folder`; answer where the float model came from, or nothing."""
    if isinstance(model, (str, os.PathLike)):
        source = Path(model)
        if not source.is_dir():
            raise HubError(f"{source} is no folder; name the folder of a saved model, or pass the model.")
        for file in sorted(source.rglob("*")):
            target = folder / file.relative_to(source)
            if any(part.startswith(".") for part in file.relative_to(source).parts):
                continue
            if not is_inside(file, source):
                raise HubError(
                    f"{file} is a link that leads out of {source}, so it is not pushed; put the file itself there, or "
                    "remove the link."
                )
            if file.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                # Weights are large and only read: a link will do.
                target.symlink_to(file.resolve())
        origin = ""
    else:
        if not isinstance(model, PreTrainedModel) or not any(
            isinstance(module, QuantizedModule) for module in model.modules()
        ):
            raise HubError(
                f"{type(model).__name__} is not a transformers model quantized by mono_quant_hf; quantize it first "
                "(from_pretrained with quantization_config=MonoQuantConfig(), or quantize_model)."
            )
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        origin = str(model.config.name_or_path or "")
    for companion in (tokenizer, processor):
        if companion is not None:
            companion.save_pretrained(folder)
    return origin


def _base_model(source: str, original: ModelCard | None, local: ModelCard | None) -> Any:
    """Hub id of the float model; that of a quantized one is in its card."""
    for card in (original, local):
        data = card.data.to_dict() if card is not None else {}
        if "mono-quant" in (data.get("tags") or []):
            base = data.get("base_model")
            return base[0] if isinstance(base, list) and base else base
    return source if source and is_hub_id(source) else None


def _files_there(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    try:
        return set(api.list_repo_files(repo_id, revision=revision))
    except RevisionNotFoundError:
        return set()


def _existing_card(repo_id: str, revision: str | None, token: str | bool | None) -> ModelCard | None:
    # Downloaded by name and revision: ModelCard.load knows only the main branch.
    try:
        file = hf_hub_download(repo_id, "README.md", revision=revision, token=token)
    except EntryNotFoundError:
        return None
    return ModelCard.load(Path(file), ignore_metadata_errors=True)


def _operations(folder: Path, there: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    new = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    stale = sorted(
        path for path in there - new.keys() if any(fnmatch.fnmatchcase(path, pattern) for pattern in OURS)
    )
    return [
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file)) for path, file in new.items()),
        *(CommitOperationDelete(path_in_repo=path) for path in stale),
    ]


def _explained(repo_id: str, problem: HfHubHTTPError) -> str:
    status = problem.response.status_code if problem.response is not None else None
    said = problem.server_message or str(problem).strip().splitlines()[0]
    remedy = {
        401: "log in with a token that may write (hf auth login, or the variable HF_TOKEN)",
        403: "this account may not write there: choose a name under your own account or organization",
        404: "check the name, and that the token may see the repo",
        409: "another push was made meanwhile, push again",
        412: "another push was made meanwhile, push again",
    }.get(status or 0, "try again later")
    if isinstance(problem, RepositoryNotFoundError):
        remedy = "check the name, and that the token is valid and may write there"
    return f"The Hub refused the push to {repo_id} ({status}: {said}); {remedy}. Nothing was committed."
