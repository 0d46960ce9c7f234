"""EleutherAI's lm_eval evaluates a saved quantized checkpoint with `--model hf` and the import, without a network."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from mono_quant_hf import quantize_model
from tests.evaluation.conftest import WORDS, make_llama, make_tokenizer

pytest.importorskip("lm_eval")

TASK = """\
task: continue_sentence
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
COMMAND = "import mono_quant_hf; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


@pytest.fixture
def task(tmp_path):
    rows = [
        {"question": " ".join(WORDS[n : n + 4]), "choices": [WORDS[n + 4], "mat cat", "red"], "answer": 0}
        for n in range(12)
    ]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "task" / "task.yaml").write_text(TASK.format(rows=tmp_path / "task" / "rows.jsonl"))
    return tmp_path / "task", rows


def accuracy_by_hand(model, tokenizer, rows):
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context, whole = (
                tokenizer(t, add_special_tokens=False)["input_ids"]
                for t in (row["question"], f"{row['question']} {choice}")
            )
            with torch.no_grad():
                logp = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            scores.append(sum(float(logp[n - 1, whole[n]]) for n in range(len(context), len(whole))))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


def test_the_command_line_of_lm_eval(tmp_path, task):
    folder, rows = task
    tokenizer = make_tokenizer()
    quantize_model(make_llama()).save_pretrained(tmp_path / "int8")
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"  # which every causal model has
    tokenizer.save_pretrained(tmp_path / "int8")
    done = subprocess.run(
        [
            *[
                sys.executable,
                "-c",
                COMMAND,
                "--model",
                "hf",
                "--device",
                "cpu",
                "--tasks",
                "continue_sentence",
            ],
            *["--model_args", f"pretrained={tmp_path / 'int8'},dtype=float32,add_bos_token=False"],
            *["--include_path", str(folder), "--output_path", str(tmp_path / "out")],
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(file.read_text())["results"]["continue_sentence"]["acc,none"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert loaded.is_quantized and found == pytest.approx(accuracy_by_hand(loaded, tokenizer, rows))
