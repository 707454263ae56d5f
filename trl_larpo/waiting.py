"""
[`wait_for_all`]: waits for the other processes as long as they are alive, however slow they are.

A collective such as `PartialState.wait_for_everyone` ends in an error after `ddp_timeout` (with NCCL in an abort). In a
stage of hours, one process may well be later than another by more: its GPU is slower, its answers are longer, its judge
is busy, or it does something for all. So a long wait begins in the key-value store of the process group, where each
process notes that it has arrived, and all the time that it is alive. The collective comes when all have arrived, and
`ddp_timeout` is how long a process may show no sign of life.

Where a process dies, its launcher ends the others of the same machine within seconds. The signs of life are for those
on other machines.
"""

import atexit
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

from accelerate import PartialState
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from .errors import LarPOError, LostProcessError

_LONGEST_PAUSE = 0.5  # seconds between two looks into the store
_LONGEST_PERIOD = 30.0  # seconds between two signs of life
_SIGNS = 20  # in the time that a process may show none
_HEAD_START = 5.0  # seconds in which the launcher of a failed process ends this one, and then says the cause alone

_wait_numbers = itertools.count()  # all processes come to the same waits

_group: "ProcessGroup | None" = None


def wait_for_all() -> None:
    """
    Returns when all processes have called it. For places that one of them may reach much later than the others.

    From the first call on, this process shows signs of life.

    Raises:
        LarPOError: If another process failed.
        LostProcessError: If one has shown no sign of life for `ddp_timeout` seconds.
    """
    state = PartialState()
    if state.num_processes > 1 and (group := _current_group()) is not None:
        group.wait(f"wait {next(_wait_numbers)}")
    state.wait_for_everyone()  # none leaves, and takes the store along, before all have seen that all are there


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The main process goes through the block first, then that of each machine, then all others."""
    state = PartialState()
    if state.num_processes > 1:
        _current_group()  # shows signs of life in the block, too
    firsts = (state.is_main_process, state.is_local_main_process)
    for is_first in firsts:
        if not is_first:
            wait_for_all()
    yield
    for is_first in firsts:
        if is_first:
            wait_for_all()


def tell_others(error: BaseException) -> None:
    """Ends the waits of the other processes, as this one has failed."""
    if (group := _current_group()) is not None:
        group.tell(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def _current_group() -> "ProcessGroup | None":
    """`None` where processes do not communicate through torch.distributed, or found each other without a store."""
    global _group
    store = _get_default_store() if distributed.is_available() and distributed.is_initialized() else None
    if _group is None or _group.store is not store:
        if _group is not None:
            _group.close()
        _group = None if store is None else ProcessGroup(store, distributed.get_rank(), distributed.get_world_size())
    return _group


class ProcessGroup:
    """
    What the processes say to each other beside their collectives. A thread shows that this one is alive.

    Args:
        store: Key-value store of all processes. Its timeout is how long one may show no sign of life.
        rank: Number of this process.
        size: Number of processes.
    """

    def __init__(self, store: distributed.Store, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self._keys = distributed.PrefixStore("larpo", store)
        self._limit = store.timeout.total_seconds()
        self._period = min(_LONGEST_PERIOD, self._limit / _SIGNS)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show_life, name="larpo-signs-of-life", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Shows no signs of life any more: the interpreter must not end while the thread uses the store."""
        atexit.unregister(self.close)
        self._ended.set()
        self._thread.join(timeout=1)

    def _show_life(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, as `wait` says
            while True:
                self._keys.add(f"life {self.rank}", 1)
                if self._ended.wait(self._period):
                    return

    def tell(self, problem: str) -> None:
        """Says why this process has failed, unless another one has before: then that is why."""
        with contextlib.suppress(RuntimeError):
            if self._keys.add("problems", 0):
                return
            self._keys.set("problem", f"Process {self.rank} of {self.size} failed: {problem}")
            self._keys.add("problems", 1)

    def wait(self, name: str) -> None:
        """
        Waits for all processes to come to the same wait.

        Args:
            name: Of the wait.

        Raises:
            LarPOError: If another process failed.
            LostProcessError: If one seems to be dead, or the store is gone.
        """
        try:
            self._wait(name)
        except RuntimeError as error:
            raise LostProcessError(
                "The connection to the other processes was lost: the first one, or its launcher, has ended. See its "
                "message."
            ) from error

    def _wait(self, name: str) -> None:
        signs, next_look = _Signs(self.size, self._limit), 0.0
        pause = 0.001
        self._keys.add(name, 1)
        while self._keys.add(name, 0) < self.size:
            if self._keys.add("problems", 0):
                time.sleep(_HEAD_START)
                raise LarPOError(self._keys.get("problem").decode())
            if time.monotonic() >= next_look:
                signs.look(self._keys)
                next_look = time.monotonic() + self._period
            time.sleep(pause)  # a signal ends it
            pause = min(2 * pause, _LONGEST_PAUSE, self._period)


class _Signs:
    """The signs of life that a waiting process has seen. Clocks of other machines do not matter."""

    def __init__(self, size: int, limit: float):
        self.limit, self.size = limit, size
        self.seen = [(-1, 0.0)] * size  # how many, and when that was new

    def look(self, keys: distributed.Store) -> None:
        """
        Raises:
            LostProcessError: If a process has shown no sign for too long.
        """
        for rank, (before, since) in enumerate(self.seen):
            count, now = keys.add(f"life {rank}", 0), time.monotonic()
            if count != before:
                self.seen[rank] = count, now
            elif now - since > self.limit:
                raise LostProcessError(
                    f"Process {rank} of {self.size} has shown no sign of life for {self.limit:.0f} seconds "
                    "(`ddp_timeout`). It was killed, or its machine does not answer."
                )
