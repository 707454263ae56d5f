"""
Ends everything that a command started when the command ends, however it ends.

`larpo run` starts launchers, workers and servers, each with processes of its own. Whatever ends the command (a signal
of a scheduler, a closed terminal, the kernel when memory runs out), nothing of it may live on: it would write into the
run's folder beside the next start, and hold the GPUs. So on Linux [`guard`] makes three processes of a command:

    front     has the process id that a scheduler knows; passes signals on, and ends with the keeper's exit status
    keeper    adopts processes that lose their parent, and ends all that are left once the command has ended
    command   does the work: this is where `guard` returns

The kernel tells each of them when the one before it has died, so the end of any one is the end of all.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import psutil

_TIME_TO_STOP = 4.0  # seconds from a signal until the command is killed

_TIME_TO_END = 4.0  # seconds that other processes get to end on their own

SECONDS_TO_END = _TIME_TO_STOP + _TIME_TO_END
"""Seconds after which nothing is left of a command that was told to stop."""

if sys.platform == "linux":
    _PARENT_DIED, _NO_HURRY = signal.SIGUSR1, signal.SIGUSR2

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux's <sys/prctl.h>

_LAUNCHER = "LARPO_LAUNCHER"  # environment variable with the process id and machine of what started a worker

_Signals = dict[int, Callable[[int, Any], object]]

_to_keeper: socket.socket | None = None


class Stopped(KeyboardInterrupt):
    """
    A signal asked the command to stop.

    Args:
        number: The signal.
    """

    def __init__(self, number: int):
        super().__init__(f"Stopped by {signal.Signals(number).name}.")
        self.number = number

    def __reduce__(self):
        return type(self), (self.number,), vars(self)


def stop_in(error: BaseException | None) -> KeyboardInterrupt | None:
    """The stop that an exception is, or that a group of exceptions holds: tasks that wait for others make groups."""
    while isinstance(error, BaseExceptionGroup):
        stops = error.subgroup(KeyboardInterrupt)
        error = None if stops is None else stops.exceptions[0]
    return error if isinstance(error, KeyboardInterrupt) else None


def guard(how_to_resume: str = "") -> None:
    """
    Puts this process, which must not have any threads yet, under a keeper, and makes signals raise [`Stopped`].

    The exit status is the command's; 128 plus the number of the signal where a signal ended it.

    Args:
        how_to_resume: What the message about a killed command says at its end.
    """
    global _to_keeper
    if sys.platform != "linux":
        _stop_on_signals()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    front, (ours, keepers) = os.getpid(), socket.socketpair()
    awaited = [*_asking(), _NO_HURRY]
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)  # until those who answer them are there
    _adopt_orphans()  # before there can be any
    if keeper := os.fork():
        _be_front(keeper, awaited)
    _end_with(front, _PARENT_DIED)
    keeper = os.getpid()
    _adopt_orphans()
    if command := os.fork():
        ours.close()
        _be_keeper(command, awaited, how_to_resume)
    _end_with(keeper, signal.SIGKILL)
    keepers.close()
    _to_keeper = ours
    _stop_on_signals(keeper)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)


def keep_open(descriptor: int) -> None:
    """Keeps a file open until nothing is left of the command: what locks a folder must not end before its workers."""
    if _to_keeper is not None:
        # It waits in the socket, which only the keeper could empty, and the keeper never does
        socket.send_fds(_to_keeper, [b" "], [descriptor])


def take_time_to_stop() -> None:
    """A signal leads to no kill any more: the answer to it, such as saving a checkpoint, may take its time."""
    if _to_keeper is not None:
        os.kill(os.getppid(), _NO_HURRY)


def exit_status(code: int) -> int:
    """The exit status for a return code as `subprocess` gives it: 128 plus the number of a signal, as in a shell."""
    return code if code >= 0 else 128 - code


def ended_by(number: int) -> str:
    """Says that a process was ended by a signal, and what that often means."""
    name = signal.Signals(number).name
    return f"was ended by {name}" + (" (often: out of memory)" if name == "SIGKILL" else "")


def launch_workers() -> None:
    """Ends this process with the one that started it, and is a launcher of [`end_with_launcher`]."""
    _end_with(os.getppid(), signal.SIGKILL)
    mark_launcher()


def mark_launcher() -> None:
    """Lets what this process starts know that it is a launcher of ours."""
    os.environ[_LAUNCHER] = _on_this_machine(os.getpid())


def is_launched() -> bool:
    """Whether a launcher of ours has started this process."""
    return os.environ.get(_LAUNCHER) == _on_this_machine(os.getppid())


def _on_this_machine(pid: int) -> str:
    return f"{pid}@{socket.gethostname()}"


def end_with_launcher() -> None:
    """Ends this process with the launcher that started it, unless that is somebody else's; at once if it has ended."""
    if is_launched():
        _end_with(os.getppid(), signal.SIGKILL)
        return
    pid, _, host = os.environ.get(_LAUNCHER, "").partition("@")
    if host == socket.gethostname() and not psutil.pid_exists(int(pid)):  # this process is an orphan
        os.kill(os.getpid(), signal.SIGKILL)


