"""The tensors that a quantized model has on disk, by the names of the files and not of its modules."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from .apply import change_modules, make_room
from .conversions import keep_conversions
from .selection import Decision


def expected_tensors(model: PreTrainedModel, decisions: list[Decision]) -> dict[str, Tensor]:
    """What `save_pretrained` would write for a model quantized as decided, without a value in it.

    Args:
        model: float, on the meta device; its modules are made quantized ones.
        decisions: what becomes of each module.

    Returns:
        `{name on disk: tensor on the meta device}`, with the renamings and conversions of the model's own applied; of
        tied weights only the one that is written.
    """
    change_modules(model, decisions, make_room)
    keep_conversions(model)
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    written: dict[str, Tensor] = revert_weight_conversion(
        model, remove_tied_weights_from_state_dict(state, model)
    )
    return written
