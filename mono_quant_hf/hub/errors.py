"""The errors of this floor: each one clear sentence that the command line shows as it is."""

from huggingface_hub.errors import HfHubHTTPError

# The client's own base of them, whichever client huggingface_hub is built on: httpx before 2.0, then httpx2.
HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
"""A connection that failed, or an answer that is an error."""


class HubError(RuntimeError):
    """A push, export or import that cannot be done; the message names the thing and the remedy."""
