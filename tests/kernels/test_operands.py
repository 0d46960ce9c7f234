"""Operands no layer would give: each is one error or the right result, and never the end of the process."""

import pytest
import torch

from mono_quant_hf.kernels import expand, linear, quantize

from .own_process import run
from .test_linear import WAYS, codes

TABLE = """
    import warnings
    warnings.simplefilter("ignore")  # of torch: nested and sparse tensors are in beta
    N, K = 24, 40

    def freed(tensor, kept=0):
        tensor = tensor.clone()
        tensor.untyped_storage().resize_(kept)
        return tensor

    def later(tensor):
        return torch.cat((tensor.new_zeros(5), tensor.flatten()))[5:].view(tensor.shape)

    def cut(tensor):
        view = later(tensor)
        view.untyped_storage().resize_(tensor.nbytes)
        return view

    def negated(tensor):
        return torch._neg_view(-tensor.clamp(min=-127) if tensor.dtype == torch.int8 else -tensor)

    class Subclass(torch.Tensor):
        pass

    leaked = {}
    torch.vmap(lambda x: leaked.setdefault(0, x))(torch.ones(N, K))

    RIGHT = {
        "begins later in its storage": later,
        "a negative view": negated,
        "one row for all": lambda t: t[:1].expand(t.shape),
        "with gaps": lambda t: torch.stack((t, t), -1)[..., 0],
        "stored transposed": lambda t: t.t().contiguous().t(),
        "a subclass": lambda t: t.as_subclass(Subclass),
        "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    }
    WRONG = {
        "freed": freed,
        "smaller by a byte": lambda t: freed(t, t.nbytes - 1),
        "cut at its offset": cut,
        "of one dimension less": lambda t: t[0],
        "of one dimension more": lambda t: t[None],
        "a row too few": lambda t: t[:-1],
        "transposed": lambda t: t.t(),
        "on meta": lambda t: t.to("meta"),
        "sparse": lambda t: t.to_sparse(),
        "sparse by rows": lambda t: t.view(len(t), -1).to_sparse_csr(),
        "nested": lambda t: torch.nested.nested_tensor([t, t]),
        "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        "int64": lambda t: t.long(),
        "complex": lambda t: t.to(torch.complex64).conj(),
        "bool": lambda t: t.bool(),
        "qint8": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        "the other kind": lambda t: t.half() if t.dtype == torch.int8 else t.to(torch.int8),
        "left over from a vmap": lambda t: leaked[0],
        "lazy": lambda t: torch.nn.parameter.UninitializedBuffer(),
    }
    ops = torch.ops.mono_quant
    ENTRIES = {
        "linear": (linear, 1),
        "operator": (ops.linear, 1),
        "operator, int8 activations": (lambda x, w, s, z, b: ops.linear(x, w, s, z, b, "int8"), 1),
        "operator backward": (lambda x, w, s, z, b: ops.linear_backward(x, w, s, z), 0),
        "linear of float16": (lambda x, w, s, z, b: linear(x, w, None, None, b), 1),
        "operator of float16": (lambda x, w, s, z, b: ops.linear(x, w, None, None, b), 1),
        "operator backward of float16": (lambda x, w, s, z, b: ops.linear_backward(x, w, None, None), 0),
        "expand": (lambda x, w, s, z, b: expand(w, s, z), None),
    }

    def operands(entry, inner):
        half = "16" in entry
        weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        return {
            "x": torch.randn(20, K if inner else N),
            "weight": weight.half() if half else weight,
            "scale": None if half else torch.rand(N, 1),
            "zero_point": None if half else torch.randint(-127, 128, (N, 1), dtype=torch.int8),
            "bias": torch.randn(N) if inner else None,
        }

    def exact(inner, x, weight, scale, zero_point, bias):
        full = torch.Tensor(weight).double()
        full = full if zero_point is None else full - zero_point.double()
        full = full if scale is None else full * scale.double()
        if inner is None:
            return full
        product = x.double() @ (full.t() if inner else full)
        return product if bias is None else product + bias.double()

    for entry, (call, inner) in ENTRIES.items():
        for name, good in operands(entry, inner).items():
            if good is None or (entry == "expand" and name in ("x", "bias")):
                continue
            for change in (*RIGHT, *WRONG):
                for gradient in (False, True):
                    given = operands(entry, inner)
                    given["x"].requires_grad_(gradient)
                    try:
                        given[name] = {**RIGHT, **WRONG}[change](given[name].detach())
                    except Exception:
                        continue  # no such tensor: a bias has no rows to leave out
                    print(entry, name, change, gradient, flush=True)
                    try:
                        result = call(*given.values())
                    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                        assert change in WRONG and str(error), error
                        continue
                    if change == "jagged":
                        continue  # the portable way is torch's own, which knows them
                    error = (result.double() - exact(inner, *given.values())).norm()
                    limit = 0.03 if "activations" in entry else 1e-3
                    assert error <= limit * exact(inner, *given.values()).norm(), error
                    assert change not in ("freed", "smaller by a byte", "cut at its offset")

    y = linear(torch.randn(3, 512, requires_grad=True), weight, scale, zero_point)
    weight.untyped_storage().resize_(0)
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "was freed" in str(error)
    else:
        raise SystemExit("a backward without its weight")
"""


