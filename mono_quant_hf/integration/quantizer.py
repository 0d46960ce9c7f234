"""The quantizer that transformers calls from `from_pretrained`, `save_pretrained` and `dequantize`."""

from __future__ import annotations

import copy
import gc
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightTransform,
    dot_natural_key,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from mono_quant_hf.config import QUANT_METHOD, MonoQuantConfig
from mono_quant_hf.modules import QuantizedExperts, QuantizedModule
from mono_quant_hf.modules.base import keep_from_initialization

from .checkpoint import FLOAT_IN_CHECKPOINT, check_stored_tensors, decide_by_checkpoint, read_headers
from .conversions import PassThrough, QuantizeWeights, checkpoint_of, look_up_conversions
from .fingerprints import are_named, check_fingerprints, checksums_of
from .placement import keep_tied_together
from .read_ahead import ReadAhead
from .replacement import giving, quantizing, replace_modules
from .resizing import make_resizable, undo_resizable
from .saving import config_as_saved, config_of_modules
from .selection import Decision, aliases_of, decide, decide_recorded, log_summary
from .tags import add_tags, remove_tags
from .tying import (
    declare_tied_companions,
    share_offloaded,
    share_storage,
    tied_modules,
    withdraw_tied_companions,
)

logger = logging.getLogger("mono_quant_hf")

register_quantization_config(QUANT_METHOD)(MonoQuantConfig)


