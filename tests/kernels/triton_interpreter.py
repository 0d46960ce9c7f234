"""Run as a program: the Triton kernels against float64, on a GPU, or with TRITON_INTERPRET=1 on CPU tensors.

Triton's interpreter holds bfloat16 as the integers of its bits, and multiplies, casts and compares those.
`mend_bfloat16` lets it work on float32 in their place, rounded to nearest even as a GPU does.
"""

import dataclasses
import itertools
import os
import sys

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from mono_quant_hf.kernels import gpu, portable


def mend_bfloat16() -> None:
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    cast, binary, unary, dot = (
        builder.cast_impl,
        builder.binary_op,
        builder.unary_op,
        builder.create_dot,
    )

    def is_bfloat16(operand):
        return operand.dtype.scalar == tl.bfloat16

    def floats(operand):
        bits = np.ascontiguousarray(operand.data)
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()

    def values(operand):
        return floats(operand) if is_bfloat16(operand) else operand.data

    def bfloat16(numbers):
        rounded = torch.from_numpy(np.array(numbers, dtype=np.float32)).bfloat16()
        return handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def cast_impl(self, operand, dtype):
        if is_bfloat16(operand) == (dtype.scalar == tl.bfloat16):
            return cast(self, operand, dtype)
        if is_bfloat16(operand):
            return handle(floats(operand).astype(interpreter._get_np_dtype(dtype)), dtype.scalar)
        return bfloat16(operand.data)

    def binary_op(self, left, right, op):
        if not is_bfloat16(left):
            return binary(self, left, right, op)
        result = op(floats(left), floats(right))
        return handle(result, tl.int1) if result.dtype == bool else bfloat16(result)

    def unary_op(self, operand, op):
        return bfloat16(op(floats(operand))) if is_bfloat16(operand) else unary(self, operand, op)

    def create_dot(self, left, right, total, *rest):
        if not is_bfloat16(left):
            return dot(self, left, right, total, *rest)
        return handle(np.matmul(floats(left), floats(right)) + total.data, total.dtype.scalar)

    builder.cast_impl, builder.binary_op, builder.unary_op = cast_impl, binary_op, unary_op
    builder.create_dot = create_dot
    builder.create_fp_to_fp = lambda self, operand, dtype, _: cast_impl(self, operand, dtype)


BOUNDS = {torch.float16: 6e-4, torch.bfloat16: 4e-3}


def close(name: str, got: Tensor, want: Tensor, bound: float) -> None:
    error = float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
    assert error < bound, f"{name}: relative error {error:.2e}, {bound:.2e} allowed"


