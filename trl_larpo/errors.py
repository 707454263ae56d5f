"""Errors caused by user input. The command line prints them as one line, without a stack trace."""


class LarPOError(ValueError):
    """Base class: the user's input is invalid; the message says what is wrong, where, and how to fix it."""

    exit_status = 2
    """That of a command which the error ends."""


class ConfigError(LarPOError):
    """An option has an impossible value, or two options exclude each other."""


class DataError(LarPOError):
    """A dataset, or one row of it, cannot be used."""


class NonFiniteError(LarPOError):
    """Training has run into NaN or infinite numbers."""


class ProcessError(LarPOError):
    """
    One of several processes has failed.

    Args:
        message: What happened.
        exit_status: What the command's exit status would be if it had happened in its own process.
    """

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status

    def __reduce__(self):
        return type(self), (str(self), self.exit_status), vars(self)


class LostProcessError(LarPOError):
    """Another process died, or its machine cannot be reached."""

    exit_status = 128 + 9  # as if the kill of the other one had been reported


class UnsupportedTRLError(LarPOError, ImportError):
    """A part of this package does not work with the TRL that is installed; the others do."""
