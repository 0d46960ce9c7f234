"""Adapters of PEFT on quantized modules: trained on the codes as they are, merged in float and rounded again.

PEFT looks for a layer of its own by the class of the module, and a quantized Linear is an `nn.Linear`: its
`lora.Linear` would train, but add its change to int8 codes when it merges. PEFT's mechanism for custom modules
(`LoraConfig._register_custom_module`) belongs to one config object and is not saved with an adapter, so it cannot help
`PeftModel.from_pretrained`. Here torch's hook on the registration of submodules sees PEFT put a quantized module into
a layer of its own, and gives that layer a class that also inherits from `OnQuantized`. Every way to an adapter leads
through there, and neither PEFT nor transformers is changed. PEFT is not imported.

Example:
    >>> from peft import LoraConfig, get_peft_model
    >>> from mono_quant_hf import quantize_model
    >>> model = quantize_model(torch.nn.Sequential(torch.nn.Linear(16, 4)))
    >>> model = get_peft_model(model, LoraConfig(target_modules=["0"], r=2))
    >>> type(model.base_model.model[0]).__name__, model(torch.ones(1, 16)).requires_grad
    ('LinearOnQuantized', True)
    >>> model.merge_and_unload()
    Sequential(
      (0): QuantizedLinear(in_features=16, out_features=4, bias=True, weights=int8, asymmetric)
    )
"""

from __future__ import annotations

import functools
import logging
import math
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from mono_quant_hf.core import dequantize_codes, sqnr
from mono_quant_hf.modules import QuantizedModule
from mono_quant_hf.modules.base import stored_names, twin_of
from mono_quant_hf.versions import warn_of_newer

logger = logging.getLogger("mono_quant_hf")
_look_at_version = functools.cache(functools.partial(warn_of_newer, "peft"))
"""Once."""

DECIBELS_OF_A_BIT = 6


