"""Waits for other processes: as long as they are alive, and no longer. Threads take the place of processes."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch import distributed

from trl_larpo import cli, waiting
from trl_larpo.errors import LarPOError, LostProcessError
from trl_larpo.lifetime import Stopped
from trl_larpo.run.launch import run_as_worker
from trl_larpo.waiting import ProcessGroup

LIMIT = 0.8  # seconds


@pytest.fixture
def two():
    """Two processes with one store."""
    store = distributed.HashStore()
    store.set_timeout(timedelta(seconds=LIMIT))
    groups = [ProcessGroup(store, rank, 2) for rank in range(2)]
    yield groups
    for group in groups:
        group.close()


def test_a_process_that_is_alive_may_come_late(two):
    with ThreadPoolExecutor() as pool:
        arrived = pool.submit(two[0].wait, "first")
        time.sleep(1.5 * LIMIT)
        assert not arrived.done()
        two[1].wait("first")
        arrived.result(timeout=5)


def test_a_process_that_shows_no_sign_of_life_is_lost(two):
    two[1].close()
    began = time.monotonic()
    with pytest.raises(LostProcessError, match=r"Process 1 of 2 has shown no sign of life .*`ddp_timeout`"):
        two[0].wait("name")
    assert LIMIT < time.monotonic() - began < LIMIT + 5


def test_a_process_that_is_waiting_may_die(two):
    two[1]._keys.add("name", 1)
    two[1].close()
    two[0].wait("name")  # both have come
    with pytest.raises(LostProcessError):
        two[0].wait("next")


def fail(*arguments):
    raise ZeroDivisionError("division\nby zero")


@pytest.mark.parametrize("work", [lambda: run_as_worker(fail), lambda: cli.main(["generate"])])
def test_a_process_that_failed_says_so_to_others(two, monkeypatch, work):
    two[1].close()  # else the wait for what was not said has no end
    monkeypatch.setattr(waiting, "_HEAD_START", 0.1)
    monkeypatch.setattr(waiting, "_current_group", lambda: two[1])
    monkeypatch.setitem(cli.COMMANDS, "generate", (fail, "fails"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(ZeroDivisionError):
        work()
    with pytest.raises(LarPOError, match=r"^Process 1 of 2 failed: ZeroDivisionError: division by zero$"):
        two[0].wait("name")


def test_the_end_of_the_store_ends_the_wait(two, monkeypatch):
    def add(key, count):
        raise distributed.DistNetworkError("Broken pipe")

    monkeypatch.setattr(two[0], "_keys", SimpleNamespace(add=add))
    with pytest.raises(LostProcessError, match="connection to the other processes was lost"):
        two[0].wait("name")


def test_a_signal_ends_the_wait(two):
    def stop(number, frame):
        raise Stopped(number)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Stopped):
            two[0].wait("name")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_nothing_is_left_of_a_group_that_was_closed(two):
    two[1].close()
    assert not two[1]._thread.is_alive()
    waiting.tell_others(ValueError("nobody waits"))  # in one process, or before the first wait


def test_the_main_process_goes_first_then_that_of_each_machine(monkeypatch):
    mine, barrier, order = threading.local(), threading.Barrier(4), []
    monkeypatch.setattr(waiting, "PartialState", lambda: mine.state)
    monkeypatch.setattr(waiting, "wait_for_all", lambda: barrier.wait(timeout=20))

    def process(rank):  # two of each machine
        mine.state = SimpleNamespace(num_processes=4, is_main_process=rank == 0, is_local_main_process=rank % 2 == 0)
        with waiting.main_process_first():
            time.sleep(0.1)
            order.append(rank)

    with ThreadPoolExecutor() as pool:
        list(pool.map(process, range(4)))
    assert order[:2] == [0, 2] and sorted(order[2:]) == [1, 3]
