"""Put a quantized model on the Hub: weights, config, tokenizer or processor and card in one commit."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from transformers import PreTrainedModel

from mono_quant_hf.files import scratch_folder
from mono_quant_hf.modules import QuantizedModule

from .card import PLOTS_FOLDER, CardOptions, check_options, load_card, model_card
from .checkpoint import is_hub_id, read_facts
from .errors import HTTPError, HubError
from .folders import is_inside

OURS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Names of files that a push replaces as a whole: one that is not in the new set is taken away."""


class PushOptions(CardOptions, total=False):
    """How a model is pushed, and what its card says (see `CardOptions`).

    Attributes:
        private: whether a new repo is private; the owner's default if None.
        revision: branch to push to, made from `main` if it is not there.
        create_pr: open a pull request instead of pushing to the branch.
        commit_message: "Upload <name> quantized by mono_quant_hf" if None.
    """

    private: bool | None
    revision: str | None
    create_pr: bool
    commit_message: str | None


def push_to_hub(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    max_shard_size: int | str = "50GB",
    token: str | bool | None = None,
    **options: Unpack[PushOptions],
) -> CommitInfo:
    """Push a quantized model with a model card, in one commit.

    The repo is made if it is not there. A card that is in it already is kept and extended. Weight files of an earlier
    push that are no longer part of the model are removed in the same commit; files that did not change are not
    uploaded again.

    Args:
        model: a model quantized by mono_quant_hf, or the folder it was saved in.
        repo_id: such as `"me/model-int8"`.
        tokenizer, processor: pushed along; anything with `save_pretrained`. A folder brings its own.
        max_shard_size: where to split the weights, such as `"5GB"`.
        token: of the Hub; the saved one if None.
        options: for the card `evaluation`, `base_model` (found in the model's config where it was loaded from the Hub),
            `license` (carried over from the card of the float model), `plots` (uploaded too) and `notes`, see
            `CardOptions`; for the commit `private`, `revision`, `create_pr` and `commit_message`, see `PushOptions`.

    Returns:
        what huggingface_hub says of the commit: `commit_url`, `oid`, ...

    Raises:
        HubError: the model is not quantized by mono_quant_hf, or the Hub refuses or cannot be reached; then nothing
            was committed.
        TypeError: there is no such option.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from mono_quant_hf import push_to_hub, quantize_model
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
        >>> model = BertModel(config)
        >>> push_to_hub(model, "me/bert-int8")
        Traceback (most recent call last):
            ...
        mono_quant_hf.hub.errors.HubError: BertModel is not a transformers model quantized by mono_quant_hf; ...
        >>> push_to_hub(quantize_model(model), "me/bert-int8", license="apache-2.0")  # doctest: +SKIP
    """
    check_options("push_to_hub", options, PushOptions)
    with scratch_folder() as folder:
        if isinstance(model, (str, os.PathLike)):
            source = None
            _link(Path(model), folder)
        else:
            source = _save(model, folder, max_shard_size)
        for companion in (tokenizer, processor):
            if companion is not None:
                companion.save_pretrained(folder)
        # A mistake shows before anything is asked of the Hub.
        read_facts(folder if source is not None else Path(str(model)))
        _add_plots(options.get("plots") or (), folder)
        return _push(folder, repo_id, source or "", token, options)


def _add_plots(plots: Iterable[str | os.PathLike[str]], folder: Path) -> None:
    for plot in map(Path, plots):
        if not plot.is_file():
            raise HubError(f"The plot {plot} is no file; name an image, or leave it out.")
        (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(plot, folder / PLOTS_FOLDER / plot.name)


def _link(source: Path, folder: Path) -> None:
    """Links to the files of a model in `folder`: weights are large, and only read."""
    if not source.is_dir():
        raise HubError(f"{source} is no folder; name the folder of a saved model, or pass the model.")
    for file in sorted(source.rglob("*")):
        path = file.relative_to(source)
        if any(part.startswith(".") for part in path.parts):
            continue
        if not is_inside(file, source):
            raise HubError(
                f"{file} is a link that leads out of {source}, so it is not pushed; put the file itself there, or "
                "remove the link."
            )
        if file.is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(file.resolve())


def _save(model: Any, folder: Path, max_shard_size: int | str) -> str:
    """Save a model into `folder`; answer where the float model came from, or nothing."""
    if not isinstance(model, PreTrainedModel) or not any(
        isinstance(module, QuantizedModule) for module in model.modules()
    ):
        raise HubError(
            f"{type(model).__name__} is not a transformers model quantized by mono_quant_hf; quantize it first "
            "(from_pretrained with quantization_config=MonoQuantConfig(), or quantize_model)."
        )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return str(model.config.name_or_path or "")


def _push(
    folder: Path, repo_id: str, source: str, token: str | bool | None, options: PushOptions
) -> CommitInfo:
    """Push a folder with a model card that is written into it; `source` is where the float model came from."""
    api = HfApi(token=token, library_name="mono_quant_hf")
    revision, create_pr = options.get("revision"), options.get("create_pr", False)
    try:
        repo_id = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
        existing = None
        if "README.md" in there:  # by name and revision: ModelCard.load knows only the main branch
            file = hf_hub_download(repo_id, "README.md", revision=revision, token=token)
            existing = ModelCard.load(Path(file), ignore_metadata_errors=True)
        original = load_card(source, token) if source else None
        local = load_card(folder)
        about: Any = {key: options[key] for key in CardOptions.__annotations__ if key in options}  # type: ignore[literal-required]
        about["base_model"] = about.get("base_model") or _base_model(source, original, local)
        card = model_card(folder, repo_id, original=original, existing=existing or local, **about)
        card.save(folder / "README.md")
        return api.create_commit(
            repo_id,
            operations=_operations(folder, there),
            commit_message=options.get("commit_message")
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


def _base_model(source: str, original: ModelCard | None, local: ModelCard | None) -> Any:
    """Hub id of the float model; that of a quantized one is in its card."""
    for card in (original, local):
        data = card.data.to_dict() if card is not None else {}
        if "mono-quant" in (data.get("tags") or []):
            base = data.get("base_model")
            return base[0] if isinstance(base, list) and base else base
    return source if source and is_hub_id(source) else None


def _operations(folder: Path, there: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    new = {file.relative_to(folder).as_posix(): str(file) for file in folder.rglob("*") if file.is_file()}
    stale = [path for path in there - new.keys() if any(fnmatch.fnmatchcase(path, name) for name in OURS)]
    return [
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in sorted(new.items())),
        *(CommitOperationDelete(path_in_repo=path) for path in sorted(stale)),
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
