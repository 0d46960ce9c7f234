"""Whether tensors are just memory that a kernel may read, with nobody watching the operations on them."""

import torch
from torch import Tensor, nn

_PLAIN = frozenset((Tensor, nn.Parameter))
# Dispatch modes (fake tensors, tracing, counters) and function transforms (vmap, grad) see operators only.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)


def is_plain(first: Tensor, second: Tensor) -> bool:
    """True in plain eager mode; False while compiling, exporting, tracing, under a mode or a transform."""
    return (
        not torch.compiler.is_compiling()
        and type(first) in _PLAIN
        and type(second) in _PLAIN
        and _modes is not None
        and not _modes()
        and _transforms is not None
        and _transforms() is None
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )
