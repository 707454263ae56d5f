"""What a full disk looks like in the errors of libraries."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import LarPOError

_LITTLE_SPACE = 2**18  # bytes

_FULL = ("No space left", "Disk quota exceeded")  # as systems say it


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """
    Makes one error of the many that libraries raise on a full disk; other errors pass.

    Raises:
        LarPOError: If the disk of the folder is full, or the error says so of another one. It names the file there, if
            the error knows it.
    """
    try:
        yield
    except LarPOError:
        raise
    except Exception as error:
        errors = _chain(error)
        # torch says nothing of the disk; but then nothing is left on it
        is_full = shutil.disk_usage(folder).free < _LITTLE_SPACE
        if is_full or any(said in str(each) for each in errors for said in _FULL):
            raise LarPOError(
                f"The disk is full: {_full_place(errors, folder, is_full)} cannot be written to "
                f"({type(error).__name__}: {error}). Free some space and run the same command again; what was saved so "
                "far is kept."
            ) from error
        raise


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error, and those that led to it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _full_place(errors: list[BaseException], folder: Path, is_full: bool) -> str:
    """The file outside of the folder that there was no space for, else the folder."""
    full = [x for x in errors if isinstance(x, OSError) and x.errno in (errno.ENOSPC, errno.EDQUOT)]
    names = [os.fsdecode(x.filename) for x in full if isinstance(x.filename, str | bytes | os.PathLike)]
    for name in names:
        if not Path(name).resolve().is_relative_to(folder.resolve()):
            return name
    return str(folder) if names or is_full else f"{folder}, or a folder of caches or temporary files,"
