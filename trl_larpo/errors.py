"""Errors a user can mend. The command line prints them as one line, without a stack trace."""


class LarPOError(ValueError):
    """Base class: something in the user's input is wrong; the message says what, where and how to mend it."""


class ConfigError(LarPOError):
    """An option has an impossible value, or two options exclude each other."""


class DataError(LarPOError):
    """A dataset, or one row of it, cannot be used."""
