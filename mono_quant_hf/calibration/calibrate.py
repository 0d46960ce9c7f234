"""Calibrated rounding: stage by stage, layer by layer, each layer seeing what its rounded predecessors give."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mono_quant_hf.core import quantize_to_codes
from mono_quant_hf.core.rounding import damped, factorized, round_balanced, round_compensated
from mono_quant_hf.files import check_room
from mono_quant_hf.modules import QuantizedModule
from mono_quant_hf.modules.base import stored_names

from .blocks import Blocks, Inputs, Stage, block_pass, evaluating, inputs_of
from .layouts import Layout, Moments, layout_of
from .resume import Expected, claim_resume_folder, fingerprint_of, load_kept, save_kept


@dataclass(frozen=True)
class Compensation:
    """How errors are compensated.

    Attributes:
        damping: share of the mean diagonal that is added to the Hessian. GPTQ's usual 0.01 fits the samples so
            closely that text of another kind may come out worse than with the nearest codes.
        sweeps: of coordinate descent after the first pass.
        drift: how much of the error that a layer's rounded predecessors leave in its input it makes up for, 0 to 1.

    Example:
        >>> import torch
        >>> from mono_quant_hf import quantize_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = quantize_model(model, calibration=torch.randn(64, 16), compensation=Compensation(damping=0.01))
        >>> Compensation(damping=2)
        Traceback (most recent call last):
            ...
        ValueError: damping is 2, but it must be from 0 to 1.
    """

    damping: float = 0.1
    sweeps: int = 0
    drift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping is {self.damping}, but it must be from 0 to 1.")
        if not isinstance(self.sweeps, int) or self.sweeps < 0:
            raise ValueError(f"sweeps is {self.sweeps!r}, but it must be a whole number from 0.")
        if not 0 <= self.drift <= 1:
            raise ValueError(f"drift is {self.drift}, but it must be from 0 to 1.")


@dataclass
class _Layer:
    """A module at work: still a float one, which computes with its float or with its rounded weight."""

    name: str
    module: nn.Module
    layout: Layout
    target: QuantizedModule
    float_weight: Tensor = field(init=False)
    rounded_weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.float_weight = self.rounded_weight = self.module.get_parameter("weight").data

    def use(self, rounded: bool) -> None:
        self.module.get_parameter("weight").data = self.rounded_weight if rounded else self.float_weight

    def settle(self, codes: Tensor | None, scale: Tensor | None, zero_point: Tensor | None) -> None:
        """Fill the quantized module, and be able to compute with what it stands for."""
        _put(self.target, codes, scale, zero_point)
        self.rounded_weight = self.target.dequantized("weight", self.float_weight.dtype)

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """`settle` with what `tensors` gave in an earlier run, by full name."""
        names = stored_names("weight", "int8", symmetric=False)
        found = (stored.get(f"{self.name}.{key}") for key in names)
        device = self.float_weight.device
        self.settle(*(None if tensor is None else tensor.to(device) for tensor in found))

    def finish(self) -> None:
        """Compute with the float weight again; the rounded one is no longer held."""
        self.use(rounded=False)
        self.rounded_weight = self.float_weight

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scale and zero-point, by full name."""
        target = self.target
        return {f"{self.name}.{key}": target.get_parameter(key).data for key in target.storage_names()}

    def stored(self) -> Expected:
        """The dtype and shape of each of `tensors`."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors().items()}


def rounds_with_moments(target: QuantizedModule) -> bool:
    """Whether calibration has a say in the module's codes: int8, and a plain matrix product.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import QuantizedEmbedding, QuantizedLinear
        >>> rounds_with_moments(QuantizedLinear(8, 2))
        True
        >>> table = torch.nn.Embedding(9, 8)
        >>> rounds_with_moments(QuantizedEmbedding.from_float(table, "int8", symmetric=False))
        False
    """
    return (
        target.quantization.weights == "int8"
        and list(target.weight_axes) == ["weight"]
        and layout_of(target) is not None
    )


def balance(module: nn.Module, target: QuantizedModule) -> QuantizedModule:
    """Fill `target` with the codes of `round_balanced`; no data is needed.

    Args:
        module: the float module.
        target: its quantized twin, of a kind for which `rounds_with_moments`.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import QuantizedLinear
        >>> layer = torch.nn.Linear(64, 4)
        >>> def sum_of_errors(quantized):
        ...     return (quantized.dequantized("weight", torch.float32) - layer.weight).sum(1).abs().max()
        >>> nearest = QuantizedLinear.from_float(layer, "int8", symmetric=True)
        >>> balanced = balance(layer, QuantizedLinear.empty_like(layer, "int8", symmetric=True))
        >>> bool(sum_of_errors(balanced) < sum_of_errors(nearest))
        True
    """
    layout = layout_of(module)
    assert layout is not None
    matrix = layout.matrix(module.get_parameter("weight").detach())
    _put(target, *_rounded(matrix, layout, target, round_balanced))
    return target


def _rounded(
    matrix: Tensor, layout: Layout, target: QuantizedModule, rounding: Callable[..., Tensor]
) -> list[Tensor | None]:
    """Codes, by `rounding(matrix, scale, zero_point)`, scale and zero-point for `_put`."""
    axes = tuple(range(matrix.dim() - 1))
    _, scale, zero_point = quantize_to_codes(matrix, target.quantization.symmetric, axes)
    made = (rounding(matrix, scale, zero_point), scale, zero_point)
    return [None if tensor is None else layout.weight(tensor).contiguous() for tensor in made]


def _put(target: QuantizedModule, *tensors: Tensor | None) -> None:
    """Fill a quantized module with codes, scale and, where it has them, zero-points."""
    names = stored_names("weight", "int8", symmetric=False)
    target.put({name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None})


def calibrate(
    model: nn.Module,
    targets: Mapping[str, QuantizedModule],
    batches: Sequence[Inputs],
    *,
    compensation: Compensation | None = None,
    resume_folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[str]:
    """Fill quantized modules with codes that keep the outputs of their layers, and so of the model.

    In the order of the forward pass, for each group of layers that share an input: the second moments of that input
    are summed up over all batches, in the model whose layers so far are rounded, along with how far it has drifted
    from the float model's; the weight is shifted by what makes up for the drift (least squares), and rounded by
    `round_compensated`. In memory there are, beside the float model and the codes, for all batches what one block gives
    in the float and in the rounded model and what its layers are fed in the float one, and the moments of one group.

    Args:
        model: float; on return, and whatever happens, it is as it was before.
        targets: `{module name: its quantized twin, not yet filled}`, for modules for which `rounds_with_moments`.
        batches: inputs of the model, by name.
        compensation: how; `Compensation()` if None.
        resume_folder: where the codes of finished blocks are kept, for a run that was interrupted to go on from.
        progress: show a progress bar.

    Returns:
        the names of modules that no batch came by; they got `round_balanced` codes.

    Raises:
        ValueError: there are no batches, the inputs overflow, or what is in the folder is damaged or of another run.
        OSError: the disk of the folder has too little room.

    Example:
        >>> import torch
        >>> from mono_quant_hf.modules import QuantizedLinear
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> targets = {name: QuantizedLinear.empty_like(model.get_submodule(name), "int8", symmetric=True)
        ...            for name in ("0", "2")}
        >>> calibrate(model, targets, [{"input": torch.randn(64, 16)}])
        []
        >>> targets["2"].weight_int8.dtype, model[2].weight.dtype
        (torch.int8, torch.float32)
    """
    if not batches:
        raise ValueError("There are no calibration samples; give at least one.")
    work = _Calibration(model, targets, batches, compensation or Compensation(), resume_folder)
    return work.go(progress)


class _Calibration:
    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, QuantizedModule],
        batches: Sequence[Inputs],
        compensation: Compensation,
        resume_folder: str | os.PathLike[str] | None,
    ):
        self.model, self.batches, self.compensation = model, batches, compensation
        self.layers: dict[str, _Layer] = {}
        for name, target in targets.items():
            module = model.get_submodule(name)
            layout = layout_of(module)
            assert layout is not None
            self.layers[name] = _Layer(name, module, layout, target)
        self.outside: list[_Layer] = []
        self.active: list[_Layer] = []
        self.kept: dict[bool, list[dict[str, Any]]] = {
            rounded: [{} for _ in batches] for rounded in (False, True)
        }
        self.fed: list[dict[str, list[Tensor]]] = []
        self.folder = None
        if resume_folder is not None:
            how = {
                name: (type(layer.target).__name__, layer.target.quantization.symmetric)
                for name, layer in self.layers.items()
            }
            self.fingerprint = fingerprint_of(model, how, asdict(compensation), batches)
            self.folder = claim_resume_folder(resume_folder, self.fingerprint)
            tensors = [t for layer in self.layers.values() for t in layer.tensors().values()]
            check_room(resume_folder, sum(t.nbytes for t in tensors), "The calibration")

    def go(self, progress: bool) -> list[str]:
        with evaluating(self.model), ExitStack() as stack:
            for layer in self.layers.values():
                stack.callback(layer.finish)
            self.blocks = Blocks(self.model, list(self.layers), self.batches[0])
            stack.callback(self.blocks.put_back)
            stages = self.blocks.stages
            total = sum(len(stage.groups) for stage in stages)
            with tqdm(total=total, desc="Calibrating", unit="layer", disable=not progress) as bar:
                for number, stage in enumerate(stages):
                    self._stage(number, stage, last=stage is stages[-1], bar=bar)
        reached = {name for stage in stages for group in stage.groups for name in group}
        missed = [name for name in self.layers if name not in reached]
        for name in missed:
            balance(self.layers[name].module, self.layers[name].target)
        return missed

    def _stage(self, number: int, stage: Stage, last: bool, bar: Any) -> None:
        active = [self.layers[name] for group in stage.groups for name in group]
        expected = {name: form for layer in active for name, form in layer.stored().items()}
        stored = load_kept(self._file(number), self.fingerprint, expected) if self.folder else None
        self.active = active
        self.fed, float_outputs = [], None
        if stage.block is not None and self.compensation.drift and not (last and stored):
            # One pass for all groups; but what is called several times may be so outside of the block.
            wanted = [] if stored else [g[0] for g in stage.groups if g[0] not in self.blocks.repeated]
            float_outputs, self.fed = self._pass_block(stage.block, rounded=False, names=wanted)
        for group in stage.groups:
            layers = [self.layers[name] for name in group]
            bar.set_postfix_str(group[0])
            if stored is None:
                self._round(layers)
            else:
                for layer in layers:
                    layer.load(stored)
            bar.update()
        if self.folder and stored is None:
            tensors = {name: t for layer in active for name, t in layer.tensors().items()}
            save_kept(self._file(number), self.fingerprint, tensors)
        if stage.block is None:
            self.outside += active
            return
        if not last:
            if float_outputs is not None:
                self._keep(stage.block, rounded=False, given=float_outputs)
            self._keep(stage.block, rounded=True, given=self._pass_block(stage.block, rounded=True)[0])
        for layer in active:
            layer.finish()
        self.blocks.put_aside(stage.block)

    def _round(self, layers: list[_Layer]) -> None:
        """The codes of one group; layers of different layouts have moments of their own."""
        moments: dict[Any, Moments] = {}
        for layer in layers:
            moments.setdefault(layer.layout.key, Moments(layer.layout))
        name = layers[0].name
        for index in range(len(self.batches)):
            x_floats = self._float_inputs(name, index)
            for x, x_float in zip(self._inputs(name, index, rounded=True), x_floats, strict=False):
                for moment in moments.values():
                    moment.add(x, x_float)
        for layer in layers:
            layer.settle(*self._codes(layer, moments[layer.layout.key]))

    def _codes(self, layer: _Layer, moments: Moments) -> list[Tensor | None]:
        matrix = layer.layout.matrix(layer.float_weight).float()
        grid, settings = matrix, self.compensation
        if moments.drift.dim():
            factor = factorized(damped(moments.hessian, settings.damping))
            # W + d W E[(x_float - x) xᵀ] H⁻¹ meets x as W meets x_float, as far as a linear layer can
            shift = torch.cholesky_solve((matrix @ moments.drift).mT, factor).mT
            matrix = matrix + settings.drift * shift

        def compensated(_: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
            return round_compensated(
                matrix, scale, zero_point, moments.hessian, damping=settings.damping, sweeps=settings.sweeps
            )

        return _rounded(grid, layer.layout, layer.target, compensated)

    def _inputs(self, name: str, index: int, rounded: bool) -> list[Tensor]:
        self._use(rounded)
        with self.blocks.recalling(self.kept[rounded][index]):
            return inputs_of(self.model, self.batches[index], name, name in self.blocks.repeated)

    def _float_inputs(self, name: str, index: int) -> Iterable[Tensor | None]:
        if not self.compensation.drift:
            return repeat(None)
        if self.fed and name in self.fed[index]:
            return self.fed[index].pop(name)
        return self._inputs(name, index, rounded=False)

    def _pass_block(
        self, block: str, rounded: bool, names: Sequence[str] = ()
    ) -> tuple[list[Any], list[dict[str, list[Tensor]]]]:
        """For every batch, what the block gives and what the modules `names` in it are fed."""
        self._use(rounded)
        given, fed = [], []
        for batch, kept in zip(self.batches, self.kept[rounded], strict=True):
            with self.blocks.recalling(kept):
                output, seen = block_pass(self.model, batch, block, names)
            given.append(output)
            fed.append(seen)
        return given, fed

    def _keep(self, block: str, rounded: bool, given: list[Any]) -> None:
        for kept, output in zip(self.kept[rounded], given, strict=True):
            kept[block.rpartition(".")[0]] = output

    def _use(self, rounded: bool) -> None:
        for layer in (*self.outside, *self.active):
            layer.use(rounded)

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"stage-{number:04d}.safetensors"
