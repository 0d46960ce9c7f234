import copy
import pickle

import pytest
import torch
from torch import nn

from mono_quant_hf.core import dequantize_codes, quantize_to_codes
from mono_quant_hf.modules import QuantizedLinear, quantize_linear_module

SETTINGS = pytest.mark.parametrize(
    ("dtype", "symmetric"), [(torch.qint8, False), (torch.qint8, True), (torch.float16, False)]
)


def make(in_features=20, out_features=7, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def by_hand(module, x, dtype, symmetric):
    """Arithmetic in float64 on the weight that the codes of core stand for."""
    weight = module.weight.detach()
    weight = (
        weight.half() if dtype is torch.float16 else dequantize_codes(*quantize_to_codes(weight, symmetric))
    )
    bias = None if module.bias is None else module.bias.detach().double()
    return nn.functional.linear(x.double(), weight.double(), bias)


@SETTINGS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_result_is_float_arithmetic_on_the_dequantized_weight(dtype, symmetric, bias, compute, autocast):
    module = make(bias=bias, dtype=compute)
    quantized = quantize_linear_module(module, dtype, symmetric)
    x = torch.randn(2, 3, 20).to(compute)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = quantized(x)
    assert y.dtype == compute and y.shape == (2, 3, 7)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[compute]
    torch.testing.assert_close(
        y.double(), by_hand(module, x, dtype, symmetric), rtol=tolerance, atol=tolerance
    )


@SETTINGS
def test_storage_is_what_the_format_says_before_and_after_a_forward(dtype, symmetric):
    quantized = quantize_linear_module(make(), dtype, symmetric)
    for _ in range(2):
        stored = {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in quantized.state_dict().items()
        }
        expected = {"bias": (torch.float32, (7,))}
        if dtype is torch.float16:
            expected["weight_float16"] = (torch.float16, (7, 20))
        else:
            expected |= {"weight_int8": (torch.int8, (7, 20)), "weight_scale": (torch.float32, (7, 1))}
            if not symmetric:
                expected["weight_zero_point"] = (torch.int8, (7, 1))
        assert stored == expected
        assert {name for name, p in quantized.named_parameters() if p.requires_grad} == {"bias"}
        quantized(torch.randn(1, 20))
        tensors = [t for t in vars(quantized).values() if isinstance(t, torch.Tensor)]
        assert not tensors and not quantized._buffers


@SETTINGS
def test_made_directly_it_is_usable_and_quantizes_its_own_weight(dtype, symmetric):
    torch.manual_seed(1)
    layer = QuantizedLinear(10, 5, dtype=dtype, symmetric=symmetric)
    torch.manual_seed(1)
    reference = nn.Linear(10, 5)
    x = torch.randn(4, 10)
    assert (layer(x) - reference(x)).abs().max() < 0.02
    assert isinstance(layer, nn.Linear) and QuantizedLinear(10, 5).weight_int8.dtype == torch.int8
    assert QuantizedLinear(10, 5, bias=False).bias is None


def test_extra_repr_says_what_it_is():
    assert "in_features=10, out_features=5, bias=True, weights=int8, asymmetric" in repr(
        QuantizedLinear(10, 5)
    )
    assert "weights=int8, symmetric" in repr(QuantizedLinear(10, 5, symmetric=True))
    assert "weights=float16" in repr(QuantizedLinear(10, 5, dtype=torch.float16))


@SETTINGS
@pytest.mark.parametrize(
    "survive",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half().float(),
        lambda m: m.double(),
        lambda m: m.type(torch.float32),
        lambda m: m.to(device="cpu", dtype=torch.float16),
        lambda m: m.train().eval().requires_grad_(False),
    ],
    ids=[
        "deepcopy",
        "pickle",
        "cpu",
        "bfloat16",
        "half-float",
        "double",
        "type",
        "device and dtype",
        "modes",
    ],
)
def test_nothing_is_lost(dtype, symmetric, survive):
    quantized = quantize_linear_module(make(), dtype, symmetric)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    survivor = survive(quantized)
    for name, tensor in before.items():
        if name != "bias":
            assert (
                torch.equal(survivor.state_dict()[name], tensor)
                and survivor.state_dict()[name].dtype == tensor.dtype
            )
    x = torch.randn(2, 20)
    torch.testing.assert_close(survivor(x), quantized(x), rtol=1e-2, atol=1e-2)
    assert survivor.quantization == quantized.quantization


def test_to_dtype_casts_the_bias_as_it_does_for_a_linear():
    assert quantize_linear_module(make()).to(torch.bfloat16).bias.dtype == torch.bfloat16


def test_to_meta_and_to_empty_keep_the_storage():
    quantized = quantize_linear_module(make()).to("meta")
    assert (
        quantized.weight.is_meta
        and quantized.weight_int8.is_meta
        and quantized.weight_int8.dtype == torch.int8
    )
    empty = quantized.to_empty(device="cpu")
    assert empty.weight_scale.dtype == torch.float32 and empty.weight_zero_point.device.type == "cpu"


