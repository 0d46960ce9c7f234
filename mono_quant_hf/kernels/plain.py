"""Whether tensors are just memory that a kernel may read, with nobody watching the operations on them."""

import torch
from torch import Tensor, nn

_PLAIN = frozenset((Tensor, nn.Parameter))
# Dispatch modes (fake tensors, tracing, counters) and function transforms (vmap, grad) see operators only.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_tracing = torch._C._is_tracing


def is_plain(
    x: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> bool:
    """True in plain eager mode; False while compiling, exporting, tracing, under a mode or a transform.

    False too for a view whose memory holds the negated values (`torch._neg_view`): the dispatcher resolves it.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and (weight is None or (type(weight) in _PLAIN and not weight.is_neg()))
        and (scale is None or (type(scale) in _PLAIN and not scale.is_neg()))
        and (zero_point is None or (type(zero_point) in _PLAIN and not zero_point.is_neg()))
        and (bias is None or (type(bias) in _PLAIN and not bias.is_neg()))
        and _modes is not None
        and not _modes()
        and _transforms is not None
        and _transforms() is None
        and not _tracing()
        and not x.is_neg()
    )
