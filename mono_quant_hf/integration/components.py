"""Components of diffusers pipelines, quantized as diffusers' own `from_pretrained` loads them, and loaded quantized."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.modules import QuantizedModule, quantized_class_for
from mono_quant_hf.names import QUANT_METHOD
from mono_quant_hf.weight_files import read_headers

from .apply import change_modules, make_room
from .checkpoint import Checkpoint, check_stored_tensors, decide_by_checkpoint, modules_saying_dtype
from .fingerprints import check_fingerprints
from .saving import config_of_modules
from .selection import Decision, decide, decide_recorded, log_summary, modules_that_say_dtype


class MonoQuantDiffusersQuantizer(DiffusersQuantizer):
    """What diffusers calls from `from_pretrained`, as transformers calls `MonoQuantHfQuantizer`.

    Attributes:
        decisions: what became of every module that holds weights, after loading.
    """

    use_keep_in_fp32_modules = True
    supports_parallel_loading = False  # some modules wait for several weights
    is_serializable = True
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: MonoQuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.decisions: list[Decision] = []
        self._files: list[str] | None = None  # of the checkpoint
        self._awaited: dict[str, Decision] = {}  # by the names of the float weights to come
        self._arrived: dict[str, dict[str, Tensor]] = {}  # of modules that others are still awaited for
        self._says_dtype: Collection[str] = ()
        self._kept_in_float32: Collection[str] = ()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "Expected a device_map without the disk, where diffusers would put float weights, got one with it; "
                "give max_memory more for the CPU, or use enable_model_cpu_offload() of the pipeline."
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._files = [str(file) for file in checkpoint_files]
        return loaded_keys

    # Before the weights are loaded

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Collection[str] = (), **kwargs: Any
    ) -> None:
        self._kept_in_float32 = keep_in_fp32_modules
        if self._files is None:  # of one file in another format, which is float
            self.pre_quantized = False
        if self.pre_quantized:
            self._prepare_for_codes(model, self._files or [])
            return
        self.decisions = decide(model, self.quantization_config)
        chosen = {decision.module: decision for decision in self.decisions if decision.quantized}
        self._says_dtype = modules_that_say_dtype(model, chosen)
        for name, decision in chosen.items():
            quantized_class = quantized_class_for(model.get_submodule(name))
            assert quantized_class is not None
            self._awaited |= {f"{name}.{key}": decision for key in quantized_class.weight_axes}

    def _prepare_for_codes(self, model: nn.Module, files: list[str]) -> None:
        """Make room for what a checkpoint holds, once it is known to be what was saved."""
        config = self.quantization_config
        checkpoint = Checkpoint.as_named(read_headers(files))
        self.decisions = decide_by_checkpoint(model, decide_recorded(model, config), config, checkpoint)
        change_modules(model, self.decisions, self._make_room, modules_saying_dtype(checkpoint))
        check_stored_tensors(model, checkpoint, complete=True, exact=config.checksums is None)
        if config.checksums is not None:
            check_fingerprints(files, config, model.state_dict())

    def _make_room(self, module: nn.Module, decision: Decision) -> QuantizedModule:
        kept = not {*self._kept_in_float32}.isdisjoint(decision.module.split("."))
        return make_room(module, decision, torch.float32 if kept else None)

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """For `device_map="auto"`: the dtype of all that `get_special_dtypes_update` does not name."""
        if self.pre_quantized:
            return torch_dtype
        return torch.int8 if self.quantization_config.weights == "int8" else torch.float16

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        if self.pre_quantized:
            return {}
        others = ((name, p) for name, p in model.named_parameters() if name not in self._awaited)
        return {name: torch_dtype or parameter.dtype for name, parameter in others}

    # While they are

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        owner, _, name = param_name.rpartition(".")
        module = model.get_submodule(owner)
        return param_name in self._awaited or (
            isinstance(module, QuantizedModule) and name in module.storage_names()
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        owner, _, name = param_name.rpartition(".")
        # As the checkpoint has it: `param_value` was cast to the model's dtype, scales too.
        tensor = state_dict[param_name].to(target_device)
        module = model.get_submodule(owner)
        if isinstance(module, QuantizedModule):
            module.put({name: tensor})
            return
        decision = self._awaited[param_name]
        arrived = self._arrived.setdefault(owner, {})
        arrived[name] = tensor
        quantized_class = quantized_class_for(module)
        assert quantized_class is not None
        if len(arrived) < len(quantized_class.weight_axes):
            return
        made = self._make_room(module, decision)
        for key, weight in self._arrived.pop(owner).items():
            made.put(made.quantized_tensors(key, weight))
        if owner in self._says_dtype:
            made.say_dtype()

    # After

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        lacking = {
            name: decision
            for name, decision in self._awaited.items()
            if not isinstance(model.get_submodule(decision.module), QuantizedModule)
        }
        self._awaited, self._arrived = {}, {}
        if lacking:
            raise ValueError(
                f"Expected the weights of all modules to be quantized, got none for {len(lacking)}, such as "
                f"{next(iter(lacking))}; load the whole checkpoint, without offload_state_dict."
            )
        for module in model.modules():
            if isinstance(module, QuantizedModule):
                module.note_versions()
        model.register_to_config(quantization_config=config_of_modules(model).to_dict())  # type: ignore[operator]
        log_summary(model, self.decisions)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            if isinstance(module, QuantizedModule):
                module.dequantize()
        config: Any = model._internal_dict
        kept = {key: value for key, value in config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(kept)
        return model


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = MonoQuantConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MonoQuantDiffusersQuantizer
