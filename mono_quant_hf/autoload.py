"""Registers with transformers what mono_quant_hf is for, without importing it, nor transformers.

`arm` puts a stand-in for mono_quant_hf in transformers' two tables of quantization methods, at once or, by a hook, when
transformers makes them. A checkpoint with `"quant_method": "mono_quant"` then finds the stand-in, which imports
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
"""What registers with transformers."""
METHOD = "mono_quant"
TABLES_MODULE = "transformers.quantizers.auto"
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
        if not any(isinstance(finder, _Hook) for finder in sys.meta_path) and not _stand_in():
            sys.meta_path.insert(0, _Hook())
    except Exception as problem:
        logger.debug("%s was not armed: %r", __name__, problem)


def make_room() -> None:
    """Take back what `arm` did, here and in torch's copy of this file. mono_quant_hf registers itself after it."""
    for copy in ("mono_quant_hf_autoload", "mono_quant_hf.autoload"):
        if copy in sys.modules:
            sys.modules[copy].disarm()


def disarm() -> None:
    """Take back what `arm` of this file did."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Hook)]
    module = sys.modules.get(TABLES_MODULE)
    for table in TABLES:
        methods = getattr(module, table, {})
        if isinstance(methods.get(METHOD), StandIn):
            del methods[METHOD]


class StandIn:
    """Stands in a table of transformers for a class of mono_quant_hf, and imports the package when it is used."""

    def __init__(self, table: str):
        self._table = table

    def _class(self) -> Any:
        disarm()
        try:
            __import__(PACKAGE)
        except Exception as problem:
            _stand_in()
            raise ImportError(
                f"This checkpoint was quantized by mono_quant_hf, which is installed but cannot be imported "
                f"({type(problem).__name__}: {problem}); repair it with pip install --force-reinstall mono-quant-hf."
            ) from problem
        return getattr(sys.modules[TABLES_MODULE], self._table)[METHOD]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy, inspect and the like, which want no import
            raise AttributeError(name)
        return getattr(self._class(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._class()(*args, **kwargs)


def _stand_in() -> bool:
    """Fill transformers' tables if they are there; answers whether they are."""
    module = sys.modules.get(TABLES_MODULE)
    if not all(hasattr(module, table) for table in TABLES):
        return False
    for table in TABLES:
        getattr(module, table).setdefault(METHOD, StandIn(table))
    return True


class _Hook:
    """Finder that waits for transformers' tables, once. It finds no module itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != TABLES_MODULE:
            # torch was imported from within the tables' module, so that this hook came too late for it.
            if TABLES_MODULE in sys.modules and _stand_in():
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
            if PACKAGE not in sys.modules:
                _stand_in()
        except Exception as problem:
            logger.debug("%s could not stand in: %r", __name__, problem)
