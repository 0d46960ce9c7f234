"""What the tensors of a product must be: each fault is one sentence, since kernels read raw memory."""

from operator import attrgetter

import torch
from torch import Tensor, nn

Column = Tensor | None
"""A scale or zero-point [N, 1] or a bias [N]; None where there is none."""

_PLAIN = frozenset((Tensor, nn.Parameter))
# Dispatch modes (fake tensors, tracing, counters) and function transforms (vmap, grad) see operators only.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_tracing = torch._C._is_tracing
_is_cpu, _is_cuda = attrgetter("is_cpu"), attrgetter("is_cuda")
_READ = frozenset((torch.float32, torch.bfloat16))  # what a kernel reads of a bias


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    inner: int = 1,
) -> bool:
    """Raise where the operands of a product over dimension `inner` of the weight do not fit, or have no memory.

    Returns:
        True if they are as a kernel reads them: on the CPU, without gaps, in its dtypes but for x.

    Raises:
        RuntimeError: a shape or a device that does not fit the others; memory that was freed; a sparse tensor.
        TypeError: a dtype that the product has no meaning for.
    """
    # Nearly every call, in as few looks at the tensors as there can be: a look takes 0.06 us, a small product 10.
    try:
        shape = weight.shape
        rows = shape[0]
        on_cpu = x.is_cpu
        here = _is_cpu if on_cpu else _is_cuda
        if (
            x.shape[-1] == shape[inner]
            and len(shape) == 2
            and here(x)
            and x.is_floating_point()
            and x.is_contiguous()
            and not x.storage_offset()
            and x.untyped_storage().nbytes() >= x.nbytes
            and here(weight)
            and weight.is_contiguous()
            and not weight.storage_offset()
            and weight.untyped_storage().nbytes() >= weight.nbytes
            and (
                weight.dtype is torch.float16 and zero_point is None
                if scale is None
                else weight.dtype is torch.int8
                and scale.dtype is torch.float32
                and scale.shape == (rows, 1)
                and here(scale)
                and scale.is_contiguous()
                and not scale.storage_offset()
                and scale.untyped_storage().nbytes() >= 4 * rows
            )
            and (
                zero_point is None
                or (
                    zero_point.dtype is torch.int8
                    and zero_point.shape == (rows, 1)
                    and here(zero_point)
                    and zero_point.is_contiguous()
                    and not zero_point.storage_offset()
                    and zero_point.untyped_storage().nbytes() >= rows
                )
            )
            and (
                bias is None
                or (
                    (bias.dtype in _READ or (not on_cpu and bias.dtype is torch.float16))
                    and bias.shape == (rows,)
                    and here(bias)
                    and bias.is_contiguous()
                    and not bias.storage_offset()
                    and bias.untyped_storage().nbytes() >= bias.nbytes
                )
            )
            and (on_cpu or _on_one_card(x, weight, scale, zero_point, bias))
        ):
            return on_cpu
    except (IndexError, NotImplementedError, RuntimeError):  # no dimension, no storage, no shape
        pass
    check_kinds(x, weight, scale, zero_point, bias, inner)
    check_memory(input=x, weight=weight, scale=scale, zero_point=zero_point, bias=bias)
    return False


def _on_one_card(x: Tensor, *operands: Tensor | None) -> bool:
    card = x.get_device()
    return all(operand is None or operand.get_device() == card for operand in operands)


def check_kinds(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    inner: int = 1,
) -> None:
    """Of `check` what holds for tensors without memory too."""
    for operand in (x, weight, scale, zero_point, bias):
        if operand is not None and operand.is_nested and operand.layout is torch.strided:
            raise RuntimeError("Expected dense tensors, got a nested one; pad it.")  # it has no shape to name
    shape, given = weight.shape, x.shape
    if len(shape) != 2:
        raise RuntimeError(f"Expected a weight [N, K], got {list(shape)}; reshape it.")
    if not given or given[-1] != shape[inner]:
        raise RuntimeError(
            f"The input {list(given)} does not fit the weight {list(shape)}: its last dimension must be {shape[inner]}."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"The input of a quantized linear must be floating, got {x.dtype}; convert it to float32, bfloat16 or "
            f"float16, and look for what cast it (the dtype of the quantized weight is {weight.dtype})."
        )
    _check_together("input", x, weight)
    check_codes(weight, scale, zero_point)
    column = [shape[0], 1]
    for name, operand, fitting in (
        ("scale", scale, column),
        ("zero_point", zero_point, column),
        ("bias", bias, column[:1]),
    ):
        if operand is not None and list(operand.shape) != fitting:
            raise RuntimeError(
                f"The {name} {list(operand.shape)} does not fit the weight {list(shape)}: it must be {fitting}."
            )
    if bias is not None:
        _check_together("bias", bias, weight)
        if not bias.is_floating_point():
            raise TypeError(f"Expected a floating bias, got {bias.dtype}; convert it to float32.")


def check_codes(weight: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> None:
    """Raise unless these are int8 codes with a scale, or floats without; of whatever shapes."""
    if scale is None:
        if not weight.is_floating_point():
            raise TypeError(
                f"Expected a float16 weight, got {weight.dtype}; give int8 codes with their scale."
            )
        if zero_point is not None:
            raise TypeError("Expected no zero_point without a scale, got one; give both or neither.")
        return
    if weight.dtype is not torch.int8:
        raise TypeError(
            f"Expected a weight of int8 codes, got {weight.dtype}; give a float weight without a scale."
        )
    _check_together("scale", scale, weight)
    if not scale.is_floating_point():
        raise TypeError(f"Expected a floating scale, got {scale.dtype}; convert it to float32.")
    if zero_point is not None:
        _check_together("zero_point", zero_point, weight)
        if zero_point.dtype is not torch.int8:
            raise TypeError(f"Expected a zero_point of int8, got {zero_point.dtype}; convert it to int8.")


def _check_together(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise RuntimeError(
            f"The {name} {list(tensor.shape)} is on {tensor.device} and the weight on {weight.device}: "
            f"move them together."
        )


def check_memory(**tensors: Tensor | None) -> None:
    """Raise unless each tensor is dense, and its storage holds every one of its elements.

    Raises:
        RuntimeError: the memory was freed or made smaller, or the tensor is sparse.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise RuntimeError(f"Expected a dense {name}, got {tensor.layout}; call its to_dense().")
        try:
            held = tensor.untyped_storage().nbytes()
        except NotImplementedError as error:  # what a function transform leaves behind when it is over
            raise RuntimeError(
                f"Expected a {name} with memory of its own ({error}); compute it anew."
            ) from error
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = tensor.element_size() * (tensor.storage_offset() + last + 1) if tensor.numel() else 0
        if held < needed:
            raise RuntimeError(
                f"The memory of the {name} {list(tensor.shape)} was freed or made smaller ({held} bytes of "
                f"{needed}): load or gather it again before it is used."
            )


def is_plain(
    x: Tensor, weight: Column = None, scale: Column = None, zero_point: Column = None, bias: Column = None
) -> bool:
    """Whether these are just memory that a kernel may read, with nobody watching the operations on them.

    True in plain eager mode; False while compiling, exporting, tracing, under a mode or a transform.

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
