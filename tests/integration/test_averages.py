"""What would change codes as if they were weights is right, or one clear sentence."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.modules import quantize_linear_module
from tests import tiny_models
from tests.tiny_models import logits

WEIGHTS = pytest.mark.parametrize("weights", ["int8", "float16"])


@WEIGHTS
@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
@pytest.mark.parametrize("inside", [False, True])
def test_torch_averages_no_codes(multi_avg_fn, weights, inside):
    model = quantize_model(tiny_models.llama(layers=1), MonoQuantConfig(weights=weights))
    with pytest.raises(ValueError, match="average the float model and quantize the result"):
        AveragedModel(nn.Sequential(model) if inside else model, multi_avg_fn=multi_avg_fn)
    AveragedModel(tiny_models.llama(layers=1), multi_avg_fn=multi_avg_fn)


@WEIGHTS
def test_diffusers_leaves_codes_as_they_are(weights):
    ema_model = pytest.importorskip("diffusers.training_utils").EMAModel
    model = quantize_model(tiny_models.llama(layers=1), MonoQuantConfig(weights=weights))
    expected = logits(model)
    ema = ema_model(model.parameters(), decay=0.9)
    for _ in range(3):
        ema.step(model.parameters())
    ema.copy_to(model.parameters())
    assert torch.equal(logits(model), expected)


def test_a_float_average_of_state_dicts_is_refused():
    model = quantize_model(tiny_models.llama(layers=1))
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    average = {name: 0.9 * tensor + 0.1 * state[name] for name, tensor in state.items()}
    with pytest.raises(RuntimeError, match="load float weights into a float model and quantize it then"):
        model.load_state_dict(average)
    model.load_state_dict(state)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding, nn.Conv2d])
def test_codes_are_not_initialized(kind):
    layer = kind(8, 8, *[3] * (kind is nn.Conv2d))
    model = nn.Sequential(layer, nn.ReLU())
    config = MonoQuantConfig(quantize_embeddings=True)
    quantize_model(model, config)
    with pytest.raises(TypeError, match="0 is quantized and cannot be initialized"):
        model[0].reset_parameters()


@pytest.mark.parametrize("lazy", [nn.LazyLinear(8), nn.LazyConv2d(8, 3)], ids=["linear", "conv"])
def test_a_lazy_module_is_named_until_it_has_run(lazy):
    model = nn.Sequential(copy.deepcopy(lazy), nn.ReLU())
    with pytest.raises(ValueError, match=r"0\.weight is not initialized; run the model once"):
        quantize_model(model)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    quantize_model(model)
    assert tiny_models.relative_error(model(x), expected) < 0.02
    with pytest.raises(ValueError, match="its weight is not initialized; run the model once"):
        quantize_linear_module(nn.LazyLinear(8))


def test_gradients_are_clipped_and_vectors_made():
    model = quantize_model(tiny_models.llama(layers=1))
    model(input_ids=tiny_models.TOKENS, labels=tiny_models.TOKENS).loss.backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
    with pytest.raises(RuntimeError, match="floating point dtype can require gradients"):
        model.requires_grad_(True)


def test_a_float16_weight_is_no_weight_to_train():
    model = quantize_model(tiny_models.llama(layers=1), MonoQuantConfig(weights="float16"))
    expected = logits(model)
    model.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"q_proj without a gradient.*train adapters, or dequantize\(\) the model"
    ):
        model(input_ids=tiny_models.TOKENS)
    with torch.no_grad():
        assert torch.equal(logits(model), expected)
    model.requires_grad_(False)
    model(input_ids=tiny_models.TOKENS)


LOOPS = {
    "copy_": lambda p, q: p.copy_(0.9 * p + 0.1 * q),
    "lerp": lambda p, q: p.copy_(torch.lerp(p.float(), q.float(), 0.1)),
    "decay": lambda p, q: p.copy_(0.99 * p),
    "mul_": lambda p, q: p.mul_(2),
    "detach": lambda p, q: p.detach().add_(1),
}


@pytest.mark.parametrize("change", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("way", ["a copy", "in memory", "loaded", "used"])
def test_a_loop_over_parameters_changes_no_codes_in_silence(change, way, tmp_path):
    model = quantize_model(tiny_models.llama(layers=1))
    average = copy.deepcopy(model) if way == "a copy" else model
    if way == "loaded":
        model.save_pretrained(tmp_path)
        average = type(model).from_pretrained(tmp_path)
    if way == "used":
        logits(average)
    with torch.no_grad():
        for p, q in zip(average.parameters(), copy.deepcopy(model).parameters(), strict=True):
            change(p, q)
    with pytest.raises(
        RuntimeError, match="got codes that were changed in place since; average or change the float"
    ):
        logits(average)


def test_what_changes_codes_by_right_is_let_through(tmp_path):
    model = quantize_model(tiny_models.llama(layers=1))
    expected = logits(model)
    state = copy.deepcopy(model.state_dict())
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for assign in (False, True):
            other.load_state_dict(state, assign=assign)
            assert torch.equal(logits(other), expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), expected)
    with torch.inference_mode():
        assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(model.share_memory()), expected)
    assert torch.equal(logits(model.to("cpu")), expected)


def test_a_tensor_in_the_place_of_another_is_no_change_of_it():
    """Offloading puts new tensors where old ones were, which may get their ids."""
    layer, x = quantize_linear_module(nn.Linear(8, 4)), torch.randn(1, 8)
    draw, ids = random.Random(0), set()
    for _ in range(1000):
        del layer._parameters["weight_int8"]
        between = [nn.Parameter(torch.zeros(1)) for _ in range(draw.randrange(4))]
        codes = torch.zeros(4, 8, dtype=torch.int8)
        if draw.random() < 0.5:
            codes.fill_(1)
        layer.weight_int8 = nn.Parameter(codes, requires_grad=False)
        ids.add(id(layer.weight_int8))
        del codes, between
        layer(x)
    assert len(ids) < 1000