@SETTINGS
def test_state_dict_round_trip_is_bit_identical(dtype, symmetric):
    source = quantize_linear_module(make(), dtype, symmetric)
    target = QuantizedLinear(20, 7, dtype=dtype, symmetric=symmetric)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("strict", [True, False])
def test_float_weights_are_not_cast_into_codes(strict):
    target = QuantizedLinear(20, 7)
    before, float_state = target.weight_int8.clone(), make().state_dict()
    with pytest.raises(RuntimeError, match=r"Expected weight to be absent .* got torch.float32; load float"):
        target.load_state_dict(float_state, strict=strict)
    with pytest.raises(RuntimeError, match=r"Expected weight_int8 to be torch.int8 .* got torch.float32"):
        target.load_state_dict({"weight_int8": float_state["weight"]}, strict=strict)
    assert torch.equal(target.weight_int8, before)


@SETTINGS
def test_gradients_are_those_of_the_dequantized_weight(dtype, symmetric):
    quantized = quantize_linear_module(make(), dtype, symmetric)
    x = torch.randn(3, 20, requires_grad=True)
    quantized(x).square().sum().backward()
    reference, x_reference = quantized.to_float(), x.detach().clone().requires_grad_()
    reference(x_reference).square().sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad)
    torch.testing.assert_close(quantized.bias.grad, reference.bias.grad)


@SETTINGS
def test_to_float_gives_the_original_class_back(dtype, symmetric):
    class Named(nn.Linear):
        pass

    module = Named(4, 3)
    restored = quantize_linear_module(module, dtype, symmetric).to_float(torch.bfloat16)
    assert type(restored) is Named and set(vars(restored)) - {"_is_hf_initialized"} == set(vars(module))
    assert restored.weight.dtype == restored.bias.dtype == torch.bfloat16 and restored.weight.requires_grad
    assert set(restored.state_dict()) == {"weight", "bias"}


def test_the_original_is_left_as_it_was():
    module = make()
    before = module.weight.detach().clone()
    quantized = quantize_linear_module(module)
    quantized.register_forward_hook(lambda *args: None)
    assert torch.equal(module.weight, before) and module.weight.dtype == torch.float32
    assert not module._forward_hooks and list(module.state_dict()) == ["weight", "bias"]


def test_hooks_and_mode_come_along():
    module, calls = make().eval(), []
    module.register_forward_hook(lambda *args: calls.append(1))
    quantized = quantize_linear_module(module)
    quantized(torch.randn(1, 20))
    assert calls == [1] and not quantized.training


def test_a_forward_of_its_own_runs():
    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    torch.manual_seed(0)
    module, x = Twice(20, 7), torch.randn(3, 20)
    quantized = quantize_linear_module(module)
    assert isinstance(quantized, Twice)
    torch.testing.assert_close(
        quantized(x).double(), 2 * by_hand(module, x, torch.qint8, False), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("module", "kwargs", "error", "words"),
    [
        (nn.Conv2d(1, 1, 1), {}, TypeError, "Conv2d"),
        (nn.Linear(2, 2), {"dtype": torch.quint8}, ValueError, "torch.qint8 or torch.float16"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            {},
            ValueError,
            "weight of its own, got ParametrizedLinear",
        ),
        (QuantizedLinear(2, 2), {}, ValueError, "weight of its own, got QuantizedLinear"),
    ],
)
def test_what_cannot_be_quantized_is_one_clear_error(module, kwargs, error, words):
    with pytest.raises(error, match=words):
        quantize_linear_module(module, **kwargs)


@pytest.mark.parametrize(
    ("value", "dtype", "words"), [(float("nan"), torch.qint8, "1 NaN"), (7e4, torch.float16, "65504")]
)
def test_a_bad_weight_names_the_parameter(value, dtype, words):
    module = make()
    module.weight.data[1, 2] = value
    with pytest.raises(ValueError, match=f"weight cannot be quantized.*{words}"):
        quantize_linear_module(module, dtype)


def test_no_elements_is_one_clear_error():
    with pytest.warns(UserWarning, match="zero-element"):
        module = nn.Linear(0, 3)
    with pytest.raises(ValueError, match="no elements"):
        quantize_linear_module(module)


@pytest.mark.parametrize("x", [torch.ones(1, 20, dtype=torch.int8), torch.ones(1, 20, dtype=torch.long)])
def test_an_integer_input_is_one_clear_error_with_the_remedy(x):
    quantized = QuantizedLinear.from_float(make(), "int8", False, name="vision.patch_embedding")
    with pytest.raises(
        TypeError, match=r"floating-point input of vision\.patch_embedding, got int(8|64); convert it"
    ):
        quantized(x)
