"""The error of this floor: one clear sentence that the command line shows as it is."""


class HubError(RuntimeError):
    """A push, export or import that cannot be done; the message names the thing and the remedy."""