@register_quantizer(QUANT_METHOD)
class MonoQuantHfQuantizer(HfQuantizer):
    """Loads float checkpoints as quantized models, tensor by tensor, and quantized checkpoints as they are.

    Attributes:
        decisions: what became of every module that holds weights, after loading.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     BertModel(config).save_pretrained(folder)
        ...     model = BertModel.from_pretrained(folder, quantization_config=MonoQuantConfig())
        >>> type(model.hf_quantizer).__name__
        'MonoQuantHfQuantizer'
        >>> {decision.weights for decision in model.hf_quantizer.decisions if decision.kind == "Linear"}
        {'int8'}
    """

    requires_calibration = False
    quantization_config: MonoQuantConfig
    serialized_names = {"weight": ["weight", "weight_scale", "weight_zero_point"]}  # noqa: RUF012  transformers' name

    def __init__(self, quantization_config: MonoQuantConfig, **kwargs: Any):
        # A copy without checksums: those are of one save, and this config may serve other models and saves.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.checksums = self.quantization_config.checksums
        self.quantization_config.checksums = None
        self.decisions: list[Decision] = []
        self.planned: list[Decision] = []
        self.other_rows: set[str] = set()
        self.problems: list[str] = []
        self.quantized_modules: set[str] = set()
        self.has_experts = False
        self.is_float = False
        self.is_complete = False
        self.may_offload = True
        self.read_ahead: ReadAhead | None = None
        self._keep_in_fp32_strict: Any = None

    # Before the weights are loaded

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        # A copy, since keep_tied_together may change it and it is the caller's.
        return dict(device_map) if isinstance(device_map, dict) else device_map

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "A mono_quant model cannot be split by tensor parallelism (tp_plan, distributed_config); load it "
                "with a device_map, or export it to compressed-tensors for an engine that splits it."
            )
        if isinstance(device_map, dict):
            keep_tied_together(model, device_map)
        # A map that is still to be made, such as "auto", may come to it.
        self.may_offload = isinstance(device_map, str) or "disk" in (device_map or {}).values()
        if self.pre_quantized:
            self._prepare_for_codes(model, dtype, checkpoint_files or ())
        else:
            self.decisions = self.planned = decide(model, self.quantization_config, dtype)
            make_room(model, self.decisions)
        for module in model.modules() if self.may_offload else ():
            if isinstance(module, QuantizedModule):
                for key in module.storage_names():  # those for the disk stay what they are now
                    keep_from_initialization(module.get_parameter(key))
        self._keep_in_fp32_strict = model._keep_in_fp32_modules_strict
        if not self.pre_quantized:
            # The loader casts a weight to the model's dtype before it is quantized, unless the model keeps it in
            # float32: codes shall be those of the checkpoint's own weight, whatever dtype= says.
            model._keep_in_fp32_modules_strict = {
                *(self._keep_in_fp32_strict or ()),
                *_weight_patterns(model),
            }
            self.read_ahead = ReadAhead(checkpoint_files or [], dot_natural_key)  # the loader's own order
            self.read_ahead.start()

    def _prepare_for_codes(
        self, model: PreTrainedModel, dtype: torch.dtype | None, files: Sequence[str]
    ) -> None:
        """Make room for what a checkpoint holds, once it is known to be what was saved."""
        config = self.quantization_config
        checkpoint = checkpoint_of(model, read_headers(files))
        self.planned = decide_recorded(model, config, dtype)
        self.decisions = decide_by_checkpoint(model, self.planned, config, checkpoint)
        promised = any(decision.quantized for decision in self.planned)
        holds_codes = any(decision.quantized for decision in self.decisions)
        # A float16 checkpoint whose config was changed to say int8 has the names that it was saved with.
        edited = config.weights == "int8" and are_named(self.checksums, checkpoint.stored)
        if files and promised and not holds_codes and not edited:
            # The config of a quantized model, put beside the files of a float one.
            logger.warning(
                "%s holds float weights only, though its config.json says %s: it is loaded as a float model. Save it "
                "again to correct its config, or quantize it (quantize_model).",
                Path(files[0]).parent,
                config.weights,
            )
            self.is_float = True
            return
        make_room(model, self.decisions)
        if not files:
            return
        complete = type(model).__name__ in (model.config.architectures or [type(model).__name__])
        for decision, plan in zip(self.decisions, self.planned, strict=True) if complete else ():
            if plan.weights == "float16" and decision.reason == FLOAT_IN_CHECKPOINT:
                raise ValueError(
                    f"{plan.module} is stored in another dtype than float16, which the config says; "
                    "save the quantized model again."
                )
        check_stored_tensors(model, checkpoint, complete=complete, exact=complete and self.checksums is None)
        if self.checksums is not None:
            aliases = aliases_of(model)
            names = [alias for name in model.state_dict() for alias in aliases(name)]
            recorded = copy.deepcopy(config)
            recorded.checksums = self.checksums
            check_fingerprints(files, recorded, names)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return False
        module_name, _, name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        needs = isinstance(module, QuantizedModule) and name in module.weight_axes
        return needs and param_name not in self.other_rows

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # A float tensor where codes belong is an error (see _check_loaded), not something to cast to int8.
        if dtype is not None and not dtype.is_floating_point:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeWeights(self)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        updated = super().update_weight_conversions(weight_conversions, model)
        if not self.pre_quantized and self.may_offload:
            tails = sorted({".".join(name.split(".")[-2:]) for name in _quantized_weight_names(model)})
            updated += [WeightConverter(re.escape(tail), tail, [PassThrough()]) for tail in tails]
        return updated

    # After the weights are loaded

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.read_ahead is not None:
            self.read_ahead.stop()
            self.read_ahead = None  # a model with a thread could not be copied
        model._keep_in_fp32_modules_strict = self._keep_in_fp32_strict
        if self.is_float:
            self._forget(model)
            return model
        if self.problems:
            raise ValueError(" ".join(self.problems))
        self.restore_conversions(model)
        self._check_loaded(model)
        _freeze(model)
        if not self.pre_quantized:
            share_offloaded(model)
        self._initialize_buffers(model)
        make_resizable(model)
        self.is_complete = True
        add_tags(model, self.quantization_config)
        self.has_experts = any(isinstance(module, QuantizedExperts) for module in model.modules())
        attach_to_parts(model)
        log_summary(model, self.decisions)
        return model

    def _forget(self, model: PreTrainedModel) -> None:
        """Make a model that holds nothing quantized one that transformers knows to be float."""
        self.remove_quantization_config(model)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                vars(part.config).pop("_is_quantized", None)

    def complete(self, model: PreTrainedModel) -> None:
        """What a model that holds quantized modules needs to be saved, tied and resized as one, once it is made."""
        if self.is_complete:
            return
        self.is_complete = True
        self.has_experts = any(isinstance(module, QuantizedExperts) for module in model.modules())
        look_up_conversions(model)
        self.restore_conversions(model)
        declare_tied_companions(model)
        make_resizable(model)

    def restore_conversions(self, model: PreTrainedModel) -> None:
        """Keep for saving what a quantized checkpoint needs: the model's own conversions, for scales too."""
        used = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not any(isinstance(op, PassThrough) for op in getattr(conversion, "operations", ()))
        ]
        if not self.pre_quantized:
            used = HfQuantizer.update_weight_conversions(self, used, model)
        model._weight_conversions = used  # type: ignore[assignment]

    def _check_loaded(self, model: PreTrainedModel) -> None:
        """Every quantized module got all of its tensors; a module that got none becomes a float one, initialized."""
        not_loaded = {}
        # One of those that share a weight is loaded, and transformers ties the others to it.
        loaded = {id(p) for name in self.quantized_modules for p in model.get_submodule(name).parameters()}
        for name, module in model.named_modules():
            if not isinstance(module, QuantizedModule):
                continue
            tensors = {key: module.get_parameter(key) for key in module.storage_names()}
            if any(tensor.device.type == "meta" for tensor in tensors.values()):
                continue  # offloaded; the headers were checked before loading
            if not self.pre_quantized:
                missing = [key for key, tensor in tensors.items() if id(tensor) not in loaded]
            else:
                missing = [
                    key for key, t in tensors.items() if getattr(t, "_is_hf_initialized", 0) is not True
                ]
            if missing and len(missing) < len(tensors):
                raise ValueError(
                    f"{name}.{missing[0]} is missing from the checkpoint; save the quantized model again."
                )
            if missing:
                not_loaded[name] = module
                continue
            for key, tensor in tensors.items():
                expected = module.storage_dtype(key)
                if tensor.dtype != expected:
                    raise ValueError(
                        f"{name}.{key} in the checkpoint is {tensor.dtype} where the config says {expected}; "
                        "save the quantized model again, or load the float model and quantize it."
                    )
        if not_loaded:
            self._initialize_as_float(model, not_loaded)

    def _initialize_buffers(self, model: PreTrainedModel) -> None:
        """Give the buffers that no checkpoint holds, such as the scale of Gemma's embeddings, their values.

        transformers leaves them out, as quantized modules are marked as initialized. Here the model initializes a
        float view of the module whose parameters say that they are.
        """
        for name, module in model.named_modules():
            if not isinstance(module, QuantizedModule) or not module._non_persistent_buffers_set:
                continue
            view = module.without_weights()
            for parameter in view.parameters(recurse=False):
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            with torch.no_grad():
                _owner(model, name)._init_weights(view)

    def _initialize_as_float(self, model: PreTrainedModel, modules: dict[str, QuantizedModule]) -> None:
        """New modules, such as the head of a model that is to be trained, start as the model initializes them."""
        for name, module in modules.items():
            fresh = module.to_float(_dtype_of(model))
            replace_modules(model, {name: giving(fresh)})
            with torch.no_grad():
                _owner(model, name)._init_weights(fresh)
        if any(set(group).intersection(modules) for group in tied_modules(model)):
            withdraw_tied_companions(model)
            declare_tied_companions(model)
        self.decisions = [
            d.left_in_float("not in the checkpoint, newly initialized") if d.module in modules else d
            for d in self.decisions
        ]

    # The rest of the contract

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # the adapter is saved, not the model
        before = getattr(model.config, "quantization_config", None)
        config = config_as_saved(model, self.quantization_config, self.planned)
        if config is not None:
            self.complete(model)
            config.checksums = checksums_of(model, config)
            model.config.quantization_config = config
        elif before is not None:
            del model.config.quantization_config

        def after_writing(*_: Any) -> None:
            hook.remove()
            if config is not None:
                config.checksums = None  # which are of this save alone, and other models may share the config
            elif before is not None:
                model.config.quantization_config = before

        # transformers writes the config next, and then asks for the state dict.
        hook = model.register_state_dict_pre_hook(after_writing)
        return None, {}

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; the codes themselves have no gradient."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether `Trainer` takes the model without adapters, which it must to evaluate it.

        Training then moves what is in float (norms, biases, embeddings, a new head); codes and scales stay.
        """
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model as a whole; experts run one after the other, as tokens come."""
        return not self.has_experts

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        float_dtype = _dtype_of(model, dtype)

        def to_float(module: nn.Module) -> nn.Module:
            assert isinstance(module, QuantizedModule)
            return module.to_float(float_dtype)

        quantized = [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]
        replace_modules(model, dict.fromkeys(quantized, to_float))
        withdraw_tied_companions(model)
        undo_resizable(model)
        remove_tags(model, self.quantization_config)
        for part in model.modules():
            if part is not model and isinstance(getattr(part, "hf_quantizer", None), MonoQuantHfQuantizer):
                self.remove_quantization_config(part)
        return model


