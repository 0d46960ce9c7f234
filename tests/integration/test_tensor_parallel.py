"""Checkpoints split over processes as they load (gloo, on the CPU) give the logits of one process."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.distributed.configuration_utils import DistributedConfig

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.integration.tensor_parallel import check_can_be_split
from tests import tiny_models
from tests.integration.test_distributed import launch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TIED = MonoQuantConfig(quantize_embeddings=True)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), MonoQuantConfig()),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True), TIED),
    "llama float16": (LlamaForCausalLM, LlamaConfig(**SIZES), MonoQuantConfig(weights="float16")),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8), MonoQuantConfig(symmetric=True)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, head_dim=8), TIED),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4), MonoQuantConfig()),
}

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
import mono_quant_hf
from tests import tiny_models

size, *folders = sys.argv[1:]
dist.init_process_group("gloo")
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=int(size), tp_plan="auto")
    )
    logits = tiny_models.logits(model)
    whole = sum(p.numel() for p in model.parameters())
    held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
    if dist.get_rank() == 0:
        try:
            model.save_pretrained(f"{folder}/again")
        except RuntimeError as problem:
            assert "Expected a model in one piece" in str(problem)
        else:
            raise AssertionError("a split model was saved")
        torch.save((logits, held / whole), f"{folder}/split-{size}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, (model_class, config, quantization) in MODELS.items():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        base = tmp_path_factory.mktemp("base")
        model.save_pretrained(base)
        quantized = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization)
        made[name] = tmp_path_factory.mktemp("quantized")
        quantized.save_pretrained(made[name])
    return made


@pytest.mark.parametrize("processes", [2, 4])
def test_a_split_checkpoint_gives_the_logits_of_one_process(processes, folders, tmp_path):
    script = tmp_path / "split.py"
    script.write_text(SCRIPT)
    paths = [str(folder) for folder in folders.values()]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = launch(*launcher, str(script), str(processes), *paths)
    assert run.returncode == 0, run.stderr[:4000] + run.stderr[-4000:]
    for name, folder in folders.items():
        split, share = torch.load(folder / f"split-{processes}.pt")
        alone = tiny_models.logits(AutoModelForCausalLM.from_pretrained(folder))
        torch.testing.assert_close(
            split, alone, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert share < 0.9, name


@pytest.mark.parametrize("other", ["fsdp_size", "pp_size", "ep_size"])
def test_other_ways_to_split_are_refused(other):
    config = LlamaConfig(**SIZES)
    config.distributed_config = DistributedConfig(tp_size=2, **{other: 2})
    with pytest.raises(ValueError, match=f"tensor parallelism alone .* got {other}"):
        check_can_be_split(config, pre_quantized=True)
