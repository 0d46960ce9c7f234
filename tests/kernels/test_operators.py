"""The torch operators: gradients, compiling, exporting, tracing, transforms."""

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mono_quant_hf.kernels import expand, linear, use_kernel

from .test_linear import WAYS, codes

# torch's own compiler does both, and one test traces on purpose.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be:DeprecationWarning"),
]


def weights(kind):
    return (
        codes(24, 40, symmetric=kind == "symmetric")
        if kind != "half"
        else (torch.randn(24, 40).half(), None, None)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ("asymmetric", "symmetric", "half"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_are_those_of_the_dequantized_weight(way, kind, dtype):
    weight, scale, zero_point = weights(kind)
    full = expand(weight, scale, zero_point)
    for shape in ((40,), (1, 40), (2, 3, 40)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        bias = torch.randn(24, requires_grad=True)
        with use_kernel(way):
            y = linear(x, weight, scale, zero_point, bias)
            grad = torch.randn_like(y)
            to_x, to_bias = torch.autograd.grad(y, (x, bias), grad)
        x32 = x.detach().float().requires_grad_()
        like_x, like_bias = torch.autograd.grad(functional.linear(x32, full, bias), (x32, bias), grad.float())
        assert to_x.dtype == dtype
        torch.testing.assert_close(
            to_x.float(), like_x.to(dtype).float(), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4
        )
        torch.testing.assert_close(
            to_bias, like_bias, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=2e-2
        )


def test_gradcheck():
    weight, scale, zero_point = codes(5, 7)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: linear(x, weight, scale, zero_point, bias), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: linear(x, weight, scale, zero_point), (x,))


def test_nothing_expanded_waits_for_the_backward():
    weight, scale, zero_point = codes(24, 40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        linear(torch.randn(2, 40, requires_grad=True), weight, scale, zero_point)
    assert not [tensor for tensor in saved if tensor.is_floating_point() and tensor.numel() >= weight.numel()]


def test_operators_keep_torchs_rules():
    weight, scale, zero_point = codes(24, 40)
    x, bias = torch.randn(3, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    ops = torch.ops.mono_quant
    half = torch.randn(24, 40).half()
    torch.library.opcheck(ops.linear.default, (x, weight, scale, zero_point, bias))
    torch.library.opcheck(ops.linear.default, (x, weight, scale, zero_point, bias, "int8"))
    torch.library.opcheck(ops.linear.default, (x, weight, scale, None, None))
    torch.library.opcheck(ops.linear.default, (x, half, None, None, bias))
    grad = torch.randn(3, 24, requires_grad=True)
    torch.library.opcheck(ops.linear_backward.default, (grad, weight, scale, zero_point))
    torch.library.opcheck(ops.linear_backward.default, (grad, half, None, None))


@pytest.mark.parametrize("kind", ("asymmetric", "half"))
def test_compiles_without_a_graph_break(kind):
    torch.compiler.reset()  # both kinds compile the same lines: each has the limit of recompilations to itself
    weight, scale, zero_point = weights(kind)
    bias = torch.randn(24)

    def layers(x):
        return functional.silu(linear(x, weight, scale, zero_point, bias)) * 2

    compiled = torch.compile(layers, fullgraph=True, dynamic=True)
    for shape in ((1, 40), (2, 3, 40)):
        x = torch.randn(shape, requires_grad=True)
        y, same = layers(x), compiled(x)
        torch.testing.assert_close(same, y)
        grad = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(same, x, grad), torch.autograd.grad(y, x, grad))
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x.detach()), layers(x.detach()))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert compiled(x.detach()).dtype == torch.float32


def test_the_portable_way_compiles_to_plain_operations():
    weight, scale, zero_point = codes(24, 40)
    x = torch.randn(2, 40)
    with use_kernel("portable"):
        compiled = torch.compile(
            lambda x: linear(x, weight, scale, zero_point), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x), linear(x, weight, scale, zero_point))


class Layer(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        for name, tensor in zip(("weight", "scale", "zero_point"), weights(kind), strict=True):
            parameter = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)

    def forward(self, x):
        return linear(x, self.weight, self.scale, self.zero_point)


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("kind", ("asymmetric", "half"))
def test_export(kind, strict):
    layer = Layer(kind)
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(layer, (torch.randn(3, 40),), dynamic_shapes=shapes, strict=strict)
    assert any(str(node.target).startswith("mono_quant.linear") for node in program.graph.nodes)
    x = torch.randn(5, 40)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_jit_trace_records_the_operator():
    layer = Layer("asymmetric")
    traced = torch.jit.trace(layer, (torch.randn(3, 40),))
    x = torch.randn(3, 40)
    torch.testing.assert_close(traced(x), layer(x))


def test_inference_mode_and_checkpointing():
    layer = Layer("asymmetric")
    x = torch.randn(3, 40, requires_grad=True)
    with torch.inference_mode():
        assert layer(x).is_inference()
    y = layer(x)
    again = checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), x), torch.autograd.grad(y.sum(), x))


def test_fake_tensors_and_counters_see_an_operator():
    layer = Layer("asymmetric")
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        layer(torch.ones(1, 40))
    assert "mono_quant.linear.default" in seen
