"""`quantize_model`: the same quantization for a model that is in memory already."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mono_quant_hf.calibration import Compensation, Sampling
from mono_quant_hf.config import MonoQuantConfig
from mono_quant_hf.core import calculate_scale_zp_per_channel, quantize_weight_fp16
from mono_quant_hf.modules import QuantizedModule, quantized_class_for

from .apply import change_modules, quantize
from .calibrated import calibrated_codes
from .quantizer import attach, attach_to_owners, attach_to_parts
from .saving import config_of_modules
from .selection import Decision, decide, log_summary


def quantize_model(
    model: nn.Module,
    config: MonoQuantConfig | None = None,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    sampling: Sampling | None = None,
    compensation: Compensation | None = None,
    resume_folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Quantize a model in memory, in place, one module after the other.

    A transformers model can then be saved, pushed, dequantized and reloaded like one that `from_pretrained` quantized.
    Either all weights can be quantized, or an error is raised and the model is left as it was, also by a calibration
    that fails or is interrupted.

    Args:
        model: any module with float weights, on any device.
        config: what to quantize and how; `MonoQuantConfig()` if None.
        calibration: how int8 codes are chosen in layers that are a plain matrix product (Linear, Conv1d, Conv2d,
            transformers' Conv1D). None, the default: the nearest. `"data-free"`: so that each channel's errors sum
            to almost nothing. Or by what the layers are fed, one after the other, each making up for the errors of
            those before (see `mono_quant_hf.calibration`): on texts (a list of str, a `pathlib.Path`, a
            `datasets.Dataset`), on batches of inputs (tensors or mappings), or `"self"`, on text that a causal
            language model writes itself. The format is the same.
        tokenizer: the model's, for calibration on texts.
        sampling: how many texts, how long, and the seed; `Sampling()` if None.
        compensation: damping and the like; `Compensation()` if None.
        resume_folder: calibration keeps the codes of finished layers here, and goes on from them when it is called
            again with the same model and samples.
        progress: show a progress bar.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` is no `nn.Module`, or `config` no `MonoQuantConfig`.
        ValueError: the model is quantized already, or offloaded, or a weight cannot be quantized (the message names
            it).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> quantize_model(model, MonoQuantConfig(symmetric=True))
        Sequential(
          (0): QuantizedLinear(in_features=16, out_features=16, bias=True, weights=int8, symmetric)
          (1): ReLU()
          (2): QuantizedLinear(in_features=16, out_features=4, bias=True, weights=int8, symmetric)
        )
    """
    config = MonoQuantConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model works on an nn.Module, not on {type(model).__name__}.")
    if not isinstance(config, MonoQuantConfig):
        raise TypeError(f"quantize_model needs a MonoQuantConfig, not {type(config).__name__}.")
    _refuse_unfit(model)
    decisions = decide(model, config)
    chosen = {decision.module: decision for decision in decisions if decision.quantized}
    with torch.no_grad():
        for name, decision in chosen.items():
            _check_weights(name, model.get_submodule(name), decision)
    calibrated: dict[str, QuantizedModule] = {}
    if calibration is not None:
        calibrated = calibrated_codes(
            model,
            chosen,
            calibration,
            tokenizer=tokenizer,
            sampling=sampling,
            compensation=compensation,
            resume_folder=resume_folder,
            progress=progress,
        )
    with tqdm(total=len(chosen), desc="Quantizing", unit="module", disable=not progress) as bar:

        def change(module: nn.Module, decision: Decision) -> None:
            twin = calibrated.get(decision.module)
            if twin is None:
                quantize(module, decision)
            else:
                twin.lend_to(module)
            bar.update()

        with torch.no_grad():
            change_modules(model, decisions, change)
    if isinstance(model, PreTrainedModel):
        attach(model, config, decisions)
    elif callable(register := getattr(model, "register_to_config", None)) and any(
        d.quantized for d in decisions
    ):
        # A model of diffusers: saved by itself or in its pipeline, this says that codes are no weights.
        register(quantization_config=config_of_modules(model).to_dict())
    if any(d.quantized for d in decisions):
        attach_to_owners(model)
        attach_to_parts(model)
    log_summary(model, decisions)
    return model


def _refuse_unfit(model: nn.Module) -> None:
    if any(isinstance(module, QuantizedModule) for module in model.modules()) or getattr(
        model, "is_quantized", False
    ):
        raise ValueError(f"{type(model).__name__} is quantized already; quantize the float model.")
    lazy = next((n for n, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)), None)
    if lazy is not None:
        raise ValueError(f"{lazy} is not initialized; run the model once, then quantize it.")
    dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())
    if dispatched or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is spread over devices or offloaded; quantize it while loading: "
            "from_pretrained(..., quantization_config=MonoQuantConfig(), device_map=...)."
        )


def _check_weights(name: str, module: nn.Module, decision: Decision) -> None:
    """Raise before anything is replaced, so that a model is never left half quantized."""
    quantized_class = quantized_class_for(module)
    assert quantized_class is not None
    for weight_name in quantized_class.weight_axes:
        weight = module.get_parameter(weight_name)
        try:
            if decision.weights == "float16":
                quantize_weight_fp16(weight)
            else:
                calculate_scale_zp_per_channel(weight)
        except ValueError as problem:
            full_name = f"{name}.{weight_name}" if name else weight_name
            raise ValueError(f"{full_name} cannot be quantized. {problem}") from None
