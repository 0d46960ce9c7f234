"""A layer as a matrix product: its weight as `[..., channels, inputs]`, what it is fed as `[..., inputs, columns]`."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# Unfolded inputs of a convolution held at a time: 128 MB in float32.
_UNFOLDED_ELEMENTS = 2**25


class Layout:
    """How the weight and the inputs of one layer become matrices: of a linear layer, whose weight may be transposed.

    Attributes:
        key: equal for layers that make the same matrix of the same input.
    """

    key: Hashable = "linear"

    def __init__(self, transposed: bool = False):
        self.transposed = transposed

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as `[..., channels, inputs]`."""
        return weight.t() if self.transposed else weight

    def weight(self, matrix: Tensor) -> Tensor:
        """Back from `matrix`, also for scales, whose last dimension is 1."""
        return matrix.t().contiguous() if self.transposed else matrix

    def columns(self, x: Tensor) -> Iterator[Tensor]:
        """What the layer is fed as pieces of `[..., inputs, columns]` in float32."""
        yield x.reshape(-1, x.shape[-1]).float().t()


class _Convolution(Layout):
    """One and two dimensions; the groups are a leading dimension of the matrices."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d):
        super().__init__()
        self.module, self.groups = module, module.groups
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        self.key = tuple(getattr(module, name) for name in names)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, matrix: Tensor) -> Tensor:
        if matrix.shape[-1] == 1 and self.module.weight[0].numel() != 1:  # a scale or zero-point
            return matrix.reshape(-1, *[1] * (self.module.weight.dim() - 1))
        return matrix.reshape(self.module.weight.shape)

    def columns(self, x: Tensor) -> Iterator[Tensor]:
        module = self.module
        padding = module.padding
        if module.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(module.kernel_size)
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        if len(kernel) == 1:  # a picture of height one
            x = x.unsqueeze(-2)
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
            padding = (0, *padding)
        size = max(1, x[0].numel() * kernel[0] * kernel[1])
        for part in x.split(max(1, _UNFOLDED_ELEMENTS // size)):
            unfolded = F.unfold(part.float(), kernel, dilation, padding, stride)
            unfolded = unfolded.reshape(len(part), self.groups, -1, unfolded.shape[-1])
            yield unfolded.permute(1, 2, 0, 3).flatten(2)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a layer; None for one that is no plain matrix product (its forward is not looked at)."""
    if isinstance(module, nn.Linear):
        return Layout()
    if isinstance(module, Conv1D):
        return Layout(transposed=True)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _Convolution(module)
    return None


class Moments:
    """Second moments of what a layer is fed, summed up batch by batch.

    Attributes:
        hessian: float32 `[..., inputs, inputs]`, the mean of `x xᵀ`.
        drift: the mean of `(x_float - x) xᵀ`, with `x_float` what the float model feeds in the same place.
        columns: how many `x` there were.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.hessian = torch.zeros(())
        self.drift = torch.zeros(())
        self.columns = 0

    def add(self, x: Tensor, x_float: Tensor | None) -> None:
        floats: Iterator[Tensor | None] = iter(lambda: None, 0)
        if x_float is not None:
            floats = iter(self.layout.columns(x_float))
        for part in self.layout.columns(x):
            other = next(floats)
            self.columns += part.shape[-1]
            share = part.shape[-1] / self.columns
            self.hessian = _averaged(self.hessian, part, part, share)
            if other is not None:
                self.drift = _averaged(self.drift, other - part, part, share)


def _averaged(mean: Tensor, a: Tensor, b: Tensor, share: float) -> Tensor:
    """`(1 - share) mean + share (a bᵀ / columns)`, in place where there is a mean already."""
    weight = share / a.shape[-1]
    if not mean.dim():
        return (a @ b.mT).mul_(weight)
    multiply = mean.addmm_ if mean.dim() == 2 else mean.baddbmm_
    return multiply(a, b.mT, beta=1 - share, alpha=weight)
