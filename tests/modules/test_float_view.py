"""Code that reads a weight itself, in whatever way, meets the float weight that the codes stand for."""

import copy
import functools
import io
import operator
import pickle
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mono_quant_hf.modules import FloatView, quantized_class_for
from tests.tiny_models import relative_error

from .settings import SETTINGS

ROWS = torch.tensor([3, 0, 11, 3])


class Experts(nn.Module):
    """`[experts, out, in]`, used by whoever holds it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 12, 20) / 4)


MODULES = {
    "linear": lambda: nn.Linear(20, 12),
    "projection": lambda: Conv1D(12, 20),
    "embedding": lambda: nn.Embedding(12, 20),
    "conv1d": lambda: nn.Conv1d(20, 12, 3),
    "conv2d": lambda: nn.Conv2d(20, 12, 3),
    "transposed": lambda: nn.ConvTranspose1d(20, 12, 3),
    "experts": Experts,
}


def twins(kind="linear", weights="int8", symmetric=False):
    """A quantized module, and the float one of the weights that its codes stand for."""
    torch.manual_seed(0)
    module = MODULES[kind]()
    quantized = quantized_class_for(module).from_float(module, weights, symmetric)
    return quantized, quantized.to_float().requires_grad_(False)


# ---------------------------------------------------------------- ways to read the weight of a Linear, x is [5, 20]


def helper(weight, x):
    return F.linear(x, weight)


def nested(m, x):
    def inner():
        weight = m.weight

        def innermost():
            return x @ weight.T

        return innermost()

    return inner()


def for_loop_over_rows(m, x):
    columns = []
    for row in m.weight:
        columns.append(x @ row)
    return torch.stack(columns, -1)


def while_loop(m, x):
    start, parts = 0, []
    while start < m.weight.shape[0]:
        parts.append(F.linear(x, m.weight[start : start + 5]))
        start += 5
    return torch.cat(parts, -1)


def loop_over_modules(m, x):
    for module in [m] * 3:
        for name in ("weight",):
            x = x + F.linear(F.linear(x, getattr(module, name)), getattr(module, name).T) / 20
    return x


def loop_with_else(m, x):
    for weight in (m.weight, None):
        if weight is None:
            break
        x = F.linear(x, weight)
    else:
        raise AssertionError
    return x


def recursion(m, x, depth=2):
    return x if depth == 0 else recursion(m, x + F.linear(x, m.weight) @ m.weight / 20, depth - 1)


def generator(m, x):
    return torch.cat(list(F.linear(x, weight) for weight in m.weight.chunk(3)), -1)


def starred(m, x):
    first, *rest = m.weight.unbind()
    return torch.stack([x @ first, *(x @ row for row in rest)], -1)


def match(m, x):
    match (m.weight, m.bias):
        case (weight, None):
            return x @ weight
        case (weight, bias):
            return torch.addmm(bias, x, weight.t())


def walrus(m, x):
    return F.linear(x, weight) if (weight := m.weight).dim() == 2 else x


def try_finally(m, x):
    try:
        return F.linear(x, m.weight)
    finally:
        del m


@dataclass
class Holder:
    weight: torch.Tensor


Pair = namedtuple("Pair", ["weight", "bias"])


class Callable:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return F.linear(x, self.weight)


def into_a_buffer(m, x):
    buffer = torch.empty(m.weight.shape)
    buffer.copy_(m.weight)
    return F.linear(x, buffer)


def with_out(m, x):
    return F.linear(x, torch.mul(m.weight, 2, out=torch.empty(12, 20)))


LINEAR = {
    # products
    "F.linear": lambda m, x: F.linear(x, m.weight),
    "F.linear with bias": lambda m, x: F.linear(x, m.weight, m.bias),
    "F.linear by keywords": lambda m, x: F.linear(input=x, weight=m.weight, bias=m.bias),
    "F.linear of a vector": lambda m, x: F.linear(x[0], m.weight),
    "F.linear of a batch": lambda m, x: F.linear(x.expand(2, 3, 5, 20), m.weight, m.bias),
    "@ .t()": lambda m, x: x @ m.weight.t(),
    "@ .T": lambda m, x: x @ m.weight.T,
    "@ .mT": lambda m, x: x @ m.weight.mT,
    "@ .transpose": lambda m, x: x @ m.weight.transpose(0, 1),
    "@ .permute": lambda m, x: x @ m.weight.permute(1, 0),
    "@ the other way round": lambda m, x: F.linear(x, m.weight) @ m.weight,
    "weight @ x": lambda m, x: m.weight @ x.T,
    "weight @ a vector": lambda m, x: m.weight @ x[0],
    "matmul of a batch": lambda m, x: torch.matmul(x.expand(2, 5, 20), m.weight.T),
    "mm": lambda m, x: torch.mm(x, m.weight.t()),
    "mv": lambda m, x: torch.mv(m.weight, x[0]),
    "bmm": lambda m, x: torch.bmm(x[None], m.weight.T[None]),
    "addmm": lambda m, x: torch.addmm(m.bias, x, m.weight.t()),
    "addmm, scaled": lambda m, x: torch.addmm(m.bias, x, m.weight.t(), beta=0.5, alpha=2),
    "baddbmm": lambda m, x: torch.baddbmm(m.bias, x[None], m.weight.T[None]),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.weight),
    "einsum, weight first": lambda m, x: torch.einsum("oi,bi->bo", m.weight, x),
    "einsum, heads": lambda m, x: torch.einsum("bi,hdi->hbd", x, m.weight.view(3, 4, 20)),
    "tensordot": lambda m, x: torch.tensordot(x, m.weight, dims=([1], [1])),
    "inner": lambda m, x: torch.inner(x, m.weight),
    "by itself": lambda m, x: x @ (m.weight.T @ m.weight),
    "F.conv1d": lambda m, x: F.conv1d(x[:, :, None], m.weight[:, :, None], m.bias),
    "F.bilinear": lambda m, x: F.bilinear(x[:, :4], x, m.weight.view(3, 4, 20)),
    # parts
    "rows": lambda m, x: F.linear(x, m.weight[2:7], m.bias[2:7]),
    "every second row": lambda m, x: F.linear(x, m.weight[::2]),
    "columns": lambda m, x: F.linear(x[:, 3:9], m.weight[:, 3:9]),
    "narrow": lambda m, x: F.linear(x, m.weight.narrow(0, 1, 4)),
    "one row": lambda m, x: x @ m.weight[1],
    "last row": lambda m, x: x @ m.weight[-1],
    "one element": lambda m, x: x * m.weight[1, 2],
    "ellipsis": lambda m, x: x[..., None] * m.weight[..., 0],
    "rows by number": lambda m, x: F.linear(x, m.weight[ROWS]),
    "columns by number": lambda m, x: x[:, ROWS] @ m.weight[:, ROWS].T,
    "index_select": lambda m, x: F.linear(x, m.weight.index_select(0, ROWS)),
    "mask": lambda m, x: F.linear(x, m.weight[ROWS.bincount(minlength=12) > 0]),
    "take_along_dim": lambda m, x: x * m.weight.take_along_dim(ROWS[None, :1], 0),
    "F.embedding": lambda m, x: x[:4] + F.embedding(ROWS, m.weight),
    "chunk": lambda m, x: [F.linear(x, weight) for weight in m.weight.chunk(3)][1],
    "split": lambda m, x: torch.cat([F.linear(x, weight) for weight in m.weight.split([4, 8])], -1),
    "tensor_split": lambda m, x: F.linear(x, torch.tensor_split(m.weight, 5)[0]),
    "unbind": starred,
    "view": lambda m, x: F.linear(x, m.weight.view(3, 4, 20)[1]),
    "reshape": lambda m, x: F.linear(x[:, :10], m.weight.reshape(24, 10)),
    "flatten": lambda m, x: x * m.weight.flatten()[:20],
    "unflatten": lambda m, x: x @ m.weight.unflatten(0, (3, 4)).mT,
    "squeeze": lambda m, x: F.linear(x, m.weight.unsqueeze(0).squeeze(0)),
    "expand": lambda m, x: x @ m.weight.T.expand(2, 20, 12),
    "repeat": lambda m, x: F.linear(x, m.weight.repeat(2, 1)),
    "diagonal": lambda m, x: x[:, :12] * m.weight.diagonal(),
    "flip": lambda m, x: F.linear(x, m.weight.flip(0)),
    # loops, helpers, closures, holders
    "for": for_loop_over_rows,
    "while": while_loop,
    "for over modules": loop_over_modules,
    "for, else": loop_with_else,
    "recursion": recursion,
    "generator": generator,
    "comprehension": lambda m, x: torch.stack([x @ m.weight[i] for i in range(len(m.weight))], -1),
    "enumerate": lambda m, x: sum(i * (x @ row) for i, row in enumerate(m.weight)),
    "zip": lambda m, x: torch.stack([x @ row + b for row, b in zip(m.weight, m.bias, strict=True)], -1),
    "map": lambda m, x: next(map(lambda weight: F.linear(x, weight), [m.weight])),
    "reduce": lambda m, x: functools.reduce(torch.matmul, [x, m.weight.T, m.weight]),
    "partial": lambda m, x: functools.partial(F.linear, weight=m.weight)(x),
    "helper": lambda m, x: helper(m.weight, x),
    "helper, starred": lambda m, x: helper(*(m.weight, x)),
    "helper, by keyword": lambda m, x: helper(**{"weight": m.weight, "x": x}),
    "helper of the module": lambda m, x: (lambda module: F.linear(x, module.weight))(m),
    "closure": nested,
    "default of an argument": lambda m, x: (lambda y, weight=m.weight: F.linear(y, weight))(x),
    "match": match,
    "walrus": walrus,
    "try": try_finally,
    "dict": lambda m, x: F.linear(x, {"up": m.weight}["up"]),
    "dataclass": lambda m, x: F.linear(x, Holder(m.weight).weight),
    "namedtuple": lambda m, x: F.linear(x, *Pair(m.weight, m.bias)),
    "callable": lambda m, x: Callable(m.weight)(x),
    "getattr": lambda m, x: F.linear(x, getattr(m, "wei" + "ght")),
    "attrgetter": lambda m, x: F.linear(x, operator.attrgetter("weight")(m)),
    "in a container": lambda m, x: F.linear(x, nn.Sequential(m).get_submodule("0").weight),
    "functional_call": lambda m, x: torch.func.functional_call(m, {}, (x,)),
    "its own forward": lambda m, x: m(x),
    "forward of the class": lambda m, x: nn.Linear.forward(m, x),
    # casts and copies
    ".data": lambda m, x: F.linear(x, m.weight.data),
    ".detach()": lambda m, x: F.linear(x, m.weight.detach()),
    ".to(x)": lambda m, x: F.linear(x, m.weight.to(x)),
    ".type_as(x)": lambda m, x: F.linear(x, m.weight.type_as(x)),
    ".double()": lambda m, x: F.linear(x.double(), m.weight.double()).float(),
    "x to its dtype and device": lambda m, x: x.to(m.weight.dtype).to(m.weight.device) * 2,
    ".clone()": lambda m, x: F.linear(x, m.weight.clone()),
    ".contiguous()": lambda m, x: x @ m.weight.t().contiguous(),
    "nn.Parameter": lambda m, x: F.linear(x, nn.Parameter(m.weight, requires_grad=False)),
    "copied into a buffer": into_a_buffer,
    "out=": with_out,
    "cpu()": lambda m, x: F.linear(x, m.weight.cpu()),
    "numpy()": lambda m, x: F.linear(x, torch.from_numpy(m.weight.numpy())),
    "np.asarray": lambda m, x: F.linear(x, torch.tensor(np.asarray(m.weight))),
    "tolist()": lambda m, x: F.linear(x, torch.tensor(m.weight.tolist())),
    "item()": lambda m, x: x * m.weight[0, 0].item(),
    "deepcopy": lambda m, x: F.linear(x, copy.deepcopy(m.weight)),
    "pickle": lambda m, x: F.linear(x, pickle.loads(pickle.dumps(m.weight))),
    "torch.save": lambda m, x: F.linear(x, saved_and_loaded(m.weight)),
    # other arithmetic
    "*": lambda m, x: F.linear(x, m.weight * 2),
    "2 *": lambda m, x: F.linear(x, 2 * m.weight),
    "+ and -": lambda m, x: F.linear(x, 1 - (m.weight + m.bias[:, None])),
    "/ norm": lambda m, x: F.linear(x, m.weight / m.weight.norm(dim=1, keepdim=True)),
    "F.normalize": lambda m, x: F.linear(x, F.normalize(m.weight, dim=-1)),
    "weight-standardized": lambda m, x: F.linear(x, F.layer_norm(m.weight, (20,))),
    "softmax": lambda m, x: F.linear(x, m.weight.softmax(-1)),
    "cat": lambda m, x: F.linear(x, torch.cat([m.weight, m.weight])),
    "stack": lambda m, x: torch.einsum("bi,noi->nbo", x, torch.stack([m.weight, m.weight])),
    "where": lambda m, x: F.linear(x, torch.where(m.weight > 0, m.weight, 0)),
    "masked_fill": lambda m, x: F.linear(x, m.weight.masked_fill(m.weight < 0, 0)),
    "tril": lambda m, x: F.linear(x, m.weight.tril()),
    "dropout": lambda m, x: F.linear(x, F.dropout(m.weight, 0.5, training=False)),
    "sum": lambda m, x: x * m.weight.sum(),
    "mean": lambda m, x: x * m.weight.mean(0),
    "max": lambda m, x: x * m.weight.max(0).values,
    "torch.add": lambda m, x: F.linear(x, torch.add(m.weight, m.weight, alpha=2)),
    "lerp": lambda m, x: F.linear(x, torch.lerp(m.weight, torch.zeros_like(m.weight), 0.25)),
    "singular values": lambda m, x: x[:, :12] * torch.linalg.svdvals(m.weight),
    "foreach": lambda m, x: F.linear(x, torch._foreach_mul([m.weight], 2.0)[0]),
    "vmap": lambda m, x: torch.vmap(lambda row: F.linear(row, m.weight))(x),
    "vjp": lambda m, x: torch.func.vjp(lambda y: F.linear(y, m.weight), x)[1](x[:, :12])[0],
}


def saved_and_loaded(weight):
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file)


WITHOUT_GRADIENT = {"vjp"}
NOT_COMPILED = {
    # what no compiler follows, for a float weight either
    *("numpy()", "np.asarray", "tolist()", "deepcopy", "pickle", "torch.save", "mask", "nn.Parameter"),
    *("foreach", "item()", "functional_call", "vjp"),
}


def x_for(kind):
    shapes = {"conv1d": (2, 20, 9), "conv2d": (2, 20, 7, 6), "transposed": (2, 20, 9), "experts": (3, 5, 20)}
    return torch.randn(shapes.get(kind, (5, 20)), generator=torch.Generator().manual_seed(1))


def check_result(read, kind, weights, symmetric):
    quantized, reference = twins(kind, weights, symmetric)
    x = x_for(kind)
    with torch.no_grad():
        result, expected = read(quantized, x), read(reference, x)
    assert type(result) is torch.Tensor and result.dtype == expected.dtype and result.shape == expected.shape
    assert relative_error(result, expected) < 1e-3


def check_gradient(read, kind):
    gradients = []
    for module in twins(kind):
        x = x_for(kind).requires_grad_()
        read(module, x).square().sum().backward()
        gradients.append(x.grad)
    assert relative_error(*gradients) < 1e-3


@SETTINGS
@pytest.mark.parametrize("read", LINEAR)
def test_every_way_to_read_the_weight_of_a_linear(read, weights, symmetric):
    check_result(LINEAR[read], "linear", weights, symmetric)


@pytest.mark.parametrize("read", [read for read in LINEAR if read not in WITHOUT_GRADIENT])
def test_the_gradient_of_every_way_is_that_of_the_dequantized_weight(read):
    check_gradient(LINEAR[read], "linear")


def test_the_ways_compile_in_one_graph():
    reads = {name: read for name, read in LINEAR.items() if name not in NOT_COMPILED}
    quantized, reference = twins("linear")
    x = x_for("linear")
    compiled = torch.compile(
        lambda m, y: [read(m, y) for read in reads.values()], fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        results = compiled(quantized, x)
    wrong = {
        name: error
        for (name, read), result in zip(reads.items(), results, strict=True)
        if not (error := relative_error(result, read(reference, x))) < 1e-3
    }
    assert not wrong


OTHERS = {
    "projection, @": ("projection", lambda m, x: x @ m.weight),
    "projection, addmm": ("projection", lambda m, x: torch.addmm(m.bias, x, m.weight)),
    "projection, F.linear": ("projection", lambda m, x: F.linear(x, m.weight.T)),
    "projection, columns": ("projection", lambda m, x: x @ m.weight[:, 4:8]),
    "projection, split": ("projection", lambda m, x: x @ m.weight.split(4, dim=1)[1]),
    "projection, rows": ("projection", lambda m, x: x[:, :7] @ m.weight[:7]),
    "embedding, F.embedding": ("embedding", lambda m, x: x[:4] * F.embedding(ROWS, m.weight)),
    "embedding, rows": ("embedding", lambda m, x: x[:4] * m.weight[ROWS]),
    "embedding, rows of two dimensions": ("embedding", lambda m, x: x[:2] * m.weight[ROWS.view(2, 2)].sum(0)),
    "embedding, slice": ("embedding", lambda m, x: x + m.weight[2:7]),
    "embedding, as a head": ("embedding", lambda m, x: F.linear(x, m.weight)),
    "embedding, embedding_bag": ("embedding", lambda m, x: x[:1] * F.embedding_bag(ROWS[None], m.weight)),
    "embedding, of the class": ("embedding", lambda m, x: x[:4] * nn.Embedding.forward(m, ROWS)),
    "conv1d, F.conv1d": ("conv1d", lambda m, x: F.conv1d(x, m.weight, m.bias, padding=1)),
    "conv1d, by keywords": ("conv1d", lambda m, x: F.conv1d(input=x, weight=m.weight, stride=2)),
    "conv1d, same": ("conv1d", lambda m, x: F.conv1d(x, m.weight, padding="same")),
    "conv1d, one step": ("conv1d", lambda m, x: torch.einsum("bik,oik->bo", x[..., -3:], m.weight)),
    "conv1d, point by point": ("conv1d", lambda m, x: x[..., 0] @ m.weight[..., 1].T),
    "conv1d, squeezed": (
        "conv1d",
        lambda m, x: (x[:, :, None, :3] * m.weight[:4].sum(0)[None, :, None]).sum(3),
    ),
    "conv1d, standardized": (
        "conv1d",
        lambda m, x: F.conv1d(x, m.weight - m.weight.mean(dim=[1, 2], keepdim=True)),
    ),
    "conv1d, flat": ("conv1d", lambda m, x: F.unfold(x[:, :, None], (1, 3)).mT @ m.weight.flatten(1).T),
    "conv2d, F.conv2d": ("conv2d", lambda m, x: F.conv2d(x, m.weight, m.bias, stride=2, padding=1)),
    "conv2d, grouped": ("conv2d", lambda m, x: F.conv2d(x[:, :10], m.weight[:, :5], groups=2)),
    "conv2d, flat": ("conv2d", lambda m, x: x[:, :, 0, 0] @ m.weight.view(12, -1)[:, ::9].T),
    "conv2d, transposed": ("conv2d", lambda m, x: F.conv_transpose2d(m(x), m.weight)),
    "conv2d, _conv_forward": ("conv2d", lambda m, x: m._conv_forward(x, m.weight, m.bias)),
    "transposed, F.conv_transpose1d": ("transposed", lambda m, x: F.conv_transpose1d(x, m.weight, stride=2)),
    "transposed, backwards": ("transposed", lambda m, x: F.conv1d(m(x), m.weight)),
    "experts, one": ("experts", lambda m, x: F.linear(x[0], m.weight[1])),
    "experts, loop": ("experts", lambda m, x: torch.stack([F.linear(x[i], m.weight[i]) for i in range(3)])),
    "experts, iterated": (
        "experts",
        lambda m, x: torch.stack([y @ w.T for y, w in zip(x, m.weight, strict=True)]),
    ),
    "experts, bmm": ("experts", lambda m, x: torch.bmm(x, m.weight.transpose(1, 2))),
    "experts, bmm the other way round": ("experts", lambda m, x: torch.bmm(m.weight, x.mT)),
    "experts, matmul": ("experts", lambda m, x: x @ m.weight.mT),
    "experts, back": ("experts", lambda m, x: x[..., :12] @ m.weight),
    "experts, einsum": ("experts", lambda m, x: torch.einsum("nbi,noi->nbo", x, m.weight)),
    "experts, all for each": ("experts", lambda m, x: torch.einsum("bi,noi->nbo", x[0], m.weight)),
    "experts, chosen": ("experts", lambda m, x: x @ m.weight[torch.tensor([2, 0, 0])].mT),
    "experts, index_select": (
        "experts",
        lambda m, x: x[:2] @ m.weight.index_select(0, torch.tensor([2, 1])).mT,
    ),
    "experts, halves": (
        "experts",
        lambda m, x: torch.mul(*(x @ half.mT for half in m.weight.chunk(2, dim=1))),
    ),
    "experts, interleaved": ("experts", lambda m, x: x @ m.weight[:, ::2].mT),
    "experts, in a row": ("experts", lambda m, x: F.linear(x, m.weight.view(36, 20))),
    "experts, in a row by reshape": ("experts", lambda m, x: F.linear(x, m.weight.reshape(-1, 20))),
    "experts, grouped": (
        "experts",
        lambda m, x: torch.cat([F.linear(y, w) for y, w in zip(x.flatten(0, 1).split([4, 0, 11]), m.weight)]),  # noqa: B905
    ),
}


@SETTINGS
@pytest.mark.parametrize("read", OTHERS)
def test_every_way_to_read_the_weight_of_other_modules(read, weights, symmetric):
    kind, function = OTHERS[read]
    check_result(function, kind, weights, symmetric)


@pytest.mark.parametrize("read", OTHERS)
def test_the_gradients_of_other_modules_too(read):
    kind, function = OTHERS[read]
    check_gradient(function, kind)


@pytest.mark.parametrize("kind", ["projection", "embedding", "conv1d", "conv2d", "transposed", "experts"])
def test_the_ways_of_other_modules_compile_in_one_graph(kind):
    reads = {name: read for name, (of, read) in OTHERS.items() if of == kind}
    quantized, reference = twins(kind)
    x = x_for(kind)
    compiled = torch.compile(
        lambda m, y: [read(m, y) for read in reads.values()], fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        results = compiled(quantized, x)
    for (name, read), result in zip(reads.items(), results, strict=True):
        assert relative_error(result, read(reference, x)) < 1e-3, name


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda m: m.state_dict()["weight"], KeyError),
        (lambda m: dict(m.named_parameters())["weight"], KeyError),
        (lambda m: m._parameters["weight"], KeyError),
        (lambda m: m.get_parameter("weight"), AttributeError),
        (lambda m: nn.Linear(20, 12).load_state_dict(m.state_dict()), RuntimeError),
        (lambda m: F.linear(x_for("linear"), list(m.parameters())[-1]), RuntimeError),
        (lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(12, 20))), AttributeError),
        (lambda m: m.register_parameter("weight", None), KeyError),
        (lambda m: delattr(m, "weight"), AttributeError),
    ],
)
def test_where_parameters_are_named_the_float_weight_is_none_of_them(read, error):
    with pytest.raises(error, match=r"weight|cannot be multiplied|has no deleter"):
        read(twins()[0])


# ---------------------------------------------------------------- what the weight says of itself


@SETTINGS
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_weight_says_of_itself_is_said_of_a_float_one(kind, weights, symmetric, dtype):
    quantized, reference = twins(kind, weights, symmetric)
    weight, expected = quantized.to(dtype).weight, reference.to(dtype).weight
    assert isinstance(weight, torch.Tensor) and weight.dtype == dtype
    for say in (
        *(
            "shape",
            "dtype",
            "device",
            "requires_grad",
            "is_leaf",
            "grad",
            "ndim",
            "itemsize",
            "nbytes",
            "layout",
        ),
        *("is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "grad_fn"),
    ):
        assert getattr(weight, say) == getattr(expected, say), say
    for ask in (
        *(
            "dim",
            "size",
            "numel",
            "stride",
            "element_size",
            "is_floating_point",
            "is_complex",
            "is_contiguous",
        ),
        *(
            "__len__",
            "get_device",
            "storage_offset",
            "nelement",
            "type",
            "is_pinned",
            "is_signed",
            "is_inference",
        ),
    ):
        assert getattr(weight, ask)() == getattr(expected, ask)(), ask
    assert torch.is_floating_point(weight) and torch.numel(weight) == expected.numel()
    assert bool(torch.isfinite(weight).all())


def test_printing_shows_the_values():
    quantized, reference = twins()
    assert repr(quantized.weight) == str(quantized.weight) == f"FloatView({reference.weight.data!r})"
    assert f"{quantized.weight[0, 0]:.3f}" == f"{reference.weight[0, 0]:.3f}"
    assert bool(quantized.weight[0, 0] == reference.weight[0, 0])


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)), saved_and_loaded]
)
def test_a_copy_shows_the_same_values(copied):
    quantized, reference = twins()
    assert torch.equal(copied(quantized.weight), reference.weight)


def test_values_for_others():
    quantized, reference = twins()
    weight, expected = quantized.weight, reference.weight.data
    assert np.array_equal(weight.numpy(), expected.numpy()) and weight.tolist() == expected.tolist()
    assert weight[1, 2].item() == float(weight[1, 2]) == expected[1, 2].item()
    assert np.array_equal(np.from_dlpack(weight), expected.numpy())
    assert torch.equal(torch.as_tensor(weight), expected) and torch.equal(torch.asarray(weight), expected)


# ---------------------------------------------------------------- what stays quantized


@SETTINGS
@pytest.mark.parametrize(
    ("kind", "look"),
    [
        ("linear", lambda w: w[2:5]),
        ("linear", lambda w: w[3]),
        ("linear", lambda w: w[:, 1:9]),
        ("linear", lambda w: w[..., None]),
        ("linear", lambda w: w[ROWS]),
        ("linear", lambda w: w.index_select(0, ROWS)),
        ("linear", lambda w: w.t()),
        ("linear", lambda w: w.T),
        ("linear", lambda w: w.mT),
        ("linear", lambda w: w.transpose(0, 1)),
        ("linear", lambda w: w.permute(1, 0)),
        ("linear", lambda w: w.movedim(0, 1)),
        ("linear", lambda w: w.view(3, 4, 20)),
        ("linear", lambda w: w.view(3, 4, 20).view(12, 20)),
        ("linear", lambda w: w.reshape(3, 4, 20)),
        ("linear", lambda w: w.unflatten(0, (3, 4))),
        ("linear", lambda w: w.unsqueeze(1)),
        ("linear", lambda w: w.unsqueeze(0).squeeze(0)),
        ("linear", lambda w: w[None].squeeze()),
        ("linear", lambda w: w.expand(2, 12, 20)),
        ("linear", lambda w: w.flatten()),
        ("linear", lambda w: w.view(24, 10)),
        ("linear", lambda w: w.diagonal()),
        ("linear", lambda w: w.unfold(1, 4, 2)),
        ("linear", lambda w: w.split(5)[2]),
        ("linear", lambda w: w.split([4, 8])[1]),
        ("linear", lambda w: w.chunk(3)[1]),
        ("linear", lambda w: w.chunk(2, dim=1)[1]),
        ("linear", lambda w: w.tensor_split(5)[1]),
        ("linear", lambda w: w.unbind()[7]),
        ("linear", lambda w: list(w)[7]),
        ("linear", lambda w: w.narrow(0, 2, 3)),
        ("linear", lambda w: w.select(0, 2)),
        ("linear", lambda w: w.to(torch.bfloat16)),
        ("linear", lambda w: w.to(torch.zeros(1, dtype=torch.float16))),
        ("linear", lambda w: w.to("cpu")),
        ("linear", lambda w: w.float()),
        ("linear", lambda w: w.half()),
        ("linear", lambda w: w.half().double()),
        ("linear", lambda w: w.type(torch.bfloat16)),
        ("linear", lambda w: w.cpu()),
        ("linear", lambda w: w.contiguous()),
        ("linear", lambda w: w.detach()),
        ("linear", lambda w: w.data),
        ("linear", lambda w: w.data.t().bfloat16()[:3].T),
        ("projection", lambda w: w[:, 2:5]),
        ("projection", lambda w: w.split(4, dim=1)[1].T),
        ("embedding", lambda w: w[2:5]),
        ("conv1d", lambda w: w[:, :, 1]),
        ("conv2d", lambda w: w.flatten(1)),
        ("experts", lambda w: w[1]),
        ("experts", lambda w: w[1].t()),
        ("experts", lambda w: w[1, :6]),
        ("experts", lambda w: w.mT[2]),
        ("experts", lambda w: w[torch.tensor([2, 0])]),
        ("experts", lambda w: w.chunk(2, dim=1)[0][1]),
        ("experts", lambda w: w.unbind()[1]),
        ("experts", lambda w: w.view(36, 20)[12:24]),
    ],
)
def test_another_side_of_the_weight_is_quantized_too(kind, look, weights, symmetric):
    quantized, reference = twins(kind, weights, symmetric)
    part, expected = look(quantized.weight), look(reference.weight.data)
    assert isinstance(part, FloatView) and part.stored.dtype == quantized.stored()[0].dtype
    assert part.shape == expected.shape and part.dtype == expected.dtype
    assert relative_error(part.expanded(), expected) < 1e-6 if expected.dtype == torch.float32 else 1e-2


# ---------------------------------------------------------------- what would change it


OTHER = torch.full((12, 20), 2.0)


def augmented(w):
    w += 1


def augmented_row(w):
    w[2] *= 3


def augmented_module(module):
    module.weight /= 4


def item(w):
    w[2, 3] = 1.0


def attribute(name, value):
    return lambda w: setattr(w, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.zero_(),
        lambda w: w.fill_(1.0),
        lambda w: w.add_(1),
        lambda w: w.mul_(OTHER),
        lambda w: w.copy_(OTHER),
        lambda w: w.clamp_(0, 1),
        lambda w: w.normal_(),
        lambda w: w.uniform_(-1, 1),
        lambda w: w.masked_fill_(OTHER > 1, 0.0),
        lambda w: w.index_add_(0, ROWS, OTHER[:4]),
        lambda w: w.index_copy_(0, ROWS, OTHER[:4]),
        lambda w: w.index_fill_(0, ROWS, 1.0),
        lambda w: w.scatter_(0, ROWS[None], OTHER),
        lambda w: w.addmm_(OTHER[:, :3], OTHER[:3]),
        lambda w: w.addcmul_(OTHER, OTHER),
        lambda w: w.lerp_(OTHER, 0.5),
        lambda w: w.apply_(lambda value: value + 1),
        lambda w: w.map_(OTHER, lambda a, b: b),
        lambda w: w[2].zero_(),
        lambda w: w[2:4].add_(1),
        lambda w: w.t().add_(1),
        lambda w: w.view(-1).copy_(OTHER.view(-1)),
        lambda w: w.diagonal().fill_(1.0),
        lambda w: w.view(3, 4, 20)[1].zero_(),
        lambda w: w.detach().zero_(),
        lambda w: w.data.mul_(2),
        lambda w: w.float().zero_(),
        lambda w: w.contiguous().zero_(),
        lambda w: nn.init.xavier_uniform_(w),
        lambda w: nn.init.trunc_normal_(w),
        lambda w: nn.init.orthogonal_(w),
        lambda w: torch.add(OTHER, 1, out=w),
        lambda w: torch.matmul(OTHER[:, :3], OTHER[:3], out=w),
        lambda w: torch.sin_(w),
        lambda w: torch._foreach_add_([w], 1.0),
        lambda w: torch._foreach_mul_([OTHER.clone(), w], 2.0),
        lambda w: torch._foreach_copy_([w], [OTHER]),
        lambda w: torch.optim.SGD([w], lr=1.0).param_groups[0]["params"][0].add_(OTHER, alpha=-1.0),
        lambda w: torch.nn.utils.vector_to_parameters(OTHER.view(-1), [w]),
        lambda w: w.resize_(3, 3),
        lambda w: w.t_(),
        lambda w: w.transpose_(0, 1),
        lambda w: w.unsqueeze_(0),
        lambda w: w.squeeze_(),
        lambda w: w.set_(OTHER.clone()),
        lambda w: w.requires_grad_(),
        lambda w: w.requires_grad_(True),
        lambda w: w.share_memory_(),
        lambda w: nn.Parameter(w),
        attribute("requires_grad", True),
        attribute("data", OTHER),
        attribute("grad", OTHER),
        augmented,
        augmented_row,
        item,
    ],
)
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_a_change_in_place_is_one_clear_error(change, grad_mode):
    quantized, reference = twins()
    with (
        grad_mode(),
        pytest.raises(RuntimeError, match=r"no change of a quantized weight in place, got .*dequantize"),
    ):
        change(quantized.weight)
    assert torch.equal(quantized.weight, reference.weight) and not quantized.weight.requires_grad


@pytest.mark.parametrize(
    "change", [lambda m: m.weight.div_(4), lambda m: m.weight.mul_(0.25), augmented_module]
)
@pytest.mark.parametrize("weights", ["int8", "float16"])
def test_a_number_rescales_the_whole_weight(change, weights):
    """As RWKV's forward does; every other weight, and every part of this one, keeps its value."""
    layer = nn.Linear(20, 12)
    quantized = quantized_class_for(layer).from_float(layer, weights, symmetric=False)
    before = quantized.weight.clone()
    with torch.no_grad():
        change(quantized)
        for shown in (quantized.weight, quantized.to_float().weight):
            torch.testing.assert_close(shown.clone(), before / 4, rtol=0, atol=1e-7)
        for refused in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(RuntimeError, match="no change of a quantized weight in place"):
                quantized.weight.mul_(refused)


def test_what_only_reads_it_may_change_others():
    quantized, reference = twins()
    total, copied = OTHER.clone(), torch.empty(12, 20)
    total.add_(quantized.weight)
    copied[3:5] = quantized.weight[3:5]
    assert torch.equal(total, OTHER + reference.weight) and torch.equal(copied[3:5], reference.weight[3:5])
    assert not quantized.weight.requires_grad_(False).requires_grad
    own = quantized.weight.clone()
    assert type(own) is torch.Tensor and not own.zero_().any()
