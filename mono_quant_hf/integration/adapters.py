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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from mono_quant_hf.core import dequantize_codes, sqnr
from mono_quant_hf.modules import QuantizedModule

logger = logging.getLogger("mono_quant_hf")

DECIBELS_OF_A_BIT = 6


class OnQuantized:
    """Mixin of PEFT's layers whose base layer is quantized.

    PEFT's own methods run unchanged, but see a float module in the place of the quantized one wherever they read or
    write its weight: the norm of DoRA is that of the dequantized weight, and a merge, safe or not, is one of float32
    weights, which are quantized again when all went well. The tensors from before are kept for `unmerge`.
    """

    before_merge: dict[str, nn.Parameter | None]
    """The parameters of the quantized module as they were, while adapters are merged."""
    merged_adapters: list[str]

    def get_base_layer(self) -> nn.Module:
        """The base layer in float, as PEFT computes with it; the quantized module is the attribute `base_layer`."""
        base = super().get_base_layer()  # type: ignore[misc]
        return _float_view(base, self._adapter_dtype()) if isinstance(base, QuantizedModule) else base

    @property
    def weight(self) -> Tensor:
        """The codes, which other modules may ask for their dtype, as they would of the quantized module."""
        return super().get_base_layer().weight  # type: ignore[misc]

    def update_layer(self, *args: Any, **kwargs: Any) -> Any:
        with self._float_base(lazy=True) as (quantized, view):
            result = super().update_layer(*args, **kwargs)  # type: ignore[misc]
        for name in quantized.weight_axes if view is not quantized else ():
            made = dict.get(view._parameters, name)
            if made is None or made.is_meta:  # offloaded; no initialization reads it
                continue
            if not torch.equal(made.data, quantized.dequantized(name)):
                raise ValueError(
                    f"{_name_of(quantized)} is quantized, and this initialization of the adapter (pissa, olora, corda, "
                    "loftq and the like) would change its weight; use init_lora_weights=True, or dequantize() the "
                    "model first."
                )
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters in float32 and quantize the result; what was merged before is not rounded twice."""
        quantized = super().get_base_layer()  # type: ignore[misc]
        if not isinstance(quantized, QuantizedModule):  # PEFT calls itself, on the float module
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        if getattr(getattr(quantized, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"{_name_of(quantized)} is offloaded, where PEFT would lose what is merged; load the model without "
                "offload to merge adapters."
            )
        already, before = list(self.merged_adapters), dict(quantized._parameters)
        names = _tuners_utils().check_adapters_to_merge(self, adapter_names)
        if not names:
            return None
        if already:
            self._put_back(quantized)
        try:
            self.merged_adapters = []
            with self._float_base() as (_, merged):
                super().merge(safe_merge=safe_merge, adapter_names=[*already, *names])  # type: ignore[misc]
            unmerged = dict(quantized._parameters)
            if len(self.merged_adapters) > len(already):
                _quantize_again(quantized, merged)
                self.before_merge = unmerged
            else:
                quantized._parameters.update(before)
        except BaseException:
            quantized._parameters.update(before)
            self.merged_adapters = already
            raise

    def unmerge(self) -> None:
        """Put the codes, scales, zero-points and bias from before the merge back, to the bit."""
        quantized = super().get_base_layer()  # type: ignore[misc]
        if not isinstance(quantized, QuantizedModule) or not self.merged_adapters:
            return super().unmerge()  # type: ignore[misc]
        with self._float_base():  # PEFT keeps its books; the weight it computes is thrown away
            super().unmerge()  # type: ignore[misc]
        self._put_back(quantized)
        del self.before_merge

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """With int8 codes under a path that no float model has, such as `base_layer.asymmetric_int8.weight`.

        PEFT saves the base layer of an embedding or a head together with its adapter. A float model that loads the
        adapter would take `base_layer.weight` for its own.
        """
        tensors = super().state_dict(*args, prefix=prefix, **kwargs)  # type: ignore[misc]
        base = self._modules["base_layer"]  # type: ignore[attr-defined]
        if isinstance(base, QuantizedModule) and base.quantization.weights == "int8":
            for name in base.storage_names():
                tensors[f"{prefix}base_layer.{_form(base)}.{name}"] = tensors.pop(
                    f"{prefix}base_layer.{name}"
                )
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

    def _put_back(self, quantized: QuantizedModule) -> None:
        for name, kept in self.before_merge.items():
            now = quantized._parameters[name]
            if kept is not None and now is not None and kept.device != now.device:
                kept.data = kept.data.to(now.device)
            quantized._parameters[name] = kept

    @contextmanager
    def _float_base(self, lazy: bool = False) -> Iterator[tuple[Any, Any]]:
        """Put a float module in the place of the base layer; yields the quantized module and the float one."""
        holder: Any = self
        while hasattr(holder.base_layer, "base_layer"):
            holder = holder.base_layer
        quantized = holder.base_layer
        if not isinstance(quantized, QuantizedModule):
            yield quantized, quantized
            return
        view = _float_view(quantized, torch.float32) if lazy else quantized.to_float()
        for name, parameter in () if lazy else view._parameters.items():
            if parameter is not None and name not in quantized.weight_axes:
                # A bias, which a merge adds to in place.
                view._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        holder._modules["base_layer"] = view
        try:
            yield quantized, view
        finally:
            holder._modules["base_layer"] = quantized

    def _adapter_dtype(self) -> torch.dtype:
        """The dtype that the adapters compute in; float32 before there are any."""
        for name in self.adapter_layer_names:  # type: ignore[attr-defined]
            layers = getattr(self, name, None)
            for parameter in layers.parameters() if isinstance(layers, nn.Module) else ():
                if parameter.is_floating_point():
                    return parameter.dtype
        return torch.float32

    # Two questions that PEFT asks of every layer, answered without making the float weight.

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return super()._get_in_out_features(super().get_base_layer())  # type: ignore[misc]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return super().get_base_layer().get_parameter("weight").device, None  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle would not find it by its name.
        return _new_instance, (self.peft_class,), self.__dict__.copy()  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def on_quantized(peft_class: type[nn.Module]) -> type[nn.Module]:
    """The form of a layer of PEFT for a quantized base layer."""
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


METHODS = ("lora",)
"""The methods of PEFT, by the name of their package, that the tests train and merge on quantized modules."""

_PLACES = frozenset({"base_layer", "original_module"})

register_module_module_registration_hook(_adapt)


class _MadeOnDemand(dict[str, Any]):
    """Parameters of which the float weights are made when they are first asked for."""

    def __init__(self, parameters: dict[str, Any], make: Callable[[str], Tensor], names: tuple[str, ...]):
        super().__init__(parameters)
        self.make, self.names = make, names

    def __getitem__(self, name: str) -> Any:
        if name in self.names and super().__getitem__(name) is None:
            self[name] = nn.Parameter(self.make(name), requires_grad=False)
        return super().__getitem__(name)


def _float_view(quantized: QuantizedModule, dtype: torch.dtype) -> nn.Module:
    """A module of the float class whose weight is dequantized when it is read; the bias is the module's own."""
    view, names = quantized.without_weights(), tuple(quantized.weight_axes)
    companions = {companion for name in names for companion in quantized.companions(name)}
    own = {key: parameter for key, parameter in quantized._parameters.items() if key not in companions}
    view._parameters = _MadeOnDemand(
        {**own, **dict.fromkeys(names)}, lambda name: quantized.dequantized(name, dtype), names
    )
    return view