def end_now(status: int) -> NoReturn:
    """Ends this process without the interpreter's last clean-up, which takes seconds after large imports."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def end_family(pid: int, seconds: float = _TIME_TO_END) -> None:
    """
    Ends a process and all that it started; also if it has ended before, where it was the first of a session.

    Args:
        pid: The process.
        seconds: What they get to end on their own.
    """
    family = _of_session(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        family = [first, *first.children(recursive=True), *family]
    _end(list(dict.fromkeys(family)), seconds)


def _of_session(number: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter() if hasattr(os, "getsid") else ():
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(process.pid) == number:
                found.append(process)
    return found


def _asking() -> list[int]:
    """Signals that ask for an end. One that is ignored stays so: `nohup` ignores SIGHUP."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if hasattr(signal, "SIGHUP") else (signal.SIGINT,)
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def _handle(handlers: _Signals) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


# The command


def _stop_on_signals(keeper: int | None = None) -> None:
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _asking()}

    def stop(number: int, frame: Any) -> None:
        _handle(dict.fromkeys(before, lambda *_: None))  # a second one would end the clean-up
        if hasattr(signal, "SIGHUP") and number == signal.SIGHUP:
            _leave_terminal()
        if keeper is not None:  # which ends this process if some code catches the exception, and goes on
            os.kill(keeper, number)
        raise Stopped(number)

    _handle(dict.fromkeys(before, stop))
    _stop_again_where_it_is_lost()
    if hasattr(os, "register_at_fork"):
        _leave_forks_alone(before)


def _stop_again_where_it_is_lost() -> None:
    """Python drops an exception that is raised in a destructor. The next one is raised in a moment, outside of it."""
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        stopped = unraisable.exc_value
        if not isinstance(stopped, Stopped):
            report(unraisable)
            return

        def stop(number: int, frame: Any) -> None:
            _handle({number: lambda *_: None})
            raise stopped

        _handle({stopped.number: stop})
        threading.Timer(0.01, os.kill, (os.getpid(), stopped.number)).start()

    sys.unraisablehook = hook


def _leave_forks_alone(handlers: _Signals) -> None:
    """Lets workers of data loaders and pools end as they always do."""

    def mask(how: int) -> None:
        signal.pthread_sigmask(how, handlers)

    def restore() -> None:
        _handle(handlers)
        mask(signal.SIG_UNBLOCK)

    # Blocked meanwhile: a signal that comes before the handlers are the old ones would be lost
    os.register_at_fork(
        before=lambda: mask(signal.SIG_BLOCK),
        after_in_parent=lambda: mask(signal.SIG_UNBLOCK),
        after_in_child=restore,
    )


def _leave_terminal() -> None:
    """What is printed after the terminal is gone would raise an error."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            if os.isatty(descriptor):
                os.dup2(nowhere, descriptor)


# The front


def _be_front(keeper: int, awaited: list[int]) -> NoReturn:
    def pass_on(number: int, frame: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, number)

    _handle(dict.fromkeys(_asking(), pass_on))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
    status = _wait_for(keeper)
    _end_descendants()  # of a keeper that was killed
    os._exit(exit_status(os.waitstatus_to_exitcode(status)))


# The keeper


def _be_keeper(command: int, awaited: list[int], how_to_resume: str) -> NoReturn:
    os.setpgid(0, 0)  # what is sent to the group of the command must not end the one who cleans up
    asked: list[int] = []
    in_a_hurry = True

    def kill(*_: Any) -> None:
        asked.append(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(command, signal.SIGKILL)

    def take_time(*_: Any) -> None:
        nonlocal in_a_hurry
        in_a_hurry = False

    def stop(number: int, frame: Any) -> None:
        if not asked:
            asked.append(number)
            signal.setitimer(signal.ITIMER_REAL, _TIME_TO_STOP if in_a_hurry else 0)
            with contextlib.suppress(ProcessLookupError):
                os.kill(command, number)

    _handle({_PARENT_DIED: kill, _NO_HURRY: take_time, signal.SIGALRM: kill, **dict.fromkeys(_asking(), stop)})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
    status = _wait_for(command)
    signal.setitimer(signal.ITIMER_REAL, 0)
    _end_descendants()
    if os.WIFSIGNALED(status) and not asked:
        with contextlib.suppress(OSError):
            print(f"larpo: error: the command {ended_by(os.WTERMSIG(status))}.{how_to_resume}", file=sys.stderr)
    code = exit_status(os.waitstatus_to_exitcode(status))
    os._exit(128 + asked[0] if asked and (code or not in_a_hurry) else code)


def _wait_for(child: int) -> int:
    """Waits for a child, and for adopted ones meanwhile. Returns how it ended, as `os.waitpid` does."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return status


def _end_descendants() -> None:
    """Ends all that is below this process. It adopts orphans, so nothing gets away."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that end leave nothing that must be waited for
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # but for those that have ended already
            pass
    while processes := psutil.Process().children(recursive=True):
        _end(processes, _TIME_TO_END)


def _end(processes: Iterable[psutil.Process], seconds: float) -> None:
    """Asks processes to end, and kills those that did not within some seconds."""
    remaining = list(processes)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, remaining = psutil.wait_procs(remaining, timeout=seconds)


# Linux


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _adopt_orphans() -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _end_with(parent: int, number: int) -> None:
    """Sends this process a signal when its parent dies."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it has died already
            os.kill(os.getpid(), number)
