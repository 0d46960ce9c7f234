"""The versions of torch, transformers and the like that the package works with.

What is older than its metadata asks for is refused; what is newer than tested is used all the same, with a warning.
"""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

DISTRIBUTION = "mono-quant-hf"
REQUIRED = ("torch", "transformers", "accelerate")
TESTED = {"torch": "2.15", "transformers": "5.24", "accelerate": "1.15", "peft": "0.21"}
"""The newest release of each that the tests passed with (make test-versions)."""

try:
    OWN = version(DISTRIBUTION)
except PackageNotFoundError:  # used from a source folder that was not installed
    OWN = "0+unknown"

logger = logging.getLogger("mono_quant_hf")


def check_versions(requirements: list[str] | None = None) -> None:
    """Refuse what is too old before it fails in some odd place; warn once of what is newer than tested.

    Args:
        requirements: as in package metadata; those of the installed mono-quant-hf if None. Where it is not installed,
            but used from its source folder, nothing is known and nothing refused.

    Raises:
        ImportError: a package is too old; says which, what is needed, and how to get it.

    Example:
        >>> check_versions(["torch>=99"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ImportError: mono_quant_hf works with torch>=99, but torch ... is installed; run: pip install 'torch>=99'
    """
    if requirements is None:
        try:
            requirements = requires(DISTRIBUTION) or []
        except PackageNotFoundError:
            requirements = []
    # What is parsed takes its time, so only these are.
    oldest = [Requirement(text) for text in requirements if text.startswith(REQUIRED)]
    for name in REQUIRED:
        found = version(name)
        for requirement in oldest:
            # 2.13.0+cpu is a 2.13.0, and a nightly build of a supported release is one too.
            applies = requirement.name == name and requirement.marker is None
            if applies and not requirement.specifier.contains(found, prereleases=True):
                wanted = f"{name}{requirement.specifier}"
                raise ImportError(
                    f"mono_quant_hf works with {wanted}, but {name} {found} is installed; run: pip install '{wanted}'"
                )
        warn_of_newer(name)


def warn_of_newer(name: str) -> None:
    """Log a warning where an installed package is newer than tested.

    Args:
        name: a key of `TESTED`.

    Example:
        >>> warn_of_newer("torch")
    """
    found, tested = version(name), TESTED[name]
    if Version(found).release[:2] > Version(tested).release[:2]:
        logger.warning(
            f"mono_quant_hf was tested with {name} up to {tested}, and {found} is installed; should something "
            f"fail, try pip install '{name}=={tested}.*'."
        )


def require(distribution: str, purpose: str) -> Any:
    """The module of a package that not everyone has.

    Args:
        distribution: what pip installs; the module's name has underscores for its hyphens.
        purpose: what it is for, to begin a sentence with.

    Raises:
        ImportError: it is not installed; says how to get it.

    Example:
        >>> require("no-such-package", "Reading GGUF")
        Traceback (most recent call last):
            ...
        ImportError: Reading GGUF needs no-such-package; run: pip install no-such-package
    """
    try:
        return importlib.import_module(distribution.replace("-", "_"))
    except ImportError as problem:
        raise ImportError(f"{purpose} needs {distribution}; run: pip install {distribution}") from problem