def _quantize_again(quantized: QuantizedModule, merged: nn.Module) -> None:
    """Give a quantized module new parameters for merged float weights; channels that did not change keep theirs."""
    for name in quantized.weight_axes:
        weight, before = merged.get_parameter(name).data, quantized.dequantized(name)
        new = quantized.quantized_tensors(name, weight)
        scale = new.get(f"{name}_scale")
        over = [d for d in range(weight.dim()) if scale is not None and scale.shape[d] == 1]
        changed = weight != before
        changed = changed.any(dim=over, keepdim=True) if over else changed
        for key in new.keys() & set(quantized.storage_names()):
            kept = torch.where(changed, new[key], quantized.get_parameter(key).data)
            quantized._parameters[key] = nn.Parameter(kept, requires_grad=False)
        rounded = quantized.dequantized(name)
        _tell_rounding(
            f"{_name_of(quantized)}.{name}", quantized.quantization.weights, weight, before, rounded
        )
    bias, merged_bias = quantized._parameters.get("bias"), merged._parameters.get("bias")
    if bias is not None and merged_bias is not None and not torch.equal(merged_bias.data, bias.data.float()):
        merged_bias = nn.Parameter(merged_bias.data.to(bias.dtype), requires_grad=bias.requires_grad)
        quantized._parameters["bias"] = merged_bias


def _form(quantized: QuantizedModule) -> str:
    return "symmetric_int8" if quantized.quantization.symmetric else "asymmetric_int8"


def _bring_into_form(quantized: QuantizedModule, state_dict: dict[str, Any], prefix: str) -> None:
    """Replace the weights in a state dict by what the module holds: they may be float, or codes of another form.

    So an adapter that was trained on the float model, or on one quantized otherwise, loads with its embedding.
    """
    for name in quantized.weight_axes:
        for form in ("symmetric_int8", "asymmetric_int8"):
            paths = {part: f"{prefix}{form}.{name}{part}" for part in ("", "_scale", "_zero_point")}
            held = {part: state_dict.pop(path) for part, path in paths.items() if path in state_dict}
            if quantized.quantization.weights == "int8" and form == _form(quantized):
                state_dict.update({f"{prefix}{name}{part}": tensor for part, tensor in held.items()})
            elif held:
                state_dict[prefix + name] = dequantize_codes(
                    held[""], held["_scale"], held.get("_zero_point")
                )
        weight = state_dict.get(prefix + name)
        if (
            weight is not None
            and weight.is_floating_point()
            and weight.dtype != quantized.storage_dtype(name)
        ):
            tensors = quantized.quantized_tensors(name, weight)
            state_dict.update({prefix + key: tensor for key, tensor in tensors.items()})


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
