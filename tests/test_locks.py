"""One command at a time writes into a folder."""

import errno
import logging
import os
import subprocess
import sys

import pytest

from trl_larpo import locks
from trl_larpo.locks import exclusive_lock, is_locked


def test_one_process_in_a_folder(tmp_path):
    code = "import pathlib, sys\nfrom trl_larpo.locks import exclusive_lock\n"
    code += "with exclusive_lock(pathlib.Path(sys.argv[1])): pass"
    with exclusive_lock(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert f"Another process (process {os.getpid()}) is running in {tmp_path}" in other.stderr
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
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()}\n"
    assert len(caplog.records) == 1


def test_without_locks_the_owner_is_known_by_its_number(tmp_path, without_locks):
    with exclusive_lock(tmp_path):
        assert is_locked(tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / ".lock").write_text(f"process {ended.pid}\n")
    assert not is_locked(tmp_path)


def test_other_errors_of_locks_are_raised(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), exclusive_lock(tmp_path):
        pass
