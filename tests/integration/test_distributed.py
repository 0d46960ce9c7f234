"""Two processes on the CPU (gloo): what works gives the same result, what does not is refused at load."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "hum",
]

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# With --cpu it starts one process, or several through MPI; with --multi_gpu several, which need no GPU.
ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += [
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_models.llama().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(["?", *WORDS]))}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(300)))
    return folder


def launch(*command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_the_example_shares_its_windows_and_gives_the_same_perplexity(launcher, folder, tmp_path):
    example = [str(ROOT / "examples" / "perplexity.py"), str(folder), "--text-file", str(folder / "text.txt")]
    example += ["--no-divergence", "--quiet", "--window", "32", "--stride", "16", "--weights", "both"]
    two = launch(*launcher, *example, "--json", str(tmp_path / "two.json"))
    assert two.returncode == 0, two.stderr
    assert "split over 2 processes" in two.stdout
    assert len(re.findall(r"^weights ", two.stdout, re.MULTILINE)) == 1  # one process tells
    alone = subprocess.run(
        [sys.executable, *example, "--json", str(tmp_path / "one.json")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert alone.returncode == 0
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["results"] for n in ("one", "two"))
    for alone, together in zip(one, two, strict=True):
        assert together["tokens"] == alone["tokens"] and together["weights"] == alone["weights"]
        assert together["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)


def test_quantizing_under_tensor_parallelism_is_refused_in_one_sentence(folder, tmp_path):
    script = tmp_path / "tp.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import torch.distributed as dist
            from transformers import AutoModelForCausalLM
            from transformers.distributed import DistributedConfig
            import mono_quant_hf

            dist.init_process_group("gloo")
            try:
                AutoModelForCausalLM.from_pretrained(
                    {str(folder)!r},
                    distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"),
                    quantization_config=mono_quant_hf.MonoQuantConfig(),
                )
            except ValueError as problem:
                print(f"REFUSED: {{problem}}", flush=True)
            dist.destroy_process_group()
            """
        )
    )
    run = launch(*TORCHRUN, str(script))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("REFUSED: Expected a checkpoint that is quantized already to be split") == 2
