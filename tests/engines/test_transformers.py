"""transformers' own server and batches: a quantized model behaves there as a float one does."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from mono_quant_hf import MonoQuantConfig

QUESTION = [{"role": "user", "content": "What is the largest planet?"}]


@pytest.fixture(scope="module")
def quantized(smollm2, tmp_path_factory):
    """SmolLM2 with its tokenizer, asymmetric int8."""
    folder = tmp_path_factory.mktemp("quantized")
    AutoModelForCausalLM.from_pretrained(
        smollm2, quantization_config=MonoQuantConfig(), dtype=torch.float32
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.real_model
def test_generate_batch_with_a_bounded_cache_gives_the_tokens_of_generate(quantized):
    model, tokenizer = loaded(quantized), AutoTokenizer.from_pretrained(quantized)
    prompts = [tokenizer(text).input_ids for text in ("The capital of France is", "Water boils at")]
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    bounded = ContinuousBatchingConfig(page_size=32, num_blocks=16, max_batch_tokens=64)
    answers = model.generate_batch(prompts, settings, continuous_batching_config=bounded)
    got = {tuple(answer.prompt_ids): list(answer.generated_tokens) for answer in answers.values()}
    assert [got[tuple(prompt)] for prompt in prompts] == expected


@pytest.mark.real_model
def test_transformers_serve_answers_the_openai_client(quantized, tmp_path):
    openai = pytest.importorskip("openai", reason="the client of the server: pip install openai")
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="the server wants it: pip install 'transformers[serving]'")
    model, tokenizer = loaded(quantized), AutoTokenizer.from_pretrained(quantized)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = tmp_path / "log"
    with log.open("w") as output_file:
        server = subprocess.Popen(
            [*command, *options], env=dict(os.environ), stdout=output_file, stderr=output_file
        )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        wish = {"model": str(quantized), "messages": QUESTION, "max_tokens": 12, "temperature": 0}
        for _ in range(120):
            assert server.poll() is None, log.read_text()[-2000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(1)
        stream = client.chat.completions.create(**wish, stream=True)
        parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        assert "".join(part for part in parts if part) == expected
        assert client.chat.completions.create(**wish).choices[0].message.content == expected
    finally:
        server.terminate()
        server.wait(60)