def weight(kind: str, *shape: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Stored tensors, and the float64 weight that they stand for."""
    if kind == "float16":
        stored = torch.randn(*shape).half()
        return stored, None, None, stored.double()
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    scale = torch.rand(*shape[:-1], 1) * 0.01 + 1e-4
    zero_point = torch.randint(-128, 128, scale.shape, dtype=torch.int8) if kind == "asymmetric" else None
    shift = 0.0 if zero_point is None else zero_point.double()
    return codes, scale, zero_point, (codes.double() - shift) * scale.double()


def check_products(m: int, n: int, k: int, kind: str, dtype: torch.dtype, with_bias: bool) -> None:
    stored, scale, zero_point, full = weight(kind, n, k)
    bias = torch.randn(n).to(dtype) if with_bias else None
    x = torch.randn(m, k + 3).to(dtype)[:, :k]  # rows that lie apart
    offset = 0.0 if bias is None else bias.double()
    # A float16 weight is cast to bfloat16 first, as a float model's would be.
    seen = full if kind != "float16" else stored.to(dtype).double()
    exact = x.double() @ (seen if m > 1 else full).T + offset
    close("linear", gpu.linear(x, stored, scale, zero_point, bias), exact, BOUNDS[dtype])
    close("expand", gpu.expand(stored, scale, zero_point, dtype), full, BOUNDS[dtype])
    chosen = torch.randint(0, n, (2, 3))
    close("look-up", gpu.expand(stored, scale, zero_point, dtype, chosen), full[chosen], BOUNDS[dtype])
    if scale is not None:
        steps = x.double().abs().amax(1, keepdim=True) / 127
        rounded = (x.double() / steps).round() * steps
        # bfloat16 x lies on ties often enough, and float32 steps fall to either side of them
        close(
            "linear_int8",
            gpu.linear_int8(x, stored, scale, zero_point, bias),
            rounded @ full.T + offset,
            5e-3,
        )


def check_experts(kind: str, dtype: torch.dtype) -> None:
    stored, scale, zero_point, full = weight(kind, 4, 40, 96)
    seen = full if kind != "float16" else stored.to(dtype).double()
    x, ends = torch.randn(23, 96).to(dtype), [5, 5, 21, 22]
    got = gpu.grouped_linear(x, stored, scale, zero_point, torch.tensor(ends, dtype=torch.int32))
    for expert, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        if end > begin:
            close("grouped", got[begin:end], x[begin:end].double() @ seen[expert].T, BOUNDS[dtype])
    assert not got[22:].any(), "rows of no expert are zero"


def check_neighbours(dtype: torch.dtype) -> None:
    """A row's result is the same to the bit beside other rows, outliers among them."""
    stored, scale, zero_point, _ = weight("asymmetric", 48, 200)
    x = torch.randn(9, 200).to(dtype)
    others = x.clone()
    others[1:] *= 100
    for product in (gpu.linear, gpu.linear_int8):
        first = product(x, stored, scale, zero_point, None)[0]
        assert torch.equal(first, product(others, stored, scale, zero_point, None)[0]), product.__name__
    alone = gpu.linear_int8(x[:1], stored, scale, zero_point, None)[0]
    assert torch.equal(alone, gpu.linear_int8(x, stored, scale, zero_point, None)[0])


def check_spoiled(dtype: torch.dtype) -> None:
    """NaN and infinity in one token spoil its result alone."""
    stored, scale, zero_point, _ = weight("asymmetric", 16, 64)
    x = torch.randn(3, 64).to(dtype)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    finite = gpu.linear_int8(x, stored, scale, zero_point, None).isfinite()
    assert not finite[:2].any() and finite[2].all()


def check_float16_range() -> None:
    """Codes of a large scale, whose products leave float16 before the scale is applied."""
    codes = torch.full((16, 512), 127, dtype=torch.int8)
    scale = torch.full((16, 1), 1e-3)
    x = torch.full((8, 512), 100.0).half()
    exact = x.double() @ (codes.double() * scale.double()).T
    close("float16 linear", gpu.linear(x, codes, scale, None, None), exact, 1e-3)


def check_many_tokens(kind: str) -> None:
    """Rows are expanded block by block, rounded to x's dtype, and multiplied by torch."""
    stored, scale, zero_point, full = weight(kind, 70, 200)
    x, bias = torch.randn(gpu.MANY_TOKENS, 2, 200).bfloat16(), torch.randn(70)
    before, portable.BLOCK_BYTES = portable.BLOCK_BYTES, 1
    for given in (bias, None):
        got = gpu.linear(x, stored, scale, zero_point, given)
        exact = x.double() @ full.T + (0.0 if given is None else given.double())
        close("many tokens", got, exact, BOUNDS[torch.bfloat16])
    portable.BLOCK_BYTES = before


def check_gaps(dtype: torch.dtype) -> None:
    """Scales, zero-points and biases that lie apart in memory."""

    def apart(column: Tensor | None) -> Tensor | None:
        return None if column is None else torch.stack((column, torch.full_like(column, 99)), -1)[..., 0]

    stored, scale, zero_point, _ = weight("asymmetric", 48, 200)
    few, many, bias = (torch.randn(*size).to(dtype) for size in ((1, 200), (9, 200), (48,)))
    for product, x in ((gpu.linear, few), (gpu.linear, many), (gpu.linear_int8, many)):
        got = product(x, stored, apart(scale), apart(zero_point), apart(bias))
        assert torch.equal(got, product(x, stored, scale, zero_point, bias)), product
    columns = (scale, zero_point)
    chosen, ends = apart(torch.tensor([5, 0, 5])), torch.tensor([4, 9])
    for indices in (None, chosen):
        got = gpu.expand(stored, *map(apart, columns), dtype, indices)
        assert torch.equal(
            got, gpu.expand(stored, *columns, dtype, None if indices is None else indices.contiguous())
        )
    stored, scale, zero_point, _ = weight("asymmetric", 2, 48, 200)
    got = gpu.grouped_linear(many, stored, apart(scale), apart(zero_point), apart(ends))
    assert torch.equal(got, gpu.grouped_linear(many, stored, scale, zero_point, ends))


def check_indices() -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)  # it overlooks the option of a launch
    stored, scale, zero_point, _ = weight("asymmetric", 16, 64)
    for index in (-1, 16):
        try:
            gpu.expand(stored, scale, zero_point, torch.float16, torch.tensor([3, index]))
        except Exception as error:
            assert "past the rows" in str(error), error
        else:
            raise AssertionError(f"index {index} was read")


def main() -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        mend_bfloat16()
    else:
        torch.set_default_device("cuda")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes = [(1, 33, 577), (19, 70, 200), (5, 64, 128)]
    if not interpreted:
        shapes += [(3, 64, 512), (300, 257, 130), (100, 9000, 320)]
    cases = list(itertools.product(("symmetric", "asymmetric", "float16"), BOUNDS))
    for (m, n, k), (kind, dtype) in itertools.product(shapes, cases):
        check_products(m, n, k, kind, dtype, with_bias=m != 5)
    for kind, dtype in cases:
        check_experts(kind, dtype)
        if dtype == torch.bfloat16:
            check_many_tokens(kind)
    for dtype in BOUNDS:
        check_neighbours(dtype)
        check_spoiled(dtype)
        check_gaps(dtype)
    check_float16_range()
    if interpreted:  # on a card it ends the whole process
        check_indices()
    print("right", file=sys.stdout)


if __name__ == "__main__":
    main()
