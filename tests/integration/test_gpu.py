"""Models on a GPU, as people use them there; `make test-gpu` runs these where there is one."""

import copy
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, StaticCache

from mono_quant_hf import MonoQuantConfig, quantize_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHAPE = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, pad_token_id=0),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0),
}
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A float checkpoint."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(FAMILIES[request.param]).save_pretrained(path)
    return path


def load(folder, dtype=torch.float32, device="cuda", **settings):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=device, quantization_config=MonoQuantConfig(**settings)
    ).eval()


def tokens(count, device="cuda"):
    return (torch.arange(count, device=device) * 37 % 319 + 1).unsqueeze(0)


def relative_error(got, exact):
    return float((got.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm())


@pytest.mark.parametrize("weights", ["int8", "float16"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("count", [1, 7, 600])
def test_a_model_computes_there_what_it_does_on_a_cpu(folder, dtype, weights, count):
    with torch.no_grad():
        exact = load(folder, device="cpu", weights=weights).double()(tokens(count, "cpu")).logits
        got = load(folder, dtype, weights=weights)(tokens(count)).logits
    assert got.is_cuda and got.dtype == dtype
    assert relative_error(got, exact) < BOUNDS[dtype]


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantized_there_it_has_the_codes_of_a_cpu_and_comes_back_from_disk(folder, tmp_path, symmetric):
    there, here = load(folder, symmetric=symmetric), load(folder, device="cpu", symmetric=symmetric)
    for name, tensor in here.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), tensor), name
    there.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda").eval()
    assert torch.equal(again(tokens(9)).logits, there(tokens(9)).logits)


def test_it_generates_there_what_its_float_weights_would(folder):
    model = load(folder, torch.bfloat16)
    prompt = tokens(5)
    text = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert text.shape == (1, 17)
    assert torch.equal(text, model.generate(prompt, max_new_tokens=12, do_sample=False))


def test_a_row_is_the_same_whatever_is_beside_it(folder):
    model = load(folder, torch.bfloat16)
    batch = torch.cat((tokens(6), tokens(6).flip(1)))
    others = torch.cat((tokens(6), torch.full((1, 6), 5, device="cuda")))
    with torch.no_grad():
        assert torch.equal(model(batch).logits[0], model(others).logits[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_and_replayed_from_a_graph_it_is_as_eager(folder):
    model = load(folder, torch.bfloat16)
    if model.config.model_type == "mixtral":
        pytest.skip("transformers' experts break the graph")
    run = torch.compile(model, fullgraph=True)
    given = {
        "input_ids": tokens(1),
        "position_ids": torch.zeros(1, 1, dtype=torch.long, device="cuda"),
    }
    with torch.no_grad():
        eager = model(**given, past_key_values=StaticCache(config=model.config, max_cache_len=32)).logits
        cache = StaticCache(config=model.config, max_cache_len=32)
        for _ in range(3):
            run(**given, past_key_values=cache)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = run(**given, past_key_values=cache).logits
        graph.replay()
    assert relative_error(replayed, eager) < BOUNDS[torch.bfloat16]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_train_there_with_the_gradients_of_the_float_model(folder):
    peft = pytest.importorskip("peft")
    model = load(folder)
    exact = copy.deepcopy(model).dequantize()
    gradients = []
    for base in (model, exact):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        adapted(tokens(20), labels=tokens(20)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None]))
    assert relative_error(*gradients) < 1e-3


def test_int8_activations_stay_near(folder):
    model, rounded = load(folder, torch.bfloat16), load(folder, torch.bfloat16, activations="int8")
    with torch.no_grad():
        assert relative_error(rounded(tokens(64)).logits, model(tokens(64)).logits) < 0.05


def test_a_model_quantized_in_memory_is_smaller_there():
    gc.collect()
    others = torch.cuda.memory_allocated()
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 8}, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).cuda().bfloat16()
    before = torch.cuda.memory_allocated() - others
    quantize_model(model)
    gc.collect()
    assert torch.cuda.memory_allocated() - others < 0.65 * before
    assert torch.isfinite(model(tokens(4)).logits).all()
