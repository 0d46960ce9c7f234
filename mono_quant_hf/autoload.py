"""Registers with transformers and diffusers what mono_quant_hf is for, without importing it, nor them.

`arm` puts a stand-in for mono_quant_hf in the two tables of quantization methods that each of them has, at once or, by
a hook, when they are made. A checkpoint with `"quant_method": "mono_quant"` then finds the stand-in, which imports
mono_quant_hf in its place.

`import mono_quant_hf` arms it; and `import torch`, by the entry point in the group `torch.backends`, so that
checkpoints load where nobody imports the package. For torch this file is installed a second time, as the module
`mono_quant_hf_autoload` of its own, which is found also where the package is not. Off with `MONO_QUANT_AUTOLOAD=0`, or
with torch's own `TORCH_DEVICE_BACKEND_AUTOLOAD=0`.
"""

import logging
import os
import sys
from typing import Any

VARIABLE = "MONO_QUANT_AUTOLOAD"
PACKAGE = "mono_quant_hf.integration"
"""What registers with transformers, and does the rest once it is imported."""
METHOD = "mono_quant"
REGISTERED_BY = {
    "transformers.quantizers.auto": PACKAGE,
    "diffusers.quantizers.auto": "mono_quant_hf.integration.components",
}
"""The module that has the tables, and ours that puts its classes into them."""
TABLES = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")

logger = logging.getLogger("mono_quant_hf")


def arm(asked: bool = False) -> None:
    """Have mono_quant_hf imported when a checkpoint needs it. Never raises: it runs within `import torch`.

    Args:
        asked: by who imports the package, so that it cannot be switched off.
    """
    try:
        off = os.environ.get(VARIABLE, "1").strip().lower() in ("0", "false", "no", "off")
        if (off and not asked) or PACKAGE in sys.modules:  # it has registered itself, or is on the way
            return
        for module in REGISTERED_BY:
            fill_once_imported(module)
    except Exception as problem:
        logger.debug("%s was not armed: %r", __name__, problem)


def fill_once_imported(module: str) -> None:
    """Fill the tables of a module now, or when it is imported: with our classes, or stand-ins while they are not."""
    waiting = any(isinstance(finder, _Hook) and finder.module == module for finder in sys.meta_path)
    if not waiting and not _fill(module):
        sys.meta_path.insert(0, _Hook(module))


def make_room() -> None:
    """Take back what `arm` did, here and in torch's copy of this file. mono_quant_hf registers itself after it."""
    for copy in ("mono_quant_hf_autoload", "mono_quant_hf.autoload"):
        if copy in sys.modules:
            sys.modules[copy].disarm()


def disarm() -> None:
    """Take back what `arm` of this file did."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Hook)]
    for module in REGISTERED_BY:
        for table in TABLES:
            methods = getattr(sys.modules.get(module), table, {})
            if isinstance(methods.get(METHOD), StandIn):
                del methods[METHOD]


class StandIn:
    """Stands in a table for a class of mono_quant_hf, and imports the package when it is used."""

    def __init__(self, module: str, table: str):
        self._module, self._table = module, table

    def _class(self) -> Any:
        disarm()
        try:
            __import__(REGISTERED_BY[self._module])
        except Exception as problem:
            for module in REGISTERED_BY:
                _fill(module)
            raise ImportError(
                f"This checkpoint was quantized by mono_quant_hf, which is installed but cannot be imported "
                f"({type(problem).__name__}: {problem}); install it again."
            ) from problem
        return getattr(sys.modules[self._module], self._table)[METHOD]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy, inspect and the like, which want no import
            raise AttributeError(name)
        return getattr(self._class(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._class()(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        # diffusers asks it of every config in the tables.
        made = getattr(sys.modules.get("mono_quant_hf.config"), "MonoQuantConfig", None)
        return made is not None and isinstance(instance, made)


def _fill(module: str) -> bool:
    """Fill the tables of a module if they are there; answers whether they are."""
    tables = sys.modules.get(module)
    if not all(hasattr(tables, table) for table in TABLES):
        return False
    if PACKAGE in sys.modules:
        __import__(REGISTERED_BY[module])
    else:
        for table in TABLES:
            getattr(tables, table).setdefault(METHOD, StandIn(module, table))
    return True


class _Hook:
    """Finder that waits for the tables of a module, once. It finds no module itself."""

    def __init__(self, module: str):
        self.module = module

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.module:
            # torch was imported from within the tables' module, so that this hook came too late for it.
            if self.module in sys.modules and _fill(self.module):
                self._remove()
            return None
        self._remove()
        for finder in list(sys.meta_path):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None

    def _remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader:
    """Runs the module with its own loader, which it leaves in its place, and then fills the tables."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            _fill(module.__name__)
        except Exception as problem:
            logger.warning("mono_quant_hf is not registered with %s: %r", module.__name__, problem)
