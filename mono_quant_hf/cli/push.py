"""`mono-quant-hf push`: a quantized model's folder to the Hub, with a model card."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .output import add_json_argument, check_output_files, show

DESCRIPTION = """\
Push a folder with a model quantized by mono_quant_hf to the Hugging Face Hub in one commit: weights, config,
tokenizer or processor, and a model card with what was quantized, sizes and what was measured. A card that is
there already, in the folder or on the Hub, is kept and extended. Log in first (hf auth login), or set HF_TOKEN.
"""
EPILOG = """\
examples:
  mono-quant-hf push model-int8 me/model-int8 --base-model org/model --license apache-2.0
  mono-quant-hf push model-int8 me/model-int8 --evaluation results.json --plot errors.png --private
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `push` to the subcommands."""
    command = commands.add_parser(
        "push",
        help="push a quantized model to the Hub, with a model card",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder of a model that save_pretrained wrote"
    )
    command.add_argument("repo", metavar="REPO", help="name on the Hub, such as me/model-int8")
    command.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        metavar="FILE",
        help="JSON with results of mono_quant_hf.evaluation, for the card; may be given more than once",
    )
    command.add_argument(
        "--plot", type=Path, action="append", metavar="FILE", help="an image for the card; may be repeated"
    )
    command.add_argument("--base-model", metavar="ID", help="the float model on the Hub")
    command.add_argument("--license", metavar="NAME", help="as the Hub names it, such as apache-2.0")
    command.add_argument("--private", action="store_true", help="make a new repo private")
    command.add_argument("--revision", metavar="BRANCH", help="push to this branch (main)")
    command.add_argument("--pull-request", action="store_true", help="open a pull request instead of pushing")
    command.add_argument("--message", metavar="TEXT", help="message of the commit")
    add_json_argument(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Push the folder; the exit code is 0, or a CommandError says why not."""
    from mono_quant_hf.hub import push_to_hub

    check_output_files(arguments.json)
    commit = push_to_hub(
        os.fspath(arguments.folder),
        arguments.repo,
        evaluation=arguments.evaluation,
        base_model=arguments.base_model,
        license=arguments.license,
        plots=arguments.plot or (),
        private=True if arguments.private else None,
        revision=arguments.revision,
        create_pr=arguments.pull_request,
        commit_message=arguments.message,
    )
    url = str(commit.pr_url or commit.commit_url)
    show(arguments, url, {"repo": arguments.repo, "url": url, "commit": commit.oid})
    return 0
