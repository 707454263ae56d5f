"""One command at a time writes into a folder."""

import errno
import fcntl
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime

import psutil
import pytest

from trl_larpo import LarPOError, locks
from trl_larpo.locks import exclusive_lock, is_locked


def test_one_process_in_a_folder(tmp_path):
    code = "import pathlib, sys\nfrom trl_larpo.locks import exclusive_lock\n"
    code += "with exclusive_lock(pathlib.Path(sys.argv[1])): pass"
    with exclusive_lock(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert re.search(rf"Another process \({owner} since \S+\) is running in {tmp_path}", other.stderr)
    with exclusive_lock(tmp_path):
        pass  # free again


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that refuses every lock."""

    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)


def test_without_locks_a_warning_says_what_nobody_keeps_apart(tmp_path, without_locks, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_larpo.locks"), exclusive_lock(tmp_path):
        assert f"The file system of {tmp_path} has no locks (No locks available)" in caplog.text
        assert "Start only one at a time" in caplog.text
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on {socket.gethostname()} since ")
    assert len(caplog.records) == 1


def test_without_locks_the_owner_is_known_by_its_number(tmp_path, without_locks):
    with exclusive_lock(tmp_path):
        assert is_locked(tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / ".lock").write_text(f"process {ended.pid} on {socket.gethostname()}\n")
    assert not is_locked(tmp_path)
    (tmp_path / ".lock").write_text(f"process {os.getpid()} on another-machine\n")
    assert not is_locked(tmp_path)


def test_a_lock_of_another_machine_is_waited_for_as_that_may_be_gone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "SECONDS_TO_FREE", 0.3)
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"process {os.getpid()} on another-machine\n")
        lock.flush()
        with pytest.raises(LarPOError, match=r"process \d+ on another-machine\) is running"), exclusive_lock(tmp_path):
            pass
        assert "waiting 0 s, in case it is gone" in caplog.text
        threading.Timer(0.1, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        with exclusive_lock(tmp_path):
            assert socket.gethostname() in (tmp_path / ".lock").read_text()


@pytest.mark.parametrize("since", ["", " since 2020-01-01T00:00:00+00:00"], ids=["of an earlier version", "timed"])
def test_a_restarted_container_has_the_id_and_name_of_the_one_that_was_killed(tmp_path, monkeypatch, caplog, since):
    """Its lock stays on NFS for a while, and the process with that id is this one."""
    monkeypatch.setattr(locks, "SECONDS_TO_FREE", 60.0)
    owner = f"process {os.getpid()} on {socket.gethostname()}{since}"
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"{owner}\n")
        lock.flush()
        threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        with exclusive_lock(tmp_path):
            assert f"{owner} is running in {tmp_path}; waiting 60 s, in case it is gone" in caplog.text


@pytest.mark.parametrize("seconds, is_running", [(0, True), (-3600, None)], ids=["the owner", "a later process"])
def test_an_owner_is_known_by_its_start(tmp_path, without_locks, seconds, is_running):
    """Process ids are used again in time."""
    with subprocess.Popen(["sleep", "60"]) as other:
        started = datetime.fromtimestamp(psutil.Process(other.pid).create_time() + seconds, UTC)
        name = f"process {other.pid} on {socket.gethostname()} since {started.isoformat(timespec='seconds')}"
        (tmp_path / ".lock").write_text(f"{name}\n")
        assert locks._is_running(name) is is_running and is_locked(tmp_path) == bool(is_running)
        other.kill()


def test_other_errors_of_locks_are_raised(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), exclusive_lock(tmp_path):
        pass
