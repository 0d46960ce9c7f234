"""FSDP2 over int8 codes with LoRA: two processes (gloo, on the CPU) train as one does; FSDP1 is refused."""

import pytest
import torch

from mono_quant_hf import MonoQuantConfig, quantize_model
from tests import tiny_models
from tests.integration.test_distributed import TORCHRUN, launch

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TRAIN = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from tests.integration.test_fsdp import lora_model, train

dist.init_process_group("gloo")
model = lora_model("int8" if sys.argv[2] == "fsdp1" else sys.argv[2])
if sys.argv[2] == "fsdp1":
    try:
        FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    except ValueError as problem:
        print(f"REFUSED: {problem}", flush=True)
else:
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = train(model)
    codes = model.base_model.model.model.layers[0].mlp.up_proj.base_layer._parameters
    name = "weight_int8" if "weight_int8" in codes else "weight_float16"
    if dist.get_rank() == 0:
        torch.save((losses, codes[name].to_local().shape, codes[name].dtype), sys.argv[1])
dist.barrier()
dist.destroy_process_group()
"""


def lora_model(weights):
    model = tiny_models.llama()
    quantize_model(model, MonoQuantConfig(weights=weights))
    torch.manual_seed(1)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_dropout=0.0)
    return peft.get_peft_model(model, lora)


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tiny_models.TOKENS, labels=tiny_models.TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(tmp_path, what):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    finished = launch(*TORCHRUN, str(script), str(tmp_path / "result.pt"), what)
    assert finished.returncode == 0, finished.stderr[:4000]
    return finished.stdout


@pytest.mark.parametrize("weights", ["int8", "float16"])
def test_lora_under_fsdp2_has_the_losses_of_one_process(weights, tmp_path):
    run(tmp_path, weights)
    losses, shape, dtype = torch.load(tmp_path / "result.pt")
    alone = train(lora_model(weights))
    assert losses == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0]
    assert shape == (44, 32) and dtype == getattr(torch, weights)  # half of the codes, as they are


def test_fsdp1_is_refused_in_one_sentence(tmp_path):
    printed = run(tmp_path, "fsdp1")
    assert printed.count("REFUSED: Must flatten tensors with uniform dtype") == 2  # torch's own words
