"""The versions of torch, transformers and accelerate that the package works with: those of its own metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

DISTRIBUTION = "mono-quant-hf"
CHECKED = ("torch", "transformers", "accelerate")


def check_versions(requirements: list[str] | None = None) -> None:
    """Refuse a version that the package was not made for, before it fails in some odd place.

    Args:
        requirements: as in package metadata; those of the installed mono-quant-hf if None. Where it is not installed,
            but used from its source folder, nothing is known and nothing refused.

    Raises:
        ImportError: a package is too old or too new; says which, what is supported, and how to get it.

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
            return
    for text in requirements:
        if not text.startswith(CHECKED):  # cheap, for what is parsed below takes its time
            continue
        requirement = Requirement(text)
        if requirement.name not in CHECKED or requirement.marker is not None:
            continue
        found = version(requirement.name)
        # 2.13.0+cpu is a 2.13.0, and a nightly build of a supported release is one too.
        if not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            raise ImportError(
                f"mono_quant_hf works with {wanted}, but {requirement.name} {found} is installed; "
                f"run: pip install '{wanted}'"
            )