@pytest.mark.parametrize("way", WAYS)
def test_each_is_one_error_or_the_right_result(way):
    run(TABLE, MONO_QUANT_KERNEL=way, OMP_NUM_THREADS="1")


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def test_what_is_wrong_is_said_in_one_sentence():
    weight, scale, zero_point = codes(6, 8)
    x = torch.randn(3, 8)
    for error, sentence, call in (
        (RuntimeError, "weight .* was freed", lambda: linear(x, freed(weight), scale)),
        (RuntimeError, "input .* was freed", lambda: linear(freed(x), weight, scale)),
        (RuntimeError, "scale .* was freed", lambda: expand(weight, freed(scale))),
        (RuntimeError, "weight .* was freed", lambda: quantize(freed(torch.randn(600, 600)))),
        (TypeError, "Expected a float16 weight, got torch.int8", lambda: linear(x, weight)),
        (TypeError, "int8 codes, got torch.float16", lambda: linear(x, weight.half(), scale)),
        (
            TypeError,
            "zero_point of int8, got torch.int32",
            lambda: linear(x, weight, scale, zero_point.int()),
        ),
        (TypeError, "no zero_point without a scale", lambda: linear(x, weight.half(), None, zero_point)),
        (
            TypeError,
            "floating bias, got torch.int8",
            lambda: linear(x, weight, scale, None, zero_point[:, 0]),
        ),
        (TypeError, "floating dtype, got torch.int8", lambda: expand(weight, scale, None, torch.int8)),
        (RuntimeError, r"weight \[N, K\], got \[1, 6, 8\]", lambda: linear(x, weight[None], scale)),
        (RuntimeError, r"scale \[6\] does not fit", lambda: linear(x, weight, scale[:, 0])),
        (RuntimeError, r"scale \[2, 6, 1\] does not fit", lambda: expand(weight, scale.expand(2, 6, 1))),
        (RuntimeError, "dense input, got torch.sparse_coo", lambda: linear(x.to_sparse(), weight, scale)),
        (RuntimeError, "clone it", lambda: linear(x, weight, torch._efficientzerotensor((6, 1)))),
    ):
        with pytest.raises(error, match=sentence):
            call()


def test_compiled_code_sees_freed_memory_too():
    weight, scale, zero_point = codes(24, 40)
    compiled = torch.compile(lambda *operands: linear(*operands) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 40)
    torch.testing.assert_close(
        compiled(x, weight, scale, zero_point), linear(x, weight, scale, zero_point) + 1
    )
    with pytest.raises(RuntimeError, match=r"weight .* was freed"):
        compiled(x, freed(weight), scale, zero_point)


def test_a_default_device_is_not_where_codes_are_written():
    floats = torch.randn(600, 600)
    with torch.device("meta"):
        made = quantize(floats)
    for one, other in zip(made, quantize(floats), strict=True):
        assert torch.equal(one, other)
