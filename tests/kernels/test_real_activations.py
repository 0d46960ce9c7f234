"""The products of SmolLM2's layers with what really goes into them, whose largest value is up to 25,000 medians."""

import pydoc_data.topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.modules import QuantizedLinear


@pytest.mark.real_model
def test_every_token_and_layer_of_smollm2_is_60_decibels_from_float_arithmetic(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(pydoc_data.topics.topics["for"], return_tensors="pt").input_ids[:, :48]
    model = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, quantization_config=MonoQuantConfig()
    ).eval()
    lowest: dict[str, tuple[float, int]] = {}  # by module: the worst decibels, and of which token
    steepest = 0.0

    def compare(module, inputs, output):
        nonlocal steepest
        x = inputs[0][0]
        expected = x.double() @ module.dequantized(dtype=torch.float64).T
        alone = ((row, module.forward(x[row])) for row in (slice(0, 1), slice(47, 48)))
        for rows, result in ((slice(0, 48), output[0]), *alone):
            exact = expected[rows]
            error = (result.double() - exact).square().sum(-1)
            decibels = 10 * torch.log10(exact.square().sum(-1) / error.clamp_min(1e-30))
            worst = float(decibels.min())
            if worst < lowest.get(module.quantization.module_name, (float("inf"), 0))[0]:
                lowest[module.quantization.module_name] = worst, rows.start + int(decibels.argmin())
        steepest = max(steepest, float((x.abs().amax(-1) / x.abs().median(-1).values).max()))

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(compare)
    with torch.no_grad():
        model(ids)
    assert len(lowest) == 210
    assert steepest > 1000  # the hard case is among them
    name, (decibels, token) = min(lowest.items(), key=lambda item: item[1][0])
    assert decibels >= 60, f"{name}, token {token}: {decibels:.1f} dB"


@pytest.mark.real_model
def test_int8_activations_keep_the_perplexity_of_smollm2(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(pydoc_data.topics.topics["for"], return_tensors="pt").input_ids[:, :256]
    losses = []
    for activations in (None, "int8"):
        model = AutoModelForCausalLM.from_pretrained(
            smollm2, dtype=torch.float32, quantization_config=MonoQuantConfig(activations=activations)
        )
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    plain, rounded = losses
    assert abs(rounded - plain) < 0.01  # 1 % of perplexity
