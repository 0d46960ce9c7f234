"""`activations="int8"` through the life of a model: which modules, the accuracy, saved and reloaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.kernels import use_kernel
from mono_quant_hf.modules import QuantizedModule
from tests import tiny_models


@pytest.fixture(autouse=True)
def int8_way():
    """Also on a processor without the instructions."""
    with use_kernel("int8"):
        yield


def activations_of(model):
    return {n: m.quantization.activations for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def test_config_overrides_save_and_reload(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "float")
    config = MonoQuantConfig(
        activations="int8",
        module_overrides={
            "*.down_proj": {"activations": None},
            "*.q_proj": {"weights": "float16"},
        },
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    found = activations_of(model)
    assert {n.rpartition(".")[2] for n, a in found.items() if a is None} == {"down_proj", "q_proj"}
    assert {n.rpartition(".")[2] for n, a in found.items() if a == "int8"} == {
        *("k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj"),
    }
    assert "activations=int8" in repr(model.model.layers[0].mlp.up_proj)
    assert {d.module: d.activations for d in model.hf_quantizer.decisions if d.quantized} == found
    model.save_pretrained(tmp_path / "int8")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8").eval()
    assert activations_of(reloaded) == found
    ids = torch.arange(40)[None] % 64
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)
        rounded = model(ids).logits
        with use_kernel("portable"):
            exact = model(ids).logits
    assert not torch.equal(rounded, exact)
    assert tiny_models.relative_error(rounded, exact) < 0.05  # 7 bits without VNNI
    floats = model.dequantize()
    assert not any(hasattr(module, "activations") for module in floats.modules())


def test_the_projections_of_gpt2_and_modules_that_are_no_product():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64, n_positions=64))
    quantize_model(gpt2, MonoQuantConfig(activations="int8"))
    assert set(activations_of(gpt2).values()) == {"int8"}
    gpt2.eval()(torch.arange(40)[None] % 64)
    resnet = quantize_model(tiny_models.resnet(), MonoQuantConfig(activations="int8"))
    by_name = {d.module: d for d in resnet.hf_quantizer.decisions}
    convolutions = [d for d in by_name.values() if d.kind == "Conv2d"]
    assert convolutions and all(d.quantized and d.activations is None for d in convolutions)


@pytest.mark.real_model
def test_perplexity_of_smollm2_stays_within_one_percent(smollm2):
    import pydoc_data.topics

    from transformers import AutoTokenizer

    from mono_quant_hf.evaluation import perplexity

    text = "\n".join(pydoc_data.topics.topics.values())[:20000]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    scores = []
    for config in (None, MonoQuantConfig(activations="int8")):
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, quantization_config=config)
        scored = perplexity(model, tokenizer, text, window=512, stride=512, max_tokens=2048, progress=False)
        scores.append(scored.perplexity)
    assert abs(scores[1] / scores[0] - 1) < 0.01
