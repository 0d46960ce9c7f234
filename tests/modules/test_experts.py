"""Fused experts: classes of transformers, and classes invented here that no list can hold."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AriaTextConfig, GptOssConfig, Llama4TextConfig, MixtralConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mono_quant_hf import kernels
from mono_quant_hf.modules import FloatView, QuantizedModule, quantized_class_for

from .settings import COMPUTE, SETTINGS, SURVIVALS, check_storage_survives, float_twin


class RoutedMixing(nn.Module):
    """Invented: one parameter used through a local name, one transposed, one that may be absent, and a bias."""

    def __init__(self, experts=3, width=6, inner=10):
        super().__init__()
        self.widen = nn.Parameter(torch.randn(experts, inner, width) / 2)
        self.narrow = nn.Parameter(torch.randn(experts, inner, width) / 2)
        self.extra = nn.Parameter(torch.randn(experts, width, width)) if experts > 3 else None
        self.narrow_bias = nn.Parameter(torch.randn(experts, width))

    def forward(self, x, chosen):
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            wide, rows = self.widen[expert], chosen == expert
            inner = torch.relu(F.linear(x[rows], wide))
            y[rows] = inner @ self.narrow[expert] + self.narrow_bias[expert]
            if self.extra is not None:
                y[rows] = torch.matmul(y[rows], self.extra[expert].T)
        return self.finish(y)

    def finish(self, y):
        return y * self.widen.shape[0]


class AllAtOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 5))
        self.down = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x):
        return torch.bmm(torch.bmm(x, self.up.transpose(1, 2)), self.down)


TINY = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4}
ROUTES = torch.tensor([[0, 2], [1, 2], [0, 1], [2, 0], [3, 1]])


def routed(config_class, experts_class, **more):
    def make():
        experts = experts_class(config_class(**TINY, **more))
        for parameter in experts.parameters():
            parameter.data = torch.randn(parameter.shape) / 4
        return experts, (torch.randn(5, 16), ROUTES, torch.full((5, 2), 0.5))

    return make


def llama4():
    experts = Llama4TextExperts(Llama4TextConfig(**TINY))
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape) / 4
    return experts, (torch.randn(4 * 5, 16),)


# what makes module and inputs; the axes of the scales
KINDS = {
    "mixtral": (routed(MixtralConfig, MixtralExperts), {"gate_up_proj": (0, 1), "down_proj": (0, 1)}),
    "gpt-oss": (routed(GptOssConfig, GptOssExperts), {"gate_up_proj": (0, 2), "down_proj": (0, 2)}),
    "aria": (
        routed(AriaTextConfig, AriaExperts, moe_num_experts=4, moe_topk=2),
        {"gate_up_proj": (0, 2), "down_proj": (0, 2)},
    ),
    "llama4": (llama4, {"gate_up_proj": (0, 2), "down_proj": (0, 2)}),
    "invented": (
        lambda: (RoutedMixing(), (torch.randn(7, 6), torch.arange(7) % 3)),
        {"widen": (0, 1), "narrow": (0, 1)},
    ),
    "invented, more": (
        lambda: (RoutedMixing(experts=5), (torch.randn(7, 6), torch.arange(7) % 3)),
        {"widen": (0, 1), "narrow": (0, 1), "extra": (0, 1)},
    ),
    "invented bmm": (lambda: (AllAtOnce(), (torch.randn(3, 4, 5),)), {"up": (0, 1), "down": (0, 1)}),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def exact_products():
    with kernels.use_kernel("portable"):
        yield


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    module, inputs = KINDS[kind][0]()
    config = getattr(module, "config", None)
    if config is not None:
        config._experts_implementation = "eager"
    cast = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    return module.to(dtype), cast, KINDS[kind][1]


def quantize(module, weights="int8", symmetric=False):
    return quantized_class_for(module).from_float(module, weights, symmetric, "mlp.experts")


def call(module, inputs):
    return module(*(x.clone() for x in inputs))


@SETTINGS
@EACH_KIND
@COMPUTE
def test_result_is_float_arithmetic_on_the_dequantized_weights(kind, weights, symmetric, compute):
    module, inputs, axes = make(kind, compute)
    quantized = quantize(module, weights, symmetric)
    assert isinstance(quantized, QuantizedModule) and isinstance(quantized, type(module))
    assert quantized.weight_axes == axes
    exact_inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = call(float_twin(module, axes, weights, symmetric), exact_inputs).detach()
    y = call(quantized, inputs)
    assert y.dtype == compute
    # Several products in a row are rounded to the compute dtype in between.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[compute]
    torch.testing.assert_close(
        y.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


@SETTINGS
@EACH_KIND
def test_storage_is_shaped_as_the_float_weights_with_scales_per_expert_and_output(kind, weights, symmetric):
    module, inputs, axes = make(kind)
    quantized = quantize(module, weights, symmetric)
    call(quantized, inputs)
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in quantized.state_dict().items()}
    expected = {name: (p.dtype, tuple(p.shape)) for name, p in module.named_parameters() if name not in axes}
    for name, dims in axes.items():
        shape = tuple(getattr(module, name).shape)
        channels = tuple(size if dim in dims else 1 for dim, size in enumerate(shape))
        expected[f"{name}_{weights}"] = (torch.float16 if weights == "float16" else torch.int8, shape)
        if weights == "int8":
            expected[f"{name}_scale"] = (torch.float32, channels)
            if not symmetric:
                expected[f"{name}_zero_point"] = (torch.int8, channels)
    assert stored == expected


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_selected_implementation_computes_the_same(implementation):
    module, inputs, _ = make("mixtral")
    module.config._experts_implementation = implementation
    reference = call(quantize(module).to_float(), inputs)
    torch.testing.assert_close(call(quantize(module), inputs), reference, rtol=1e-4, atol=1e-4)
    assert module.config._experts_implementation == implementation


def test_no_more_than_one_expert_is_expanded_at_a_time_and_none_is_kept():
    module, inputs, _ = make("mixtral")
    quantized = quantize(module)
    largest = max(p[0].numel() for p in module.parameters())
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        call(quantized, inputs)
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert 0 < max(allocated) <= 4 * largest
    inputs[0].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(quantized, inputs)
    floats = [t for t in kept if t.is_floating_point() and not isinstance(t, FloatView)]
    assert floats and not [t for t in floats if t.numel() >= largest]


@EACH_KIND
def test_gradients_are_those_of_the_dequantized_weights(kind):
    module, inputs, _ = make(kind)
    quantized = quantize(module)
    reference = quantized.to_float()
    assert type(reference) is type(module) and set(vars(reference)) - {"_is_hf_initialized"} == set(
        vars(module)
    )
    gradients = []
    for either in (quantized, reference):
        x = inputs[0].clone().requires_grad_()
        either(x, *inputs[1:]).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


@EACH_KIND
@SETTINGS
@SURVIVALS
def test_nothing_is_lost(kind, weights, symmetric, survive):
    module, _, _ = make(kind)
    quantized = quantize(module, weights, symmetric)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    check_storage_survives(quantized, survive(quantized), before)


@EACH_KIND
def test_copies_and_reloaded_state_compute_the_same(kind):
    module, inputs, _ = make(kind)
    source = quantize(module)
    expected = call(source, inputs)
    assert torch.equal(call(copy.deepcopy(source), inputs), expected)
    other = make(kind)[0]
    for parameter in other.parameters():
        parameter.data += 1
    target = quantize(other)
    target.load_state_dict(source.state_dict())
    assert torch.equal(call(target, inputs), expected)


def test_a_class_says_by_a_flag_that_its_outputs_come_last():
    class Flagged(AllAtOnce):
        is_transposed = True

    assert quantize(Flagged()).weight_axes == {"up": (0, 2), "down": (0, 2)}


def test_experts_side_by_side_in_a_matrix_have_a_scale_for_each_row():
    class MatrixExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(3 * 8, 5))

        def forward(self, x, expert):
            return x @ self.w1.view(3, 8, 5)[expert].t()

    torch.manual_seed(0)
    module, x = MatrixExperts(), torch.randn(4, 5)
    quantized = quantize(module)
    assert quantized.w1_scale.shape == (24, 1)
    torch.testing.assert_close(quantized(x, 1), quantized.to_float()(x, 1))
    torch.testing.assert_close(quantized(x, 1), module(x, 1), rtol=0, atol=0.1)


def test_repr_says_what_is_inside():
    text = repr(quantize(make("invented")[0], symmetric=True))
    assert text == "QuantizedRoutedMixing(weights=int8, symmetric)"
