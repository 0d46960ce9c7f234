"""What every quantized module has in common: storage, its protection, and the way from and back to float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mono_quant_hf import kernels
from mono_quant_hf.core import dequantize_codes, quantize_weight_fp16

STORAGE_DTYPES = {"int8": torch.int8, "float16": torch.float16}
"""What `weights` may be, and the dtype that the weight is stored in."""

_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def keep_from_initialization(parameter: nn.Parameter) -> None:
    """Keep transformers from drawing random numbers into codes that no checkpoint holds.

    GPT-2, T5 and CLIP initialize the weights of their modules' modules, unless marked as this one then is. The loader
    marks those that it loaded with True.
    """
    if not hasattr(parameter, "_is_hf_initialized"):
        parameter._is_hf_initialized = "not loaded"  # type: ignore[attr-defined]


def weights_of_dtype(dtype: torch.dtype) -> str:
    """The `weights` setting that a `dtype` argument stands for: `torch.qint8` or `torch.float16`."""
    if dtype is torch.qint8:
        return "int8"
    if dtype is torch.float16:
        return "float16"
    raise ValueError(f"dtype must be torch.qint8 or torch.float16, not {dtype}.")


@dataclass(frozen=True)
class Quantization:
    """How a module is quantized: its attribute `quantization`, the one name beside those of its tensors.

    Attributes:
        weights: `"int8"` or `"float16"`.
        symmetric: whether int8 codes go without zero-points; True for float16.
        activations: `"int8"`: the products round their input to int8 where that pays (`mono_quant_hf.kernels.linear`).
        float_class: of the module that it was made of.
        module_name: qualified name in the model it was made for, for error messages.
    """

    weights: str
    symmetric: bool
    activations: str | None
    float_class: type[nn.Module]
    module_name: str | None = None


class QuantizedModule(nn.Module):
    """Mixin of the modules that hold int8 codes or float16 weights in place of float ones.

    A subclass also inherits from the module it stands for, so that whoever asks `isinstance(module, nn.Linear)` is
    answered yes. Each weight `w` is a parameter of its own name with the companions `w_scale` (float32) and, when
    asymmetric, `w_zero_point` (int8), all without gradient. They keep their dtype under `.to(dtype)`, `.half()` and
    the like: a bfloat16 scale would lose 16 of its 24 bits.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import QuantizedLinear
        >>> layer = QuantizedLinear.from_float(torch.nn.Linear(8, 2), "int8", symmetric=False)
        >>> isinstance(layer, QuantizedModule), isinstance(layer, torch.nn.Linear)
        (True, True)
        >>> {name: tensor.dtype for name, tensor in layer.half().state_dict().items()}
        {'weight': torch.int8, 'bias': torch.float16, 'weight_scale': torch.float32, 'weight_zero_point': torch.int8}
    """

    weight_axes: ClassVar[dict[str, int | tuple[int, ...]]] = {"weight": 0}
    """Name of each weight to quantize, and the axis (or axes) along which it has a scale each."""

    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    quantization: Quantization
    quantizes_activations: ClassVar[bool] = False
    """Whether `activations` has a say: in modules that are a matrix product."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why `module` cannot be replaced by this class; None when it can."""
        source = type(module)
        expected = cls.source_class()
        if "forward" in vars(module) or source.forward is not expected.forward:
            return f"its forward is not that of {expected.__name__}"
        for name in cls.weight_axes:
            weight = module._parameters.get(name)
            if weight is None:
                return f"its {name} is computed, not a parameter"
            if isinstance(weight, nn.UninitializedParameter):
                return f"its {name} is not initialized; run the model once"
            if not weight.is_floating_point():
                return f"its {name} is {str(weight.dtype).removeprefix('torch.')} already"
            if weight.numel() == 0:
                return f"its {name} has no elements"
        taken = sorted(cls._names_needed().intersection(_names_of(module)))
        return f"it has a {taken[0]!r} of its own" if taken else None

    @classmethod
    def _names_needed(cls) -> set[str]:
        """The attributes that a quantized module has and no other `nn.Module`."""
        bases = [
            base
            for base in cls.__mro__
            if issubclass(base, QuantizedModule) and not issubclass(base, cls.source_class())
        ]
        names = {"quantization", *(name for base in bases for name in vars(base))}
        names |= {companion for weight in cls.weight_axes for companion in cls.companions(weight)}
        return {name for name in names if not hasattr(nn.Module, name)} - {"reset_parameters"}

    @classmethod
    def source_class(cls) -> type[nn.Module]:
        """The float class that this one stands for."""
        bases = (base for base in cls.__mro__[1:] if issubclass(base, nn.Module))
        return next(base for base in bases if not issubclass(base, QuantizedModule))

    @classmethod
    def empty_like(
        cls,
        module: nn.Module,
        weights: str,
        symmetric: bool,
        name: str | None = None,
        *,
        activations: str | None = None,
    ) -> Self:
        """A twin of `module` with room for the quantized weights on the same device (also `meta`), not yet filled.

        Everything else of the module (bias, hooks, arguments, training mode) is kept as it is.
        """
        if weights not in STORAGE_DTYPES:
            raise ValueError(
                f"weights must be one of {', '.join(map(repr, STORAGE_DTYPES))}, not {weights!r}."
            )
        reason = cls.refuses(module)
        if reason is not None:
            raise ValueError(f"{name or type(module).__name__} cannot become a {cls.__name__}: {reason}.")
        twin = _twin(module, cls)
        twin._set_up_storage(
            Quantization(
                weights,
                symmetric or weights != "int8",
                activations if cls.quantizes_activations and weights == "int8" else None,
                type(module),
                name,
            )
        )
        return twin

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weights: str,
        symmetric: bool,
        name: str | None = None,
        *,
        activations: str | None = None,
    ) -> Self:
        """A quantized twin of `module`.

        Raises:
            ValueError: a weight cannot be quantized; the message names it.
        """
        twin = cls.empty_like(module, weights, symmetric, name, activations=activations)
        for weight_name in cls.weight_axes:
            weight = module.get_parameter(weight_name)
            for key, tensor in twin.quantized_tensors(weight_name, weight).items():
                twin._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        return twin

    def _set_up_storage(self, quantization: Quantization) -> None:
        self.quantization = quantization
        # transformers would otherwise draw random numbers into int8 codes that it has not yet put on the module.
        self._is_hf_initialized = True
        for weight_name, axis in self.weight_axes.items():
            weight = self._parameters[weight_name]
            assert weight is not None
            axes = {a % weight.dim() for a in ((axis,) if isinstance(axis, int) else axis)}
            channels = [size if dim in axes else 1 for dim, size in enumerate(weight.shape)]
            storage = torch.empty_like(
                weight, dtype=STORAGE_DTYPES[quantization.weights], requires_grad=False
            )
            scale = zero_point = None
            if quantization.weights == "int8":
                scale = torch.empty(channels, dtype=torch.float32, device=weight.device)
                if not quantization.symmetric:
                    zero_point = torch.empty(channels, dtype=torch.int8, device=weight.device)
            for key, tensor in (("", storage), ("_scale", scale), ("_zero_point", zero_point)):
                parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(weight_name + key, parameter)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None and not param.is_meta and name in self.storage_names():
            keep_from_initialization(param)

    def quantized_tensors(self, weight_name: str, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for a float weight of this module, by parameter name.

        Raises:
            ValueError: the weight has another shape than the module, NaN or infinite values, or (float16) values
                past 65504; the message names the parameter.
        """
        full_name = ".".join(filter(None, (self.quantization.module_name, weight_name)))
        expected = self.get_parameter(weight_name).shape
        if weight.shape != expected:
            raise ValueError(
                f"{full_name} has shape {tuple(weight.shape)} where the model has {tuple(expected)}."
            )
        try:
            if self.quantization.weights == "float16":
                return {weight_name: quantize_weight_fp16(weight)}
            codes, scale, zero_point = self._quantize(weight_name, weight)
        except ValueError as problem:
            raise ValueError(f"{full_name} cannot be quantized. {problem}") from None
        tensors = {weight_name: codes, f"{weight_name}_scale": scale}
        if zero_point is not None:
            tensors[f"{weight_name}_zero_point"] = zero_point
        return tensors

    def _quantize(self, weight_name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return kernels.quantize(weight, self.quantization.symmetric, self.weight_axes[weight_name])

    def dequantized(self, weight_name: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight that the codes stand for, in `dtype`."""
        stored = self.get_parameter(weight_name).detach()
        if self.quantization.weights == "float16":
            return stored.to(dtype)
        zero_point = self._parameters[f"{weight_name}_zero_point"]
        scale = self.get_parameter(f"{weight_name}_scale").detach()
        return dequantize_codes(stored, scale, zero_point, dtype)

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A module of the original class with the dequantized weights in `dtype`."""
        twin = _twin(self, self.quantization.float_class)
        del twin.quantization
        for weight_name in self.weight_axes:
            for companion in self.companions(weight_name):
                del twin._parameters[companion]
            twin._parameters[weight_name] = nn.Parameter(self.dequantized(weight_name, dtype))
        for name, parameter in twin._parameters.items():
            if parameter is not None and name not in self.weight_axes:
                twin._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        return twin

    def without_weights(self) -> nn.Module:
        """A module of the original class that shares the buffers of this one and has empty float parameters."""
        twin = _twin(self, self.quantization.float_class)
        twin._parameters = {
            name: None if parameter is None else nn.Parameter(torch.empty(0), requires_grad=False)
            for name, parameter in twin._parameters.items()
        }
        return twin

    @classmethod
    def companions(cls, weight_name: str) -> list[str]:
        """Names of the parameters beside a weight that the float module does not have."""
        return [f"{weight_name}_scale", f"{weight_name}_zero_point"]

    # More paths to this module, that say what its codes are: PEFT's layers are saved with them, see `OnQuantized`.

    @property
    def symmetric_int8(self) -> Self:
        """The module itself."""
        return self

    @property
    def asymmetric_int8(self) -> Self:
        """The module itself."""
        return self

    def storage_names(self) -> list[str]:
        """Names of the parameters that hold codes, scales and zero-points (not the bias)."""
        names = [name + suffix for name in self.weight_axes for suffix in ("", "_scale", "_zero_point")]
        return [name for name in names if self._parameters.get(name) is not None]

    def storage_dtype(self, name: str) -> torch.dtype:
        """The dtype that one of `storage_names` must have."""
        if name in self.weight_axes:
            return STORAGE_DTYPES[self.quantization.weights]
        return torch.float32 if name.endswith("_scale") else torch.int8

    def check_input(self, x: Tensor) -> None:
        """Refuse an input that is not floating-point: with int8 codes it is most likely a cast gone wrong."""
        if not x.is_floating_point():
            name = self.quantization.module_name or type(self).__name__
            found = str(x.dtype).removeprefix("torch.")
            raise TypeError(
                f"{name} got an input of dtype {found}, but works on floating-point inputs. If the model casts its "
                f"input to the dtype of this module's weight, keep the module in float: "
                f"MonoQuantConfig(modules_to_not_convert=[{name!r}])."
            )

    def reset_parameters(self) -> None:
        """As the float class, before it is quantized; codes cannot be drawn at random."""
        if "quantization" in vars(self):
            name = self.quantization.module_name or type(self).__name__
            raise TypeError(
                f"{name} is quantized and cannot be initialized; initialize the float model, quantize it then."
            )
        super().reset_parameters()  # type: ignore[misc]  # of the float class

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        storage = {id(self._parameters[name]) for name in self.storage_names()}

        def keep_storage_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in storage and moved.dtype != tensor.dtype:
                return tensor.to(device=moved.device)
            return moved

        return super()._apply(keep_storage_dtype, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # copy_ would cast float weights into the codes without a word. load_state_dict raises these messages.
        mismatched = {
            name: state_dict[prefix + name].dtype
            for name in self.storage_names()
            if isinstance(state_dict.get(prefix + name), Tensor)
            and state_dict[prefix + name].dtype != self.get_parameter(name).dtype
        }
        error_msgs += [
            f"{prefix}{name} is {dtype} in the state dict where the quantized module holds "
            f"{self.get_parameter(name).dtype}; load float weights into a float model and quantize it then."
            for name, dtype in mismatched.items()
        ]
        if not mismatched:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def extra_repr(self) -> str:
        how = self.quantization.weights
        if how == "int8":
            how += ", symmetric" if self.quantization.symmetric else ", asymmetric"
        if self.quantization.activations is not None:
            how += f", activations={self.quantization.activations}"
        return f"{super().extra_repr()}, weights={how}"


def _names_of(module: nn.Module) -> set[str]:
    """The names by which a module and its classes, other than torch's, have attributes."""
    own = [vars(module), module._parameters, module._buffers, module._modules]
    classes = [vars(cls) for cls in type(module).__mro__ if cls.__module__.partition(".")[0] != "torch"]
    return {name for names in (*own, *classes) for name in names}


def _twin(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A shallow copy of `module` as an instance of `cls`: shared tensors, containers of its own."""
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if name in _CONTAINERS or name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            twin.__dict__[name] = value.copy()
    return twin
