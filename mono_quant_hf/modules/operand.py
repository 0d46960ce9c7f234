"""A quantized weight in the place of a float one, in code that multiplies by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mono_quant_hf import kernels


class QuantizedOperand:
    """Stands in for a float weight, or for the weights of several experts, in products from the right.

    It knows what `usage` lets through: the index of an expert, transpositions, casts (which change nothing, as the
    product has the dtype of its input), shape and device, `linear`, `matmul`, `mm`, `bmm` and `@`.

    Args:
        weight: int8 or float16, `[out, in]` or `[experts, out, in]`; the last two swapped where `out_last`.
        scale, zero_point: as the weight, with size 1 instead of `in`; None as in the kernels.
        out_last: whether the output features are on the last axis.
        activations: as for `kernels.linear`.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        out_last: bool,
        activations: str | None = None,
    ):
        self.weight, self.scale, self.zero_point, self.out_last = weight, scale, zero_point, out_last
        self.activations = activations

    shape = property(lambda self: self.weight.shape)
    device = property(lambda self: self.weight.device)
    ndim = property(lambda self: self.weight.ndim)
    requires_grad = False

    def size(self, dim: int | None = None) -> Any:
        return self.weight.size() if dim is None else self.weight.size(dim)

    def dim(self) -> int:
        return self.weight.dim()

    def _each(self, change: Callable[[Tensor], Tensor], out_last: bool) -> QuantizedOperand:
        tensors = (None if t is None else change(t) for t in (self.weight, self.scale, self.zero_point))
        weight, scale, zero_point = tensors
        assert weight is not None
        return QuantizedOperand(weight, scale, zero_point, out_last, self.activations)

    def __getitem__(self, index: Any) -> QuantizedOperand:
        return self._each(lambda tensor: tensor[index], self.out_last)

    def transpose(self, dim0: int, dim1: int) -> QuantizedOperand:
        if {dim0 % self.dim(), dim1 % self.dim()} != {self.dim() - 2, self.dim() - 1}:
            raise NotImplementedError(
                f"Quantized experts can only have their last two dimensions swapped, not {dim0} and {dim1}; "
                "keep the module in float with modules_to_not_convert."
            )
        return self.mT

    @property
    def mT(self) -> QuantizedOperand:
        return self._each(lambda tensor: tensor.mT, not self.out_last)

    @property
    def T(self) -> QuantizedOperand:
        return self.transpose(0, 1)

    def t(self) -> QuantizedOperand:
        return self.transpose(0, 1)

    def float(self) -> QuantizedOperand:
        return self

    def to(self, *args: Any, **kwargs: Any) -> QuantizedOperand:
        return self

    def contiguous(self) -> QuantizedOperand:
        return self

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x Wᵀ + b` where W has the output features first: for one expert, or for `x` `[experts, tokens, in]`."""
        rows = self.mT if self.out_last else self
        if self.dim() == 2:
            return kernels.linear(x, rows.weight, rows.scale, rows.zero_point, bias, self.activations)
        if x.dim() != 3 or x.shape[0] != self.shape[0]:
            raise NotImplementedError(
                f"Quantized experts of shape {tuple(self.shape)} cannot be multiplied with an input of shape "
                f"{tuple(x.shape)}; keep the module in float with modules_to_not_convert."
            )
        return torch.stack([rows[i].product(tokens) for i, tokens in enumerate(x)])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear":
            return _linear(*args, **kwargs)
        if name in ("matmul", "bmm", "mm", "__matmul__") and isinstance(args[1], cls) and not kwargs:
            x, weight = args
            if not weight.out_last:
                raise NotImplementedError(
                    f"torch.{name} with experts stored as [out, in]; transpose them first."
                )
            return weight.product(x)
        return NotImplemented


def _linear(input: Tensor, weight: QuantizedOperand, bias: Tensor | None = None) -> Tensor:
    if weight.out_last:
        raise NotImplementedError("linear with experts stored as [in, out]; transpose them first.")
    return weight.product(input, bias)
