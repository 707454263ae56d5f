"""One writer for each folder: a lock that ends with everything that its owner has started."""

import contextlib
import errno
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import psutil

from .errors import LarPOError
from .lifetime import SECONDS_TO_END, keep_open
from .storage import make_folder, saving_to

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment] # mypy has no other way for a module that may be missing

logger = logging.getLogger(__name__)

_OWNER = re.compile(r"process (\d+) on (\S*)(?: since (\S+))?")  # what a lock holds; earlier versions wrote no time

_ROUNDING = 2.0  # seconds by which that time may differ from what a process's start looks like later

SECONDS_TO_FREE = 120.0
"""How long a network file system may keep the lock of a machine that is gone (NFS: 90 seconds)."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without locks answer


class _NoLocksError(Exception):
    """The file system has no locks."""


@contextlib.contextmanager
def exclusive_lock(folder: Path, file: str = "", option: str = "output_dir") -> Iterator[None]:
    """
    Keeps other processes out of a folder as long as the context is open, and after an error until nothing is left of
    what the process started. A killed process leaves no lock behind.

    Some network file systems have no locks. There, a warning says that nothing keeps others out.

    Args:
        folder: The folder, which is made if it is missing.
        file: The one file in it that others may not write; empty for all of it.
        option: What names the folder or file.

    Raises:
        LarPOError: If another process is in it.
    """
    make_folder(folder, option)
    path = folder / (f".{file}.lock" if file else ".lock")
    with saving_to(path):
        lock = open(path, "a+")  # noqa: SIM115 - closed below, and by the end of the process
    try:
        try:
            _await_lock(lock, f"writing {folder / file}" if file else f"running in {folder}", option)
        except _NoLocksError as error:
            logger.warning(
                f"The file system of {folder} has no locks ({error}): nothing keeps a second command out of this "
                "folder, which would spoil its files. Start only one at a time, or mount it with locks (Lustre: "
                "`-o flock`; NFS: a lock service)."
            )
        keep_open(lock.fileno())
        lock.seek(0)
        lock.truncate()
        lock.write(f"{_own_name()}\n")
        lock.flush()
        yield
        with contextlib.suppress(_NoLocksError):
            _flock(lock, "LOCK_UN")  # also where it is kept open
    finally:
        lock.close()


def is_locked(folder: Path) -> bool:
    """
    Whether a process is in a folder, as [`exclusive_lock`] keeps others out.

    Where the file system has no locks: whether the one that was in it last is there, if that was on this machine.
    """
    if fcntl is None or not (folder / ".lock").exists():
        return False
    with open(folder / ".lock") as lock:
        try:
            return not _flock(lock, "LOCK_SH")
        except _NoLocksError:
            return bool(_is_running(lock.read().strip()))


def _await_lock(lock: IO[str], work: str, option: str) -> None:
    """
    Takes the lock. Waits for what is left of an owner that has ended, and for one on another machine or in another
    container, which may be gone. Another owner is an error.
    """
    started, has_warned = time.monotonic(), False
    while not _flock(lock, "LOCK_EX"):
        lock.seek(0)
        owner = lock.read().strip()
        is_running, waited = _is_running(owner), time.monotonic() - started
        if is_running is None and not has_warned:
            logger.warning(f"{owner} is {work}; waiting {SECONDS_TO_FREE:.0f} s, in case it is gone.")
            has_warned = True
        if is_running or waited > (SECONDS_TO_FREE if is_running is None else SECONDS_TO_END):
            raise LarPOError(
                f"Another process ({owner or 'unknown'}) is {work}. Wait for it, stop it, or take another `{option}`."
            )
        time.sleep(0.1)


def _flock(lock: IO[str], operation: str) -> bool:
    """Does something with a lock, if no other process has it. Returns whether it did."""
    try:
        if fcntl is not None:
            fcntl.flock(lock, getattr(fcntl, operation) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise _NoLocksError(error.strerror) from None
        raise
    return True


def _own_name() -> str:
    """What this process writes into a lock."""
    started = datetime.fromtimestamp(psutil.Process().create_time(), UTC)
    return f"process {os.getpid()} on {socket.gethostname()} since {started.isoformat(timespec='seconds')}"


def _is_running(owner: str) -> bool | None:
    """
    Whether the process that wrote its name into a lock is there; `None` if it was on another machine, or in an earlier
    container with the same name, where a process often has the id that its successor has.
    """
    match = _OWNER.fullmatch(owner)
    if match is None:
        return True  # it has not written it yet
    number, machine, since = match.groups()
    if machine != socket.gethostname():
        return None
    if not psutil.pid_exists(int(number)):
        return False
    if since is None:
        return None if int(number) == os.getpid() else True
    with contextlib.suppress(psutil.Error):  # it has just ended, or is not ours to look at
        if psutil.Process(int(number)).create_time() > datetime.fromisoformat(since).timestamp() + _ROUNDING:
            return None
    return True
