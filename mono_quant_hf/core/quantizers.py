"""From a float weight to its codes and back.

`quantize_to_codes` and `dequantize_codes` work on plain tensors and are what the package itself uses.
`quantize_weight_int8`, `quantize_weight_fp16` and `dequantize_weight` are the interface for users of torch's own
quantized tensors, which torch deprecates: nothing inside the package depends on them.
"""

import warnings

import torch
from torch import Tensor

from .mappers import INT8_MAX, INT8_MIN, calculate_scale_zp_per_channel, check_weight

BLOCK_ELEMENTS = 2**18
FLOAT16_MAX = torch.finfo(torch.float16).max


def quantize_to_codes(
    weight: Tensor, symmetric: bool = False, axis: int | tuple[int, ...] = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight to per-channel int8 codes: `codes = clamp(round(weight / scale) + zero_point)`.

    Rounding is to the nearest, ties to even, in float32, as in `torch.ops.quantized_decomposed`. The older
    `torch.quantize_per_channel` adds the zero-point before it rounds, and so may give the other neighbour where a
    weight lies exactly between two codes.

    Args:
        weight: floating-point, any shape with at least one dimension and no empty one.
        symmetric: zero-point 0 and codes in [-127, 127]; else the full [-128, 127] with a zero-point.
        axis: the channel dimension, or a tuple of them for a channel per combination of their indices.

    Returns:
        `(codes, scale, zero_point)`: int8 as the weight; float32 and int8 with the channels along `axis` and size 1
        elsewhere, so that they broadcast; `zero_point` is None when symmetric.

    Raises:
        TypeError, ValueError: as `calculate_scale_zp_per_channel`.

    Example:
        >>> import torch
        >>> codes, scale, zero_point = quantize_to_codes(torch.tensor([[-1.0, 0.5], [0.0, 0.0]]))
        >>> codes.dtype, tuple(scale.shape), tuple(zero_point.shape)
        (torch.int8, (2, 1), (2, 1))
        >>> bool((dequantize_codes(codes, scale, zero_point)[1] == 0).all())
        True
    """
    axes = check_weight(weight, axis)
    weight = weight.detach()
    scale, zero_point = calculate_scale_zp_per_channel(weight, symmetric=symmetric, axis=axes)
    shape = [size if dim in axes else 1 for dim, size in enumerate(weight.shape)]
    scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    inverse, offset = 1.0 / scale, zero_point.to(torch.float32)
    lowest = -INT8_MAX if symmetric else INT8_MIN
    # By blocks of the first dimension: five passes over a block in cache cost less than two over all of memory.
    rows_per_block = max(1, BLOCK_ELEMENTS * len(weight) // weight.numel())
    for start in range(0, len(weight), rows_per_block):
        block = slice(start, start + rows_per_block)
        channels = block if 0 in axes else slice(None)
        steps = weight[block].to(torch.float32) * inverse[channels]
        steps.round_()
        if not symmetric:
            steps.add_(offset[channels])
        codes[block] = steps.clamp_(lowest, INT8_MAX)
    return codes, scale, None if symmetric else zero_point.to(torch.int8)


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`(codes - zero_point) * scale`, computed in float32 and returned in `dtype`.

    Args:
        codes: int8, any shape.
        scale: float32, broadcasts against the codes.
        zero_point: int8, as the scale; None stands for 0.
        dtype: floating-point type of the result.

    Example:
        >>> import torch
        >>> codes = torch.tensor([[-128, 127]], dtype=torch.int8)
        >>> dequantize_codes(codes, torch.tensor([[0.5]]), torch.tensor([[-128]], dtype=torch.int8))
        tensor([[  0.0000, 127.5000]])
    """
    values = codes.to(torch.float32)
    if zero_point is not None:
        values -= zero_point
    values *= scale
    return values.to(dtype)


def quantize_weight_int8(weight: Tensor, symmetric: bool = False, axis: int = 0) -> Tensor:
    """Quantize a weight to a per-channel `torch.qint8` tensor with `torch.quantize_per_channel`.

    Args:
        weight: floating-point, any shape with at least one dimension and no empty one.
        symmetric: zero-point 0 and codes in [-127, 127].
        axis: the channel dimension.

    Returns:
        A `torch.qint8` tensor of the same shape; `dequantize_weight` gives the float32 weight back.

    Raises:
        TypeError, ValueError: as `calculate_scale_zp_per_channel`.
        RuntimeError: this torch no longer has quantized tensors.

    Example:
        >>> import torch
        >>> weight = torch.linspace(-1, 1, 12).reshape(3, 4)
        >>> quantized = quantize_weight_int8(weight)
        >>> quantized.dtype, bool((dequantize_weight(quantized) - weight).abs().max() < 0.004)
        (torch.qint8, True)
    """
    (axis,) = check_weight(weight, axis)
    scale, zero_point = calculate_scale_zp_per_channel(weight.detach(), symmetric=symmetric, axis=axis)
    if not hasattr(torch, "quantize_per_channel"):
        raise RuntimeError(
            f"torch {torch.__version__} no longer has quantized tensors (torch.quantize_per_channel); "
            "use mono_quant_hf.core.quantize_to_codes, which returns plain codes, scale and zero-point."
        )
    with warnings.catch_warnings():
        # The deprecation is ours to deal with (see the module docstring), not the caller's.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        return torch.quantize_per_channel(weight.detach().float(), scale, zero_point, axis, torch.qint8)


def quantize_weight_fp16(weight: Tensor) -> Tensor:
    """Cast a weight to float16; `dequantize_weight` gives it back as float32.

    Raises:
        TypeError: the weight is not floating-point.
        ValueError: NaN or infinite values, or magnitudes past 65504, which float16 cannot hold.

    Example:
        >>> import torch
        >>> quantize_weight_fp16(torch.tensor([0.1, 2.0]))
        tensor([0.1000, 2.0000], dtype=torch.float16)
        >>> quantize_weight_fp16(torch.tensor([1e6]))
        Traceback (most recent call last):
            ...
        ValueError: The weight contains values up to 1e+06, past the float16 maximum of 65504; ...
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"Expected a floating-point tensor, got {got}; dequantize or cast it first.")
    half = weight.detach().to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        finite = bool(torch.isfinite(weight).all())
        problem = (
            f"values up to {float(weight.detach().abs().max()):g}, past the float16 maximum of {FLOAT16_MAX:g}"
            if finite
            else "NaN or infinite values"
        )
        remedy = 'use weights="int8"' if finite else "repair or retrain it"
        raise ValueError(f"The weight contains {problem}; {remedy} before quantizing.")
    return half


def dequantize_weight(q_weight: Tensor) -> Tensor:
    """The float32 weight that a `torch.qint8` or float16 tensor stands for.

    Raises:
        TypeError: any other type of tensor, or no tensor.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[-1.0, 0.0, 1.0], [-8.0, 0.0, 8.0]])
        >>> error = (dequantize_weight(quantize_weight_int8(weight, symmetric=True)) - weight).abs().max()
        >>> bool(error < 1e-6), dequantize_weight(weight.half()).dtype
        (True, torch.float32)
    """
    if isinstance(q_weight, Tensor) and q_weight.dtype is torch.float16:
        return q_weight.float()
    if isinstance(q_weight, Tensor) and q_weight.dtype is torch.qint8:
        return q_weight.dequantize()
    got = f"a tensor of {q_weight.dtype}" if isinstance(q_weight, Tensor) else type(q_weight).__name__
    raise TypeError(
        f"Expected a torch.qint8 or torch.float16 weight, as quantize_weight_int8 and quantize_weight_fp16 return, "
        f"got {got}."
    )
