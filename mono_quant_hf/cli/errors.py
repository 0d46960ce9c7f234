"""Errors that a user of the command can put right, and the sentence for each."""

from __future__ import annotations

import errno

from mono_quant_hf.texts import one_line


class CommandError(Exception):
    """Shown as one line without a traceback; the command then exits with code 2."""


def explained(problem: Exception) -> str | None:
    """One line on what went wrong, or None for an error that is not the user's to put right."""
    said = one_line(" ".join(str(problem).split()))
    if isinstance(problem, (CommandError, ImportError, ValueError, TypeError)):
        return said  # before imports that such an error may be about

    import torch
    from safetensors import SafetensorError

    from mono_quant_hf.hub.errors import HTTPError, HubError

    if isinstance(problem, HubError):
        return said
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return f"there is not enough memory ({said or 'out of memory'}); close other programs, or use a smaller model."
    if (isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or (
        isinstance(problem, SafetensorError)
        and any(f"os error {code}" in said for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    ):
        return f"the disk is full ({said}); make room and try again: nothing half-written was left."
    if isinstance(problem, PermissionError):
        return f"{problem.filename or 'a file'} may not be read or written by this user ({problem.strerror or said})."
    if isinstance(problem, SafetensorError):
        return (
            f"a safetensors file is damaged or cannot be written ({said}); download or save the model again."
        )
    if isinstance(problem, HTTPError):
        return f"the network failed ({type(problem).__name__}: {said}); try again, or give a local folder."
    if isinstance(problem, OSError):
        return said
    return None