def attach(model: PreTrainedModel, config: MonoQuantConfig, planned: Sequence[Decision] = ()) -> None:
    """Make a model that holds quantized modules one that transformers knows to be quantized, and saves as such.

    Args:
        model: as it is now; perhaps its class is still making it.
        config, planned: what it was quantized by, and what was decided; without the latter, it is saved as it is found.
    """
    quantizer = MonoQuantHfQuantizer(config, pre_quantized=False)
    quantizer.decisions = quantizer.planned = list(planned)
    # setattr, as transformers does: these are no declared attributes of the model.
    for name, value in (
        ("hf_quantizer", quantizer),
        ("is_quantized", True),
        ("quantization_method", config.quant_method),
    ):
        setattr(model, name, value)
    model.config.quantization_config = quantizer.quantization_config
    add_tags(model, config)
    if hasattr(model, "all_tied_weights_keys"):
        quantizer.complete(model)


def attach_to_parts(model: nn.Module) -> None:
    """`attach` to the transformers models inside a model that hold something quantized: they may be saved alone."""
    for part in model.modules():
        if part is not model and isinstance(part, PreTrainedModel) and _holds_quantized(part):
            _attach_once(part, part)


def attach_to_owners(part: nn.Module) -> None:
    """`attach` to the transformers models that a quantized module is a part of; warn where it may be of one unknown."""
    owners = _models_around(part)
    for model in owners:
        _attach_once(model, model)
    alone = isinstance(part, PreTrainedModel) or not any(map(_is_of_transformers, part.modules()))
    if not owners and not alone:
        logger.warning(
            "%s is quantized, but the transformers model that it is a part of was not found: its save_pretrained would "
            "not record this, and the checkpoint could not be loaded. Quantize the whole model instead, with "
            "modules_to_not_convert.",
            type(part).__name__,
        )


