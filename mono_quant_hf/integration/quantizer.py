"""The quantizer that transformers calls from `from_pretrained`, `save_pretrained` and `dequantize`."""

from __future__ import annotations

import copy
import gc
import logging
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.modules import QuantizedModule, quantized_class_for
from mono_quant_hf.modules.base import DTYPE_NAME
from mono_quant_hf.names import QUANT_METHOD
from mono_quant_hf.weight_files import read_headers

from . import by_version
from .apply import change_modules, make_room, quantized_class_of
from .checkpoint import (
    NOT_THERE,
    check_stored_tensors,
    decide_by_checkpoint,
    modules_saying_dtype,
)
from .conversions import QuantizeWeights, StoredRenaming, checkpoint_of, keep_conversions
from .fingerprints import check_fingerprints, checksums_of
from .placement import keep_tied_together
from .read_ahead import ReadAhead
from .resizing import make_resizable, undo_resizable
from .saving import config_as_saved, config_of_modules
from .selection import (
    Decision,
    aliases_of,
    decide,
    decide_recorded,
    log_summary,
    modules_that_say_dtype,
)
from .tags import add_tags, remove_tags
from .tensor_parallel import check_can_be_split, check_in_one_piece, plan_storage
from .tying import declare_tied_storage, share_offloaded, share_storage, tied_modules, withdraw_tied_storage

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

    def __init__(self, quantization_config: MonoQuantConfig, **kwargs: Any):
        # A copy without checksums: those are of one save, and this config may serve other models and saves.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.checksums = self.quantization_config.checksums
        self.quantization_config.checksums = None
        self.decisions: list[Decision] = []
        self.planned: list[Decision] = []
        self.is_float = False
        self.is_complete = False
        self.problems: list[str] = []
        self.read_ahead: ReadAhead | None = None
        self._awaited: dict[str, Decision] = {}  # by the names of the float weights to come
        self._arrived: dict[
            str, dict[str, dict[str, Tensor]]
        ] = {}  # of modules that others are still awaited for
        self._names_on_disk: list[str] = []  # of a quantized checkpoint
        self._tied: list[list[str]] = []
        self._says_dtype: set[str] = set()
        self._shapes: dict[str, torch.Size] = {}
        self._kept_in_float32: re.Pattern[str] | None = None
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
        check_can_be_split(model.config, self.pre_quantized)
        if isinstance(device_map, dict):
            keep_tied_together(model, device_map)
        plan = model._get_dtype_plan(dtype) if dtype is not None else {}
        self._kept_in_float32 = build_glob_alternation(list(plan))[0] if plan else None
        if self.pre_quantized:
            self._prepare_for_codes(model, checkpoint_files or [])
        else:
            self.decisions = self.planned = decide(model, self.quantization_config)
            self._await_weights(model, checkpoint_files or [])
        self._shapes = by_version.shapes_to_come(model)

    def _prepare_for_codes(self, model: PreTrainedModel, files: Sequence[str]) -> None:
        """Make room for what a checkpoint holds, once it is known to be what was saved."""
        config = self.quantization_config
        checkpoint = checkpoint_of(model, read_headers(files))
        self._names_on_disk = list(checkpoint.stored)
        self.planned = decide_recorded(model, config)
        self.decisions = decide_by_checkpoint(model, self.planned, config, checkpoint)
        promised = any(decision.quantized for decision in self.planned)
        holds_codes = any(decision.quantized for decision in self.decisions)
        if files and promised and not holds_codes:
            # The config of a quantized model, put beside the files of a float one.
            logger.warning(
                "%s holds float weights only, though its config.json says %s: it is loaded as a float model. Save it "
                "again to correct its config, or quantize it (quantize_model).",
                Path(files[0]).parent,
                config.weights,
            )
            self.is_float = True
            return
        change_modules(
            model,
            self.decisions,
            lambda module, decision: make_room(module, decision, self._shown_dtype(decision.module)),
            modules_saying_dtype(checkpoint),
        )
        if not files:
            return
        complete = type(model).__name__ in (model.config.architectures or [type(model).__name__])
        check_stored_tensors(model, checkpoint, complete=complete, exact=complete and self.checksums is None)
        if self.checksums is not None:
            aliases = aliases_of(model)
            names = [alias for name in model.state_dict() for alias in aliases(name)]
            recorded = copy.deepcopy(config)
            recorded.checksums = self.checksums
            check_fingerprints(files, recorded, names)

    def _await_weights(self, model: PreTrainedModel, checkpoint_files: Sequence[str]) -> None:
        """Have the modules decided on quantized as their weights arrive; those without any stay float."""
        chosen = {decision.module: decision for decision in self.decisions if decision.quantized}
        self._tied = tied_modules(model)
        self._says_dtype = modules_that_say_dtype(model, chosen)
        by_module = {id(model.get_submodule(name)): decision for name, decision in chosen.items()}
        for name, module in model.named_modules(remove_duplicate=False):
            if id(module) in by_module:
                quantized_class = quantized_class_for(module)
                assert quantized_class is not None
                self._awaited |= {
                    f"{name}.{key}".lstrip("."): by_module[id(module)] for key in quantized_class.weight_axes
                }
        # The loader casts a weight to the model's dtype before it is quantized, unless the model keeps it in float32:
        # codes shall be those of the checkpoint's own weight, whatever dtype= says.
        self._keep_in_fp32_strict = model._keep_in_fp32_modules_strict
        model._keep_in_fp32_modules_strict = {
            *(self._keep_in_fp32_strict or ()),
            *_patterns_of(model, self._awaited),
        }
        self.read_ahead = ReadAhead(checkpoint_files, dot_natural_key)  # the loader's own order
        self.read_ahead.start()

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            plan_storage(model, plan)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._awaited

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of an element once it is quantized, scales and zero-points included, for `device_map="auto"`."""
        decision = self._awaited.get(param_name)
        if decision is None:
            return float(super().param_element_size(model, param_name, param))
        if decision.weights == "float16":
            return 2.0
        owner, _, name = param_name.rpartition(".")
        quantized_class = quantized_class_for(model.get_submodule(owner))
        assert quantized_class is not None
        axes = quantized_class.weight_axes[name]
        channels = math.prod(param.shape[axis] for axis in ((axes,) if isinstance(axes, int) else axes))
        return 1.0 + (4 if decision.symmetric else 5) * channels / param.numel()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # A float tensor where codes belong is an error, not something to cast to int8.
        if dtype is not None and not dtype.is_floating_point:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: Any, model: PreTrainedModel | None = None) -> Any:
        if self.pre_quantized:
            renamings = [c for c in weight_conversions if isinstance(c, WeightRenaming)]
            others = [c for c in weight_conversions if not isinstance(c, WeightRenaming)]
            weight_conversions = [StoredRenaming(renamings, self._names_on_disk), *others]
        return by_version.update_weight_conversions(self, weight_conversions, model)

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeWeights(self)

    def quantize_arrived(
        self, model: PreTrainedModel, name: str, weight: Tensor, missing_keys: set[str] | None
    ) -> dict[str, Tensor]:
        """Quantize the module of a float weight that came from the checkpoint.

        Args:
            name: of the weight in the model.
            missing_keys: what the loader has not found yet, changed in place.

        Returns:
            what the loader is to put into the model: `{name: tensor}`.
        """
        decision = self._awaited.get(name)
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if decision is None:  # beside a weight that is quantized, in one conversion
            return {name: weight.to(model.get_parameter(name).dtype)}
        missing = set() if missing_keys is None else missing_keys
        if isinstance(module, QuantizedModule):  # its weight is another's, and in the checkpoint too
            missing.discard(name)
            return _in_full(owner, self._stored(module, key, weight))
        if weight.shape != module.get_parameter(key).shape:
            # The loader compares shapes of what is not quantized, and knows what the user wants to happen.
            group = next((group for group in self._tied if decision.module in group), [decision.module])
            self._awaited = {n: d for n, d in self._awaited.items() if d.module not in group}
            return {name: weight}
        # A module of several weights is float until all are there: conversions of transformers look at its shapes.
        settings = (decision.weights, bool(decision.symmetric), decision.module)
        twin = quantized_class_of(module, decision).empty_like(module, *settings)
        arrived = self._arrived.setdefault(owner, {})
        arrived[key] = self._stored(twin, key, weight)
        if len(arrived) < len(twin.weight_axes):
            return {}
        said = self._make_room_for_arrived(model, decision, missing)
        for tensors in self._arrived.pop(owner).values():
            said |= _in_full(owner, tensors)
        return said

    def _stored(self, module: QuantizedModule, key: str, weight: Tensor) -> dict[str, Tensor]:
        """What stands for a weight; of one that cannot be quantized zeros, and the problem is kept."""
        try:
            return module.quantized_tensors(key, weight)
        except ValueError as problem:
            # The loader would bury it in a report with a traceback; it is raised after loading.
            self.problems.append(str(problem))
            rooms = {n: module.get_parameter(n) for n in module.storage_names() if n.startswith(f"{key}_")}
            return {name: torch.zeros_like(room, device=weight.device) for name, room in rooms.items()}

    def _make_room_for_arrived(
        self, model: PreTrainedModel, decision: Decision, missing: set[str]
    ) -> dict[str, Tensor]:
        """Room for the codes of a module, and of those that share its weight, which have not arrived.

        Returns:
            what those of them that say a dtype say it by.
        """
        group = next((group for group in self._tied if decision.module in group), [decision.module])
        said: dict[str, Tensor] = {}
        for name in group:
            dtype = self._shown_dtype(name)
            module = make_room(model.get_submodule(name), replace(decision, module=name), dtype)
            awaited = {f"{name}.{key}".lstrip(".") for key in module.weight_axes}
            if awaited & missing:
                missing -= awaited
                missing |= {f"{name}.{key}".lstrip(".") for key in module.storage_names()}
            if name in self._says_dtype:
                module.say_dtype()
                said |= _in_full(name, {DTYPE_NAME: torch.ones(1, dtype=module.quantization.dtype)})
        share_storage(model, [group])
        declare_tied_storage(model)
        return said

    def _shown_dtype(self, module: str) -> torch.dtype | None:
        """The dtype that the weight of a module shows: float32 where the model keeps it in float32."""
        kept = self._kept_in_float32 is not None and self._kept_in_float32.search(f"{module}.weight")
        return torch.float32 if kept else None

    # After the weights are loaded

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.read_ahead is not None:
            self.read_ahead.stop()
            self.read_ahead = None  # a model with a thread could not be copied
            model._keep_in_fp32_modules_strict = self._keep_in_fp32_strict
        for module, arrived in self._arrived.items():
            self.problems.append(
                f"{module} lacks weights in the checkpoint, of which it holds {', '.join(arrived)}."
            )
        self._awaited, self._arrived = {}, {}
        by_version.check_shapes(model, self._shapes)
        if self.is_float:
            self._forget(model)
            return model
        if self.problems:
            raise ValueError(" ".join(self.problems))
        keep_conversions(model)
        self._initialize_as_float(model)
        _check_loaded(model)
        _freeze(model)
        if not self.pre_quantized:
            share_offloaded(model)
        make_resizable(model)
        self.is_complete = True
        add_tags(model, self.quantization_config)
        attach_to_parts(model)
        log_summary(model, self.decisions)
        return model

    def _initialize_as_float(self, model: PreTrainedModel) -> None:
        """What got nothing from the checkpoint is float, as a head that is to be trained; transformers initialized it,
        but for heads with other labels than those that the checkpoint holds codes for.
        """
        for name, module in model.named_modules():
            if isinstance(module, QuantizedModule) and not any(
                parameter.is_meta or getattr(parameter, "_is_hf_initialized", False) is True
                for parameter in (module.get_parameter(key) for key in module.storage_names())
            ):
                module.dequantize()
                vars(module).pop("_is_hf_initialized", None)
                with torch.no_grad():
                    _owner(model, name)._init_weights(module)
        self.decisions = [
            decision.left_in_float(NOT_THERE)
            if decision.quantized and not isinstance(model.get_submodule(decision.module), QuantizedModule)
            else decision
            for decision in self.decisions
        ]

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
        keep_conversions(model)
        declare_tied_storage(model)
        make_resizable(model)

    # The rest of the contract

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # the adapter is saved, not the model
        check_in_one_piece(model)
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
        """Whether `generate` may compile the model as a whole."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        float_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for module in list(model.modules()):
            if isinstance(module, QuantizedModule):
                module.dequantize(float_dtype)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                vars(part.config).pop("_is_quantized", None)
        withdraw_tied_storage(model)
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
    for part in model.modules():
        if isinstance(part, PreTrainedModel):  # some forwards of transformers look here
            part.config._is_quantized = True
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


