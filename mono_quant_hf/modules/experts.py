"""Modules that hold the weights of all their experts in 3-D parameters, `[experts, out, in]` or `[experts, in, out]`.

Such as `gate_up_proj` and `down_proj` of the mixture-of-experts models of transformers, but any class will do whose
source multiplies by one expert's weight at a time (see `usage`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mono_quant_hf.core import quantize_to_codes

from .base import QuantizedModule
from .own_forward import OwnForward, quantized_form
from .registry import register_quantized_class_finder
from .usage import usage_of


class QuantizedExperts(OwnForward):
    """Experts with int8 codes, a scale and zero-point per expert and output feature, or float16 weights.

    The forward is that of the original class; its products with one expert's weight go to the kernels, so that only
    the experts that tokens are sent to are expanded, one at a time. transformers' other implementations (batched,
    grouped) need all experts as one float tensor, so whichever is selected, the eager forward is what runs.

    Shapes:
        a weight int8 or float16 `[experts, out, in]` with scale float32 and zero-point int8 `[experts, out, 1]`;
        where the class stores `[experts, in, out]`, `[experts, 1, out]`. Biases stay float `[experts, out]`.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import quantized_class_for
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> experts = MixtralExperts(MixtralConfig(hidden_size=16, intermediate_size=32, num_local_experts=4))
        >>> for weight in experts.parameters():
        ...     _ = torch.nn.init.normal_(weight, std=0.1)
        >>> quantized = quantized_class_for(experts).from_float(experts, "int8", symmetric=False)
        >>> quantized.gate_up_proj.dtype, quantized.gate_up_proj_scale.shape
        (torch.int8, torch.Size([4, 64, 1]))
        >>> x, chosen = torch.randn(5, 16), torch.tensor([[0, 3]] * 5)
        >>> y = quantized(x, chosen, torch.full((5, 2), 0.5))
        >>> bool((y - experts(x, chosen, torch.full((5, 2), 0.5))).abs().max() < 0.05)
        True
    """

    quantizes_activations = True

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if not cls.weight_axes:
            reasons = (usage_of(module, name).reason for name in stacked_parameters(module))
            return next(
                filter(None, reasons), "its parameters of three dimensions are not the weights of experts"
            )
        return super().refuses(module)

    def _quantize(self, weight_name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # One expert at a time: rounding takes a float32 copy, and all experts of a layer are a large part of a model.
        _, out_axis = self.weight_axes[weight_name]  # type: ignore[misc]
        symmetric = self.quantization.symmetric
        experts = [quantize_to_codes(expert, symmetric, out_axis - 1) for expert in weight]
        codes, scales, zero_points = zip(*experts, strict=True)
        return torch.stack(codes), torch.stack(scales), None if symmetric else torch.stack(zero_points)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(self.get_parameter(name).shape)}" for name in self.weight_axes)
        return f"{shapes}{super().extra_repr()}"


@register_quantized_class_finder
def experts_class_for(module: nn.Module) -> type[QuantizedModule] | None:
    """The quantized class of a module with stacked parameters; one that refuses where their use is not understood."""
    names = stacked_parameters(module)
    if not names:
        return None
    orientations = {name: usage_of(module, name).out_last for name in names}
    axes = tuple((name, (0, 2 if last else 1)) for name, last in orientations.items() if last is not None)
    return quantized_form(QuantizedExperts, type(module), axes if len(axes) == len(names) else ())  # type: ignore[arg-type]


def stacked_parameters(module: nn.Module) -> list[str]:
    """Names of the module's own floating-point parameters of three dimensions, none of them of size 1."""
    if type(module).__module__.partition(".")[0] == "torch":
        return []
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None
        and parameter.dim() == 3
        and min(parameter.shape) > 1
        and parameter.is_floating_point()
    ]
