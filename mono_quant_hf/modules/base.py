"""What every quantized module has in common: its storage, the float weight that it shows, the way to and from float.

A module is quantized by a change of its class, as torch's own parametrizations are: whoever holds the module, in a list
or in a closure, holds the quantized one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mono_quant_hf import kernels
from mono_quant_hf.core import quantize_weight_fp16

from .float_view import FloatView, float_weight

STORAGE_DTYPES = {"int8": torch.int8, "float16": torch.float16}
"""What `weights` may be, and the dtype that the weight is stored in."""

DTYPE_NAME = "weight_dtype"
"""A parameter of one element that says the dtype of a model whose first floating parameter would be a scale."""

Axes = int | tuple[int, ...]
_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def weights_of_dtype(dtype: torch.dtype) -> str:
    """The `weights` setting that a `dtype` argument stands for: `torch.qint8` or `torch.float16`."""
    if dtype is torch.qint8:
        return "int8"
    if dtype is torch.float16:
        return "float16"
    raise ValueError(f"Expected dtype torch.qint8 or torch.float16, got {dtype}.")


def stored_names(weight_name: str, weights: str, symmetric: bool) -> list[str]:
    """Names of the parameters that stand for a float weight.

    Example:
        >>> stored_names("weight", "int8", symmetric=False)
        ['weight_int8', 'weight_scale', 'weight_zero_point']
        >>> stored_names("weight", "float16", symmetric=True)
        ['weight_float16']
    """
    suffixes = (
        [weights] if weights == "float16" else ["int8", "scale", *([] if symmetric else ["zero_point"])]
    )
    return [f"{weight_name}_{suffix}" for suffix in suffixes]


@dataclass(frozen=True)
class Quantization:
    """How a module is quantized: its attribute `quantization`, the one name beside those of its tensors.

    Attributes:
        weights: `"int8"` or `"float16"`.
        symmetric: whether int8 codes go without zero-points; True for float16.
        activations: `"int8"`: the products round their input to int8 where that pays (`mono_quant_hf.kernels.linear`).
        float_class: the class that the module had before.
        dtype: of the float weight that it shows; follows `.to(dtype)`.
        module_name: qualified name in the model it was quantized in, for error messages.
    """

    weights: str
    symmetric: bool
    activations: str | None
    float_class: type[nn.Module]
    dtype: torch.dtype
    module_name: str | None = None


class QuantizedModule(nn.Module):
    """Mixin of the modules that hold int8 codes or float16 weights in place of float ones.

    A subclass also inherits from the class that the module had, so that whoever asks `isinstance(module, nn.Linear)` is
    answered yes, and its forward is what runs. Each weight `w` is stored as the parameters `w_int8`, `w_scale`
    (float32) and, when asymmetric, `w_zero_point` (int8), or as `w_float16`; all without gradient. They keep their
    dtype under `.to(dtype)`, `.half()` and the like. `w` itself shows the float weight, see `FloatView`.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import QuantizedLinear
        >>> layer = QuantizedLinear.from_float(torch.nn.Linear(8, 2), "int8", symmetric=False)
        >>> isinstance(layer, QuantizedModule), isinstance(layer, torch.nn.Linear), layer.half().weight.dtype
        (True, True, torch.float16)
        >>> {name: tensor.dtype for name, tensor in layer.state_dict().items() if name != "bias"}
        {'weight_int8': torch.int8, 'weight_scale': torch.float32, 'weight_zero_point': torch.int8}
    """

    weight_axes: ClassVar[dict[str, Axes]] = {}
    """Name of each weight to quantize, and the axis (or axes) along which it has a scale each."""
    quantizes_activations: ClassVar[bool] = False
    """Whether `activations` has a say: in modules that are a matrix product."""

    quantization: Quantization

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls).get("weight_axes", ()):
            setattr(cls, name, property(functools.partial(_shown, name=name)))

    # From float

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why `module` cannot be quantized as this class; None when it can."""
        if isinstance(module, torch.jit.ScriptModule):
            return "it is a compiled TorchScript module"
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
        names = {DTYPE_NAME, "quantization", *vars(QuantizedModule)}
        for weight in cls.weight_axes:
            names |= {*stored_names(weight, "int8", symmetric=False), *stored_names(weight, "float16", True)}
        return {name for name in names if not hasattr(nn.Module, name)} - {"reset_parameters"}

    @classmethod
    def make_room(
        cls,
        module: nn.Module,
        weights: str,
        symmetric: bool,
        name: str | None = None,
        *,
        activations: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Make `module` itself one of this class, with room for its quantized weights, not yet filled.

        The room is on the device of the float weights (also `meta`), which are given up; everything else of the module
        (bias, hooks, arguments, training mode) stays as it is.

        Args:
            weights, symmetric, name, activations: see `Quantization`.
            dtype: of the float weight to show; None for that of the weight.
        """
        if weights not in STORAGE_DTYPES:
            raise ValueError(f"Expected weights 'int8' or 'float16', got {weights!r}.")
        reason = cls.refuses(module)
        if reason is not None:
            raise ValueError(f"{name or type(module).__name__} cannot become a {cls.__name__}: {reason}.")
        shown = module._parameters[next(iter(cls.weight_axes))]
        assert shown is not None
        quantization = Quantization(
            weights,
            symmetric or weights != "int8",
            activations if cls.quantizes_activations and weights == "int8" else None,
            type(module),
            dtype or shown.dtype,
            name,
        )
        # Scales come last: the dtype of a model is read from its first floating parameter.
        parameters = {key: p for key, p in module._parameters.items() if key not in cls.weight_axes}
        for key, axis in cls.weight_axes.items():
            weight = module._parameters[key]
            assert weight is not None
            parameters |= _room(key, weight, axis, quantization)
        module._parameters = parameters
        module.__class__ = cls
        assert isinstance(module, cls)
        module.quantization = quantization
        return module

    @classmethod
    def quantize(
        cls,
        module: nn.Module,
        weights: str,
        symmetric: bool,
        name: str | None = None,
        *,
        activations: str | None = None,
    ) -> Self:
        """Make `module` itself one of this class, with the codes of its weights.

        Raises:
            ValueError: a weight cannot be quantized; the message names it, and the module is as it was.
        """
        quantized = cls.from_float(module, weights, symmetric, name, activations=activations)
        return quantized.lend_to(module)

    @classmethod
    def empty_like(cls, module: nn.Module, *args: Any, **kwargs: Any) -> Self:
        """`make_room` in a twin of the module, which is left as it is; all but the weights is shared."""
        return cls.make_room(twin_of(module), *args, **kwargs)

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
        """`quantize` a twin of the module, which is left as it is; all but the weights is shared."""
        twin = cls.empty_like(module, weights, symmetric, name, activations=activations)
        for weight_name in cls.weight_axes:
            twin.put(twin.quantized_tensors(weight_name, module.get_parameter(weight_name)))
        return twin

    def lend_to(self, module: nn.Module) -> Self:
        """Make a float module what this twin of it is; the tensors are shared from then on."""
        module._parameters = self._parameters
        module.__class__ = type(self)
        assert isinstance(module, type(self))
        module.quantization = self.quantization
        module.note_versions()
        return module

    def say_dtype(self) -> None:
        """Put a parameter of one element first, from which the dtype of a model is read, see `DTYPE_NAME`."""
        like = torch.ones(
            1, dtype=self.quantization.dtype, device=self.stored(next(iter(self.weight_axes)))[0].device
        )
        self._parameters = {DTYPE_NAME: nn.Parameter(like, requires_grad=False), **self._parameters}

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Store what `quantized_tensors` gave, by parameter name."""
        for key, tensor in tensors.items():
            self._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        self.__dict__.pop("_versions", None)

    def quantized_tensors(self, weight_name: str, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for a float weight of this module, by parameter name.

        Raises:
            ValueError: the weight has another shape than the module, NaN or infinite values, or (float16) values
                past 65504; the message names the parameter.
        """
        full_name = ".".join(filter(None, (self.quantization.module_name, weight_name)))
        expected = self.stored(weight_name)[0].shape
        if weight.shape != expected:
            raise ValueError(
                f"{full_name} has shape {tuple(weight.shape)} where the model has {tuple(expected)}."
            )
        weights, symmetric = self.quantization.weights, self.quantization.symmetric
        try:
            if weights == "float16":
                tensors: Any = (quantize_weight_fp16(weight),)
            else:
                tensors = _quantize(weight, symmetric, self.weight_axes[weight_name])
        except ValueError as problem:
            raise ValueError(f"{full_name} cannot be quantized. {problem}") from None
        return dict(zip(stored_names(weight_name, weights, symmetric), tensors, strict=False))

    # To float

    def stored(
        self, weight_name: str = "weight"
    ) -> tuple[nn.Parameter, nn.Parameter | None, nn.Parameter | None]:
        """Codes (or the float16 weight), scale and zero-point that stand for a weight."""
        # As attributes, which they are for nn.DataParallel and the like, who take the parameters out.
        if self.quantization.weights == "float16":
            weight = getattr(self, f"{weight_name}_float16")
            if weight.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"Expected {weight_name}_float16 of {self.quantization.module_name or type(self).__name__} "
                    "without a gradient, as it is a constant, got requires_grad=True; train adapters, or dequantize() "
                    "the model."
                )
            return weight, None, None
        codes, scale = getattr(self, f"{weight_name}_int8"), getattr(self, f"{weight_name}_scale")
        if not torch.compiler.is_compiling():
            self._check_unwritten(weight_name, codes)
        return (
            codes,
            scale,
            None if self.quantization.symmetric else getattr(self, f"{weight_name}_zero_point"),
        )

    def _check_unwritten(self, weight_name: str, codes: Tensor) -> None:
        """Refuse codes that were changed in place since they were put here, as by a loop that averages parameters.

        torch counts such changes of a tensor, but not those through its `.data`. Between processes they are no fault:
        a parameter is broadcast in place.
        """
        if type(codes) is not nn.Parameter or codes.is_inference():
            return
        versions = self.__dict__.setdefault("_versions", {})
        seen, version = versions.get(weight_name, (None, 0))
        # By weak reference: a tensor that takes the place of another may get its id too.
        if seen is None or seen() is not codes:
            versions[weight_name] = weakref.ref(codes), codes._version
        elif codes._version != version and not (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ):
            raise RuntimeError(
                f"Expected the int8 codes of {self.quantization.module_name or type(self).__name__} as they were "
                "quantized or loaded, got codes that were changed in place since; average or change the float model "
                "and quantize the result, or use load_state_dict."
            )

    def note_versions(self) -> None:
        """Take the codes as they are now for what was quantized or loaded, see `_check_unwritten`."""
        self.__dict__.pop("_versions", None)
        if self.quantization.weights == "int8":
            for name in self.weight_axes:
                self.stored(name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_versions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.note_versions()  # a copy may be changed before it is used

    def dequantized(self, weight_name: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight that the codes stand for, in `dtype`."""
        with torch.no_grad():
            stored, scale, zero_point = (None if t is None else t.detach() for t in self.stored(weight_name))
        assert stored is not None
        if hasattr(stored, "to_local"):
            raise RuntimeError(
                f"Expected {weight_name} of {self.quantization.module_name or type(self).__name__} in one piece, got "
                "one that is split over processes; load the model in one process to dequantize it."
            )
        return kernels.expand(stored, scale, zero_point, dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Make this module itself a float one again, of the class that it had, with the dequantized weights.

        Args:
            dtype: of the weights and of what else is floating; None for the dtype that the module shows.
        """
        dtype = dtype or self.quantization.dtype
        parameters: dict[str, nn.Parameter | None] = {
            name: nn.Parameter(self.dequantized(name, dtype)) for name in self.weight_axes
        }
        for key, parameter in self._parameters.items():
            if key != DTYPE_NAME and key not in self.storage_names():
                if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                    parameter = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                parameters[key] = parameter
        module: nn.Module = self
        module._parameters = parameters
        module.__class__ = self.quantization.float_class
        del module.quantization
        vars(module).pop("_versions", None)
        return module

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """`dequantize` a twin of the module, which is left as it is."""
        twin: QuantizedModule = twin_of(self)
        return twin.dequantize(dtype)

    # More paths to this module, that say what its codes are: PEFT's layers are saved with them, see `OnQuantized`.

    @property
    def symmetric_int8(self) -> Self:
        """The module itself."""
        return self

    @property
    def asymmetric_int8(self) -> Self:
        """The module itself."""
        return self

    # Storage and its protection

    def storage_names(self) -> list[str]:
        """Names of the parameters that hold codes, scales and zero-points (not the bias)."""
        return [key for name in self.weight_axes for key in self._storage_of(name)]

    def _storage_of(self, weight_name: str) -> list[str]:
        return stored_names(weight_name, self.quantization.weights, self.quantization.symmetric)

    def storage_dtype(self, name: str) -> torch.dtype:
        """The dtype that one of `storage_names` must have."""
        return _DTYPES[next(suffix for suffix in _DTYPES if name.endswith(suffix))]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.weight_axes:
            if isinstance(value, FloatView) and value.whole and value.stored.is_set_to(self.stored(name)[0]):
                return  # `module.weight *= 2`, which was done in place
            raise AttributeError(
                f"Expected {name} of {type(self).__name__} to stay as it is, as it only shows what is quantized; "
                "dequantize() the module to give it another weight."
            )
        super().__setattr__(name, value)

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

        device = self.stored(next(iter(self.weight_axes)))[0].device
        shown = fn(torch.empty(0, dtype=self.quantization.dtype, device=device)).dtype
        if shown != self.quantization.dtype and shown.is_floating_point:
            self.quantization = replace(self.quantization, dtype=shown)
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
        expected: dict[str, torch.dtype | None] = dict.fromkeys(self.weight_axes)
        expected |= {name: self.storage_dtype(name) for name in self.storage_names()}
        messages = [
            f"Expected {prefix}{name} to be {dtype or 'absent'} in the state dict of a quantized module, got "
            f"{state_dict[prefix + name].dtype}; load float weights into a float model and quantize it then."
            for name, dtype in expected.items()
            if isinstance(state_dict.get(prefix + name), Tensor) and state_dict[prefix + name].dtype != dtype
        ]
        error_msgs += messages
        if not messages:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            self.note_versions()

    def extra_repr(self) -> str:
        how = self.quantization.weights
        if how == "int8":
            how += ", symmetric" if self.quantization.symmetric else ", asymmetric"
        if self.quantization.activations is not None:
            how += f", activations={self.quantization.activations}"
        return ", ".join(filter(None, (super().extra_repr(), f"weights={how}")))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if type(self) not in _ORIGINS:
            return super().__reduce_ex__(protocol)  # type: ignore[return-value]
        # A class made at run time is not found by its name.
        return _new_instance, _ORIGINS[type(self)], self.__getstate__()


_DTYPES = {
    "_int8": torch.int8,
    "_float16": torch.float16,
    "_scale": torch.float32,
    "_zero_point": torch.int8,
}
_FORMS: dict[tuple[Any, ...], type[QuantizedModule]] = {}
_ORIGINS: dict[type[nn.Module], tuple[Any, ...]] = {}


def quantized_form(
    mixin: type[QuantizedModule], float_class: type[nn.Module], axes: tuple[tuple[str, Axes], ...]
) -> type[QuantizedModule]:
    """The quantized form of a class: a subclass of `mixin` and of the class, with the class's own forward.

    What is defined outside of torch comes before the mixin, so that a forward that ends in that of `nn.Linear` ends in
    that of `QuantizedLinear`; what torch itself defines comes behind it.

    Args:
        axes: `(name, axis or axes of the scales)` of each weight that is quantized.
    """
    if mixin.weight_axes == dict(axes) and issubclass(mixin, float_class):
        return mixin
    origin = (mixin, float_class, axes)
    if origin in _FORMS:
        return _FORMS[origin]
    of_torch = next(base for base in float_class.__mro__ if base.__module__.partition(".")[0] == "torch")
    bases: tuple[type, ...] = (float_class, mixin)
    if not issubclass(mixin, of_torch):
        behind = type(f"Quantized{of_torch.__name__}", (mixin, of_torch), {"__module__": mixin.__module__})
        bases = (float_class, behind) if float_class is not of_torch else (mixin, float_class)
    attributes: dict[str, Any] = {
        "weight_axes": dict(axes),
        "__module__": mixin.__module__,
        "__doc__": mixin.__doc__,
    }
    # Whoever makes another module of this one's class, as PEFT makes its convolutions, means a float one.
    attributes["__new__"] = lambda form, *args, **kwargs: float_class(*args, **kwargs)
    form = _FORMS[origin] = type(f"Quantized{float_class.__name__}", bases, attributes)
    _ORIGINS[form] = origin
    return form


def _new_instance(mixin: type[QuantizedModule], float_class: type[nn.Module], axes: Any) -> nn.Module:
    form: nn.Module = object.__new__(quantized_form(mixin, float_class, axes))
    return form


def check_input(module: QuantizedModule, x: Tensor) -> None:
    """Refuse an input that is not floating-point, with the name of the module."""
    if not x.is_floating_point():
        name = module.quantization.module_name or type(module).__name__
        found = str(x.dtype).removeprefix("torch.")
        raise TypeError(
            f"Expected a floating-point input of {name}, got {found}; convert it, to float32 for one."
        )


def _shown(module: QuantizedModule, name: str) -> Tensor:
    quantization = module.quantization
    stored, scale, zero_point = (_of_this_process(tensor) for tensor in module.stored(name))
    assert stored is not None
    return float_weight(stored, scale, zero_point, quantization.dtype, quantization.activations)


def _of_this_process(tensor: Tensor | None) -> Tensor | None:
    """Of a tensor that is split over processes the part of this one."""
    return getattr(tensor, "to_local", lambda: tensor)()


def _room(
    name: str, weight: Tensor, axis: Axes, quantization: Quantization
) -> dict[str, nn.Parameter | None]:
    axes = {a % weight.dim() for a in ((axis,) if isinstance(axis, int) else axis)}
    channels = [size if dim in axes else 1 for dim, size in enumerate(weight.shape)]
    room: dict[str, nn.Parameter | None] = {}
    for place, key in enumerate(stored_names(name, quantization.weights, quantization.symmetric)):
        dtype = _DTYPES[next(suffix for suffix in _DTYPES if key.endswith(suffix))]
        shape = channels if place else weight.shape
        place_for = nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device), requires_grad=False)
        # transformers draws random numbers into what says nothing of this, also where it is offloaded
        place_for._is_hf_initialized = "not loaded"  # type: ignore[attr-defined]
        room[key] = place_for
    return room


def _quantize(weight: Tensor, symmetric: bool, axis: Axes) -> tuple[Tensor, Tensor, Tensor | None]:
    if isinstance(axis, int) or weight.dim() != 3:
        return kernels.quantize(weight, symmetric, axis)
    # One expert at a time: rounding takes a float32 copy, and all experts of a layer are a large part of a model.
    _, out_axis = axis
    experts = [kernels.quantize(expert, symmetric, out_axis - 1) for expert in weight.unbind()]
    codes, scales, zero_points = zip(*experts, strict=True)
    return torch.stack(codes), torch.stack(scales), None if symmetric else torch.stack(zero_points)


def _names_of(module: nn.Module) -> set[str]:
    """The names by which a module and its classes, other than torch's, have attributes."""
    own = [vars(module), module._parameters, module._buffers, module._modules]
    classes = [vars(cls) for cls in type(module).__mro__ if cls.__module__.partition(".")[0] != "torch"]
    return {name for names in (*own, *classes) for name in names}


def twin_of(module: nn.Module) -> Any:
    """A shallow copy of a module: shared tensors, containers of its own."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("_versions", None)
    for name, value in module.__dict__.items():
        if name in _CONTAINERS or name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            twin.__dict__[name] = value.copy()
    return twin


class MatrixProduct(QuantizedModule):
    """Mixin of modules that multiply by their weights, and nothing else: int8 activations have a say in them."""

    quantizes_activations = True
