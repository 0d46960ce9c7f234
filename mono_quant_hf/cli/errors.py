"""The error that a user of the command can put right."""


class CommandError(Exception):
    """Shown as one line without a traceback; the command then exits with code 2."""