class OnQuantized:
    """Mixin of PEFT's layers whose base layer is quantized.

    PEFT's own methods run unchanged and meet the float weight that the base layer shows. Only a merge changes it: the
    base layer is then float while PEFT adds to it, and quantized again. What it was before is kept for `unmerge`.
    """

    before_merge: QuantizedModule
    """A twin of the base layer as it was, while adapters are merged."""
    merged_adapters: list[str]

    def update_layer(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().update_layer(*args, **kwargs)  # type: ignore[misc]
        except (AttributeError, RuntimeError) as problem:
            base = super().get_base_layer()  # type: ignore[misc]
            if not isinstance(base, QuantizedModule) or not str(problem).startswith("Expected no change"):
                raise
            raise ValueError(
                f"{_name_of(base)} is quantized, and this initialization of the adapter (pissa, olora, corda, loftq, "
                "…) would change its weight; use init_lora_weights=True, or dequantize() the model first."
            ) from problem

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters in float32 and quantize the result; what was merged before is not rounded twice."""
        module = super().get_base_layer()  # type: ignore[misc]
        if not isinstance(module, QuantizedModule):  # PEFT calls itself, on the float module
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"{_name_of(module)} is offloaded, where PEFT would lose what is merged; load the model without "
                "offload to merge adapters."
            )
        names = _tuners_utils().check_adapters_to_merge(self, adapter_names)
        if not names:
            return None
        already, now = list(self.merged_adapters), twin_of(module)
        before = self._before(module) if already else now
        try:
            self.merged_adapters = []
            twin_of(before).lend_to(module).dequantize(torch.float32)
            for key, parameter in module._parameters.items():  # a merge adds to a bias in place
                if parameter is not None and key not in before.weight_axes:
                    module._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            super().merge(safe_merge=safe_merge, adapter_names=[*already, *names])  # type: ignore[misc]
            merged = _quantized_again(before, module) if len(self.merged_adapters) > len(already) else now
        except BaseException:
            self.merged_adapters = already
            now.lend_to(module)
            raise
        merged.lend_to(module)
        if merged is not now:
            self.before_merge = before

    def unmerge(self) -> None:
        """Put the codes, scales, zero-points and bias from before the merge back, to the bit."""
        module = super().get_base_layer()  # type: ignore[misc]
        if not isinstance(module, QuantizedModule) or not self.merged_adapters:
            return super().unmerge()  # type: ignore[misc]
        before = self._before(module)
        module.dequantize()
        super().unmerge()  # type: ignore[misc]  # PEFT keeps its books; the weight it computes is thrown away
        before.lend_to(module)
        del self.before_merge

    def _before(self, module: QuantizedModule) -> QuantizedModule:
        """The base layer as it was before the merge, where it is now."""
        return self.before_merge.to(device=next(module.parameters()).device, dtype=module.quantization.dtype)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """With int8 codes under a path that says their form, such as `base_layer.asymmetric_int8.weight_int8`.

        PEFT saves the base layer of an embedding or a head together with its adapter, and transformers' `load_adapter`
        sets tensor by tensor: a model quantized otherwise must not take these codes for its own.
        """
        tensors = super().state_dict(*args, prefix=prefix, **kwargs)  # type: ignore[misc]
        base = self._modules["base_layer"]  # type: ignore[attr-defined]
        if isinstance(base, QuantizedModule) and base.quantization.weights == "int8":
            form = FORMS[base.quantization.symmetric]
            for name in base.storage_names():
                tensors[f"{prefix}base_layer.{form}.{name}"] = tensors.pop(f"{prefix}base_layer.{name}")
        return tensors

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch hands what is left in `state_dict` to the base layer next.
        base = self._modules["base_layer"]  # type: ignore[attr-defined]
        if isinstance(base, QuantizedModule):
            _bring_into_form(base, state_dict, f"{prefix}base_layer.")
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT leaves in the model when it takes this layer out: the quantized module."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return super().get_base_layer()  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle would not find it by its name.
        return _new_instance, (self.peft_class,), self.__dict__.copy()  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def on_quantized(peft_class: type[nn.Module]) -> type[nn.Module]:
    """The form of a layer of PEFT for a quantized base layer."""
    _look_at_version()
    attributes = {"peft_class": peft_class, "__module__": __name__, "__doc__": peft_class.__doc__}
    return type(f"{peft_class.__name__}OnQuantized", (OnQuantized, peft_class), attributes)


def _new_instance(peft_class: type[nn.Module]) -> nn.Module:
    cls = on_quantized(peft_class)  # type: ignore[arg-type]  # classes are hashable
    return cls.__new__(cls)


def _adapt(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Hook of torch on every registration of a submodule: see the module docstring."""
    if name not in _PLACES or (tuners := sys.modules.get("peft.tuners.tuners_utils")) is None:
        return
    if name == "original_module":
        auxiliary = sys.modules["peft.utils.other"].AuxiliaryTrainingWrapper
        if isinstance(module, QuantizedModule) and isinstance(parent, auxiliary):
            raise ValueError(
                f"{_name_of(module)} is quantized and cannot be trained itself, as modules_to_save and "
                "trainable_token_indices would; target it with an adapter, or keep it in float when the model is "
                f"loaded: MonoQuantConfig(modules_to_not_convert=[{_name_of(module)!r}])."
            )
        return
    if not isinstance(parent, tuners.BaseTunerLayer) or isinstance(parent, OnQuantized):
        return
    base = module
    while isinstance(base, tuners.BaseTunerLayer):
        base = base.base_layer
    if not isinstance(base, QuantizedModule):
        return
    kind = type(parent).__module__
    if type(parent).__name__ == "ParamWrapper":
        raise ValueError(
            f"{_name_of(base)} is quantized, and PEFT cannot adapt its parameters (target_parameters): keep it in "
            f"float with MonoQuantConfig(modules_to_not_convert=[{_name_of(base)!r}]), or target other modules."
        )
    if not kind.startswith("peft.tuners.") or kind.split(".")[2] not in METHODS:
        method = kind.split(".")[2] if kind.startswith("peft.tuners.") else kind
        raise ValueError(
            f"{_name_of(base)} is quantized, and adapters of the kind {method!r} are not known to merge into codes "
            f"correctly; known are {', '.join(METHODS)}. Use one of them, or dequantize() the model first."
        )
    parent.__class__ = on_quantized(type(parent))  # type: ignore[arg-type]


FORMS = ("asymmetric_int8", "symmetric_int8")
"""Paths to the tensors of a quantized base layer, by whether it is symmetric."""

METHODS = ("lora",)
"""The methods of PEFT, by the name of their package, that the tests train and merge on quantized modules."""

_PLACES = frozenset({"base_layer", "original_module"})

register_module_module_registration_hook(_adapt)


def _quantized_again(before: QuantizedModule, merged: nn.Module) -> QuantizedModule:
    """The quantized form of merged float weights; channels that did not change keep theirs."""
    new = twin_of(before)
    for name in before.weight_axes:
        weight, unmerged = merged.get_parameter(name).data, before.dequantized(name)
        tensors = before.quantized_tensors(name, weight)
        scale = tensors.get(f"{name}_scale")
        over = [d for d in range(weight.dim()) if scale is not None and scale.shape[d] == 1]
        changed = weight != unmerged
        changed = changed.any(dim=over, keepdim=True) if over else changed
        new.put({k: torch.where(changed, t, before.get_parameter(k).data) for k, t in tensors.items()})
        rounded = new.dequantized(name)
        _tell_rounding(f"{_name_of(before)}.{name}", before.quantization.weights, weight, unmerged, rounded)
    bias, merged_bias = before._parameters.get("bias"), merged._parameters.get("bias")
    if bias is not None and merged_bias is not None and not torch.equal(merged_bias.data, bias.data.float()):
        new._parameters["bias"] = nn.Parameter(merged_bias.data.to(bias.dtype), bias.requires_grad)
    return new


def _bring_into_form(quantized: QuantizedModule, state_dict: dict[str, Any], prefix: str) -> None:
    """Replace the weights in a state dict by what the module holds: they may be float, or quantized otherwise.

    So an adapter that was trained on the float model, or on one quantized otherwise, loads with its embedding.
    """
    for form in FORMS:
        for key in [key for key in state_dict if key.startswith(f"{prefix}{form}.")]:
            state_dict[key.replace(f"{prefix}{form}.", prefix, 1)] = state_dict.pop(key)
    for name in quantized.weight_axes:
        own = {key for key in quantized.storage_names() if key.startswith(f"{name}_")}
        forms = {
            key: state_dict.get(f"{prefix}{key}")
            for key in {
                name,
                *own,
                *stored_names(name, "int8", symmetric=False),
                *stored_names(name, "float16", True),
            }
        }
        there = {key: tensor for key, tensor in forms.items() if tensor is not None}
        if not there or there.keys() == own:
            continue
        weight = there.get(name, there.get(f"{name}_float16"))
        if weight is None:
            weight = dequantize_codes(
                there[f"{name}_int8"], there[f"{name}_scale"], there.get(f"{name}_zero_point")
            )
        for key in there:
            del state_dict[f"{prefix}{key}"]
        tensors = quantized.quantized_tensors(name, weight)
        state_dict.update({f"{prefix}{key}": tensor for key, tensor in tensors.items()})


def _tell_rounding(name: str, weights: str, merged: Tensor, before: Tensor, rounded: Tensor) -> None:
    """Log what the rounding of a merged weight costs, and warn, once for every six decibels."""
    of_change = sqnr(merged - before, rounded - before)
    logger.info(
        "%s: merged with an SQNR of %.1f dB, %.1f dB of the change that the adapter makes",
        name,
        sqnr(merged, rounded),
        of_change,
    )
    if math.isinf(of_change):
        return
    low = math.floor(of_change / DECIBELS_OF_A_BIT) * DECIBELS_OF_A_BIT
    warnings.warn(
        f"Merging an adapter into {weights} weights rounds them again: the change it makes keeps an SQNR of "
        f"{low} to {low + DECIBELS_OF_A_BIT} dB in some layer (logger mono_quant_hf, level INFO: in each). To lose "
        "nothing, keep the adapter apart, or dequantize() the model before merging.",
        stacklevel=2,
    )


def _name_of(quantized: QuantizedModule) -> str:
    return quantized.quantization.module_name or type(quantized).__name__


def _tuners_utils() -> Any:
    return sys.modules["peft.tuners.tuners_utils"]
