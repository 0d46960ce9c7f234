"""From the range of each channel to its scale and zero-point."""

import torch
from torch import Tensor

INT8_MIN, INT8_MAX = -128, 127


def calculate_scale_zp_per_channel(
    tensor: Tensor,
    dtype: torch.dtype = torch.qint8,
    symmetric: bool = False,
    axis: int | tuple[int, ...] = 0,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of every channel of a weight.

    The range of a channel always includes 0, so that 0.0 is represented exactly:
    `min = min(0, min(w))`, `max = max(0, max(w))`. Then (Jacob et al. 2018, "Quantization and Training of
    Neural Networks for Efficient Integer-Arithmetic-Only Inference", equation 1, for signed codes)

    - asymmetric: `scale = (max - min) / 255`, `zero_point = round(-128 - min / scale)` in [-128, 127];
    - symmetric: `scale = max(|w|) / 127`, `zero_point = 0`.

    A channel of zeros gets scale 1 and zero-point 0. Everything is computed in float32.

    Args:
        tensor: floating-point weight of any shape with at least one dimension and no empty dimension.
        dtype: `torch.qint8`, the only code type there is.
        symmetric: keep the zero-point at 0 and the codes in [-127, 127].
        axis: the channel dimension; negative counts from the end. A tuple of dimensions gives a channel to each
            combination of their indices, such as (0, 1) for every output row of every expert.

    Returns:
        `(scale, zero_point)`: float32 `[channels]`, strictly positive, and int64 `[channels]`; for a tuple of
        dimensions, with these dimensions in the order of the tensor.

    Raises:
        TypeError: the tensor is not floating-point.
        ValueError: another dtype, no or empty dimensions, an axis out of range, NaN or infinite values, or a
            range that float32 cannot hold.

    Example:
        >>> import torch
        >>> scale, zero_point = calculate_scale_zp_per_channel(torch.tensor([[0.0, 2.55], [-1.28, 1.27]]))
        >>> [round(s, 4) for s in scale.tolist()], zero_point.tolist()
        ([0.01, 0.01], [-128, 0])
    """
    if dtype is not torch.qint8:
        raise ValueError(f"dtype must be torch.qint8, the code type of int8 quantization, not {dtype}.")
    axes = check_weight(tensor, axis)
    other_dims = [dim for dim in range(tensor.dim()) if dim not in axes]
    # amin and amax of no dimension reduce over all of them, so a 1-D weight (a channel per element) is its own
    # range. Reducing before the cast to float32 is exact and saves a float32 copy of the weight.
    low = (tensor.amin(dim=other_dims) if other_dims else tensor).float()
    high = (tensor.amax(dim=other_dims) if other_dims else tensor).float()
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise ValueError(_describe_not_finite(tensor))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)

    reach, steps = (torch.maximum(-low, high), INT8_MAX) if symmetric else (high - low, INT8_MAX - INT8_MIN)
    # By a tensor: CUDA divides by a number as it multiplies by the inverse, which rounds unlike a CPU.
    scale = reach / torch.full_like(reach, steps)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("The range of a channel is wider than float32 can hold; rescale the weight first.")
    # A range so small that its step is below the smallest normal float32 is rounded to 0 on some processors;
    # the smallest normal step is then still exact to half a step.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(low == high, torch.ones_like(scale), scale)
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int64)
    zero_point = torch.round(INT8_MIN - low / scale).clamp(INT8_MIN, INT8_MAX)
    zero_point = torch.where(low == high, torch.zeros_like(zero_point), zero_point)
    return scale, zero_point.to(torch.int64)


def check_weight(tensor: Tensor, axis: int | tuple[int, ...] = 0) -> tuple[int, ...]:
    """Refuse what cannot be quantized per channel; return the axes counted from the front, in ascending order."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"Expected a floating-point tensor, got {type(tensor).__name__}.")
    if tensor.is_quantized or not tensor.is_floating_point():
        raise TypeError(
            f"Expected a floating-point tensor, got one of {tensor.dtype}; dequantize or cast it first."
        )
    if tensor.dim() == 0:
        raise ValueError("A scalar has no channels; pass a tensor with at least one dimension.")
    if tensor.numel() == 0:
        raise ValueError(
            f"A tensor of shape {tuple(tensor.shape)} has no elements, so its channels have no range."
        )
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not axes:
        raise ValueError("An empty tuple of axes leaves no channels; name at least one axis.")
    for one in axes:
        if not -tensor.dim() <= one < tensor.dim():
            raise ValueError(
                f"axis {one} is out of range for a tensor of shape {tuple(tensor.shape)}; "
                f"choose one from {-tensor.dim()} to {tensor.dim() - 1}."
            )
    return tuple(sorted({one % tensor.dim() for one in axes}))


def _describe_not_finite(tensor: Tensor) -> str:
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    found = " and ".join(
        f"{count} {what}" for count, what in ((nans, "NaN"), (infinities, "infinite value(s)")) if count
    )
    return f"The weight contains {found}, so it has no range; repair or retrain it before quantizing."
