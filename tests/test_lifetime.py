"""Nothing that a command started lives on after it, whatever ends it and whichever of its processes."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from trl_larpo.lifetime import SECONDS_TO_END
from trl_larpo.locks import exclusive_lock, is_locked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")

COMMAND = """
import subprocess, sys, time
from pathlib import Path
from trl_larpo.lifetime import Stopped, guard
from trl_larpo.locks import exclusive_lock

guard()
try:
    with exclusive_lock(Path()):
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        subprocess.run(["sh", "-c", sys.argv[1] + "setsid sleep 600 &"])  # an orphan
        Path("ready").touch()
        time.sleep(600)
except Stopped as stop:
    print(f"stopped by {stop.number}", flush=True)
    sys.exit(1)
"""


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Starts the command. Returns it, and its three processes and what they started, by what they are."""
    monkeypatch.chdir(tmp_path)
    found = []

    def start(before="", prelude="", **options):
        process = subprocess.Popen(
            [sys.executable, "-c", prelude + COMMAND, before],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            **options,
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        front = psutil.Process(process.pid)
        [keeper] = front.children()
        sleepers = {x for x in keeper.children(recursive=True) if x.name() == "sleep"}
        deadline = time.monotonic() + 10
        while len(sleepers) < 2 and time.monotonic() < deadline:
            sleepers = {x for x in keeper.children(recursive=True) if x.name() == "sleep"}
        [command] = [x for x in keeper.children() if x not in sleepers]
        found.extend([front, keeper, command, *sleepers])
        assert len(found) == 5
        return process, {"front": front, "keeper": keeper, "command": command}

    yield start
    _, left = psutil.wait_procs(found, timeout=SECONDS_TO_END + 2)
    for process in left:
        process.kill()
    assert not left


SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}


@pytest.mark.parametrize("who", ["front", "command"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_the_command_and_all_that_it_started(family, tmp_path, number, who):
    process, processes = family(preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in SIGNALS])
    processes[who].send_signal(number)
    output, errors = process.communicate(timeout=SECONDS_TO_END)
    assert output == f"stopped by {number.value}\n" and not errors
    assert process.returncode == SIGNALS[number]
    with exclusive_lock(tmp_path):
        pass


@pytest.mark.parametrize("who, status", [("front", -9), ("keeper", 137), ("command", 137), ("group", -9)])
def test_a_killed_process_takes_the_others_along(family, tmp_path, who, status):
    process, processes = family()
    if who == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        processes[who].kill()
    _, errors = process.communicate(timeout=SECONDS_TO_END)
    assert process.returncode == status
    assert ("ended by SIGKILL (often: out of memory)" in errors) == (who == "command")
    with exclusive_lock(tmp_path):  # waits for those that are about to end
        assert not any(x.is_running() and x.status() != "zombie" for x in processes.values())


SLOW_KEEPER = """
import time
from trl_larpo import lifetime
be_keeper = lifetime._be_keeper
lifetime._be_keeper = lambda *found: (time.sleep(0.5), be_keeper(*found))
"""


def test_an_orphan_of_the_first_moment_is_the_keepers(family, tmp_path):
    process, processes = family(prelude=SLOW_KEEPER)  # as on a busy machine
    processes["command"].kill()
    process.communicate(timeout=SECONDS_TO_END)
    assert process.returncode == 137 and not is_locked(tmp_path)


@pytest.mark.slow
def test_the_folder_is_locked_until_the_last_process_has_ended(family, tmp_path):
    process, processes = family("trap '' TERM; ")  # the orphan has to be killed
    others = [x for x in processes["keeper"].children(recursive=True) if x != processes["command"]]
    processes["command"].kill()
    assert len(others) == 2 and is_locked(tmp_path)
    while is_locked(tmp_path):
        time.sleep(0.02)
    assert not any(x.is_running() and x.status() != "zombie" for x in others)
    process.communicate(timeout=SECONDS_TO_END)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["front", "command"])
def test_a_command_that_catches_all_exceptions_is_ended_too(tmp_path, who):
    code = (
        "import time; from trl_larpo.lifetime import guard; guard(); print(1, flush=True)\n"
        "while True:\n    try: time.sleep(600)\n    except BaseException: pass"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    front = psutil.Process(process.pid)
    [keeper] = front.children()
    [command] = keeper.children()
    (front if who == "front" else command).terminate()
    assert process.wait(timeout=SECONDS_TO_END) == 143 and not command.is_running()


def test_a_command_that_is_in_a_destructor_stops_after_it():
    code = (
        "import time; from trl_larpo.lifetime import Stopped, guard; guard()\n"
        "class Slow:\n    def __del__(self): print(1, flush=True); time.sleep(600)\n"
        "try:\n    slow = Slow(); del slow; time.sleep(600)\nexcept Stopped as stop: print(stop, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "1\n"
    process.terminate()
    output, errors = process.communicate(timeout=SECONDS_TO_END)
    assert output == "Stopped by SIGTERM.\n" and "Traceback" not in errors


def test_under_nohup_a_closed_terminal_ends_nothing(family):
    process, processes = family(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    for each in processes.values():
        each.send_signal(signal.SIGHUP)
    processes["front"].terminate()
    assert process.communicate(timeout=SECONDS_TO_END)[0] == "stopped by 15\n"


def test_a_command_may_take_time_to_stop():
    code = (
        "import signal, sys, time; from trl_larpo import lifetime; lifetime._TIME_TO_STOP = 0.1; lifetime.guard()\n"
        "lifetime.take_time_to_stop(); signal.signal(signal.SIGTERM, lambda *_: [time.sleep(1), sys.exit(0)])\n"
        "print(1, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.terminate()
    assert process.wait(timeout=SECONDS_TO_END) == 143  # although the command itself ended well


def test_the_exit_status_of_a_command_is_its_own(tmp_path):
    for code, status in (("sys.exit(7)", 7), ("pass", 0), ("1 / 0", 1)):
        code = f"import sys; from trl_larpo.lifetime import guard; guard(); {code}"
        assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == status


def test_forked_workers_end_as_they_always_do():
    code = (
        "import os, signal; from trl_larpo.lifetime import guard; guard()\n"
        "if (pid := os.fork()) == 0: signal.pause()\n"
        "os.kill(pid, signal.SIGTERM); print(os.waitpid(pid, 0)[1])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "15\n"


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_worker_ends_with_its_launcher_also_if_that_ended_first(tmp_path, seconds):
    """A worker imports for seconds before it can ask to end with its launcher."""
    work = f"import time; time.sleep({1 - seconds}); from trl_larpo.lifetime import end_with_launcher as end; end(); "
    (tmp_path / "launcher.py").write_text(
        "import os, subprocess, sys, time\n"
        "from trl_larpo.lifetime import mark_launcher\n"
        "mark_launcher()\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {work + 'time.sleep(60)'!r}])\n"
        "print(worker.pid, flush=True)\n"
        f"time.sleep(2 * {seconds})\n"
        "os._exit(0)\n"
    )
    launcher = subprocess.Popen([sys.executable, str(tmp_path / "launcher.py")], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(launcher.stdout.readline()))
    launcher.wait()
    launcher.stdout.close()
    assert worker.wait(timeout=20) is None  # somebody else's child
    assert not worker.is_running()
