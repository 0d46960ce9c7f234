"""Device maps that the loader could not follow, made such that it can."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.accelerate import get_device

logger = logging.getLogger("mono_quant_hf")


def keep_tied_together(model: PreTrainedModel, device_map: dict[str, Any]) -> None:
    """Change a device map that puts one of two tied weights on disk and the other in memory.

    The loader ties them and then finds one without a value. The weight has to be in memory for the other module
    anyway, so both go there; where the map does not name the module on disk by itself, both go to disk.

    Args:
        model: on the meta device, before loading.
        device_map: `{module name: device}`, changed in place.

    Raises:
        ValueError: the map names neither module by itself.
    """
    for pair in model.all_tied_weights_keys.items():
        places = {name.rpartition(".")[0]: get_device(device_map, name) for name in pair}
        on_disk = [module for module, place in places.items() if place == "disk"]
        in_memory = [module for module, place in places.items() if place != "disk"]
        if not on_disk or not in_memory:
            continue
        moved = next((module for module in (*on_disk, *in_memory) if module in device_map), None)
        if moved is None:
            raise ValueError(
                f"The device_map puts {on_disk[0]} on disk and {in_memory[0]} in memory, but they share their weight; "
                "put both in one place, each under its own name."
            )
        other = in_memory[0] if moved == on_disk[0] else on_disk[0]
        device_map[moved] = places[other]
        logger.warning(
            "%s shares its weight with %s and is put beside it, on %s.", moved, other, places[other]
        )
