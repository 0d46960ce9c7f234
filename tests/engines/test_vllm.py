"""vLLM serves checkpoints of this package as they are: its greedy tokens are those of transformers."""

import socket
import subprocess
import time

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mono_quant_hf import MonoQuantConfig

PROMPTS = [[5, 17, 33, 2, 71], [9, 200, 14, 15, 16, 44, 260, 3, 8, 121, 77, 31]]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest of vLLM's attention on a CPU
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def llama(**settings):
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings))


def tied_qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen3_moe():
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))


MIXED = {
    "*.q_proj": {"weights": "float16"},
    "*.k_proj": {"weights": "float"},
    "*.up_proj": {"symmetric": True},
    "*.0.mlp.down_proj": {"weights": "float"},
}


def quantized(folder, make, **settings):
    """A checkpoint, and the model that transformers loads of it."""
    torch.manual_seed(0)
    make().save_pretrained(folder / "float")
    return quantized_folder(folder / "float", folder / "quantized", **settings)


def quantized_folder(source, folder, **settings):
    config = MonoQuantConfig(**settings)
    AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32
    ).save_pretrained(folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def greedy(model, prompts=PROMPTS, tokens=24):
    """Tokens by transformers. No two may be so near that the order of a float32 sum decides between them."""
    answers = []
    for prompt in prompts:
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 0.005
        answers.append(output.sequences[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(llama, {"symmetric": True}, id="llama-symmetric"),
        pytest.param(llama, {"weights": "float16", "quantize_embeddings": True}, id="llama-float16"),
        pytest.param(
            lambda: llama(attention_bias=True),
            {"module_overrides": MIXED, "activations": "int8"},
            id="llama-parts-that-differ",
        ),
        pytest.param(tied_qwen3, {"quantize_embeddings": True}, id="qwen3-tied"),
        pytest.param(mixtral, {}, id="mixtral"),
        pytest.param(qwen3_moe, {"quantize_embeddings": True}, id="qwen3-moe"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(vllm, tmp_path, make, settings):
    folder, model = quantized(tmp_path, make, **settings)
    assert vllm.generate(folder, PROMPTS, enforce_eager=True) == greedy(model)


@pytest.mark.parametrize("make", [tied_qwen3, mixtral])
def test_tensor_parallelism(vllm, tmp_path, make):
    folder, model = quantized(tmp_path, make, quantize_embeddings=make is tied_qwen3)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": True}
    assert vllm.generate(folder, PROMPTS, **options) == greedy(model)


def test_compiled_as_vllm_does_by_default(vllm, tmp_path):
    folder, model = quantized(tmp_path, qwen3_moe, quantize_embeddings=True)
    assert vllm.generate(folder, PROMPTS) == greedy(model)


@pytest.mark.real_model
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"symmetric": True}, id="symmetric"),
        pytest.param({}, id="asymmetric"),
        pytest.param({"quantize_embeddings": True}, id="tied"),
    ],
)
def test_smollm2(vllm, smollm2, tmp_path, settings):
    folder, model = quantized_folder(smollm2, tmp_path / "quantized", **settings)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the largest planet?"}]
    prompts = [
        tokenizer("The capital of France is").input_ids,
        tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False),
    ]
    expected = greedy(model, prompts, tokens=12)
    assert vllm.generate(folder, prompts, tokens=12, enforce_eager=True) == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_adapter(vllm, tmp_path):
    folder, model = quantized(tmp_path, llama)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = greedy(adapted.eval())
    options = {"enforce_eager": True, "enable_lora": True, "max_lora_rank": 8}
    assert vllm.generate(folder, PROMPTS, adapter=tmp_path / "adapter", **options) == expected
    with adapted.disable_adapter():
        assert greedy(adapted) != expected


def test_a_revision_on_the_hub(vllm, hub, environment, tmp_path):
    _, asymmetric = quantized(tmp_path / "main", tied_qwen3)
    _, symmetric = quantized(tmp_path / "branch", tied_qwen3, symmetric=True, quantize_embeddings=True)
    asymmetric.push_to_hub("me/tiny")
    hub.repos["me/tiny"].branches["symmetric"] = hub.repos["me/tiny"].branches["main"]
    symmetric.push_to_hub("me/tiny", revision="symmetric")
    options = {"variables": environment, "enforce_eager": True}
    assert vllm.generate("me/tiny", PROMPTS, revision="symmetric", **options) == greedy(symmetric)


def test_a_layout_without_a_form_is_one_clear_error(vllm, tmp_path):
    folder, _ = quantized(
        tmp_path, mixtral, quantize_embeddings=True
    )  # vLLM's Mixtral has a float table only
    error = vllm.generate(folder, PROMPTS, enforce_eager=True)
    assert "Expected a layer of vLLM's model that takes the quantized weights of model.embed_tokens" in error
    assert "quantize_embeddings=False" in error


def test_a_damaged_checkpoint_is_refused(vllm, tmp_path):
    folder, _ = quantized(tmp_path, llama)
    file = folder / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    error = vllm.generate(folder, PROMPTS, enforce_eager=True)
    assert "is not what was saved with this config.json" in error


def test_vllm_serve_answers_the_openai_client(vllm, smollm2, tmp_path):
    openai = pytest.importorskip("openai")
    folder, model = quantized_folder(smollm2, tmp_path / "quantized")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(folder)
    prompt = "The capital of France is"
    expected = tokenizer.decode(greedy(model, [tokenizer(prompt).input_ids], 12)[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [vllm.python, "-m", "vllm.entrypoints.cli.main", "serve", folder, "--port", str(port)]
    options = "--host 127.0.0.1 --dtype float32 --max-model-len 128 --max-num-seqs 2 --served-model-name m"
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, *options.split()], env=vllm.environment, stdout=output, stderr=output
        )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        wish = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        assert client.completions.create(**wish).choices[0].text == expected
        stream = client.completions.create(**wish, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
    finally:
        server.terminate()
        server.wait(60)