def _adopt(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Hook of torch on every registration of a submodule: a model that is given a quantized part is a quantized one.

    Such as a composite of a language model and an int8 vision tower, a class of one's own around an int8 model, or a
    model one of whose layers is replaced by a quantized one.
    """
    if isinstance(parent, PreTrainedModel):
        if module is not None and _holds_quantized(module):
            _attach_once(parent, module)
        elif "hf_quantizer" not in vars(parent) and _is_ours(getattr(parent, "config", None)):
            # Made with the config of a quantized model. Where the weights stay float, that is what is to be saved.
            setattr(parent, "hf_quantizer", MonoQuantHfQuantizer(MonoQuantConfig(), pre_quantized=False))  # noqa: B010
    elif isinstance(module, QuantizedModule) and _is_of_transformers(parent):
        for model in _models_around(parent):
            _attach_once(model, module)


register_module_module_registration_hook(_adopt)


def _refuse_to_average(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Hook of torch, as `_adopt`: an average of codes, cut to integers, is not that of the weights."""
    if isinstance(parent, AveragedModel) and module is not None and _holds_quantized(module):
        raise ValueError(
            "AveragedModel would average int8 codes and their scales apart, which is no average of weights; average "
            "the float model and quantize the result, or average only what is trained, such as an adapter."
        )


register_module_module_registration_hook(_refuse_to_average)

_KNOWN: WeakSet[PreTrainedModel] = WeakSet()


def _models_around(part: nn.Module) -> list[PreTrainedModel]:
    """The transformers models that hold a module: it does not know them, but Python's garbage collector knows all."""
    for look_at in (lambda: [*_KNOWN], gc.get_objects):
        models = [found for found in look_at() if issubclass(type(found), PreTrainedModel)]
        models = [m for m in models if m is not part and any(module is part for module in m.modules())]
        _KNOWN.update(models)
        if models:
            return models
    return []


def _attach_once(model: PreTrainedModel, quantized: nn.Module) -> None:
    if not getattr(model, "is_quantized", False):
        attach(model, config_of_modules(quantized))


def _is_ours(config: Any) -> bool:
    settings = getattr(config, "quantization_config", None)
    return isinstance(settings, dict | MonoQuantConfig) and settings.get("quant_method") == QUANT_METHOD


def _holds_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedModule) for module in model.modules())


def _is_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in ("transformers", "transformers_modules")


def make_room(model: PreTrainedModel, decisions: list[Decision]) -> None:
    """Put quantized modules without values in the place of those that are to be quantized; what is tied stays tied."""
    groups = tied_modules(model)
    replace_modules(model, {d.module: quantizing(d, empty=True) for d in decisions if d.quantized})
    share_storage(model, groups)
    declare_tied_companions(model)


def _quantized_weight_names(model: nn.Module) -> list[str]:
    return [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for weight in module.weight_axes
    ]


def _weight_patterns(model: nn.Module) -> set[str]:
    """Regular expressions that match the names of the quantized weights and no other parameter.

    Layer numbers are left open where all layers agree, so that a model of many layers needs few patterns.
    """
    quantized = set(_quantized_weight_names(model))
    open_number = re.compile(r"(?<=\.)\d+(?=\.)")
    by_pattern: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        by_pattern.setdefault(open_number.sub("#", name), []).append(name)
    patterns = set()
    for shape, names in by_pattern.items():
        if quantized.issuperset(names):
            patterns.add("^" + re.escape(shape).replace(r"\#", r"\d+") + "$")
        else:
            patterns |= {f"^{re.escape(name)}$" for name in names if name in quantized}
    return patterns


def _dtype_of(model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> torch.dtype:
    """The dtype asked for, or that of the model's config, which may be written as a string."""
    dtype = dtype or model.config.dtype or torch.get_default_dtype()
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost (sub)model that a module belongs to, which knows how to initialize it."""
    owner = model
    parts = name.split(".")
    for end in range(1, len(parts)):
        part = model.get_submodule(".".join(parts[:end]))
        if isinstance(part, PreTrainedModel):
            owner = part
    return owner


def _freeze(model: PreTrainedModel) -> None:
    """Train scales and float16 weights no more than codes; transformers lets every float that it loads be trained."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for name in module.storage_names():
                module.get_parameter(name).requires_grad_(False)