def _patterns_of(model: nn.Module, weights: Collection[str]) -> set[str]:
    """Regular expressions that match the names of the quantized weights and no other parameter.

    Layer numbers are left open where all layers agree, so that a model of many layers needs few patterns.
    """
    quantized = set(weights)
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


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost (sub)model that a module belongs to, which knows how to initialize it."""
    owner = model
    parts = name.split(".")
    for end in range(1, len(parts)):
        part = model.get_submodule(".".join(parts[:end]))
        if isinstance(part, PreTrainedModel):
            owner = part
    return owner


def _in_full(module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{name}".lstrip("."): tensor for name, tensor in tensors.items()}


def _check_loaded(model: nn.Module) -> None:
    """Every quantized module got all of its tensors.

    Raises:
        ValueError: one is missing; names it.
    """
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        for key in module.storage_names():
            tensor = module.get_parameter(key)
            offloaded = tensor.is_meta and hasattr(module, "_hf_hook")
            if not offloaded and getattr(tensor, "_is_hf_initialized", False) is not True:
                raise ValueError(
                    f"{name}.{key} is missing from the checkpoint; save the model again.".lstrip(".")
                )


def _freeze(model: PreTrainedModel) -> None:
    """Train scales and float16 weights no more than codes; transformers lets every float that it loads be trained."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for name in module.storage_names():
                module.get_parameter(name).requires_grad_(False)
            module.note_versions()
