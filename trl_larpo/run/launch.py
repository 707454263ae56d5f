"""
Starts a command in several processes, and says in one line what went wrong in them.

`larpo run` starts each stage that runs a model through this, in a process of its own: through accelerate where there is
a configuration of its (DeepSpeed, FSDP, several machines), else through torchrun, which also works on CPUs.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from torch import distributed
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler

from ..errors import ConfigError, DataError, LarPOError, LostProcessError
from ..lifetime import end_now, ended_by, exit_status, launch_workers
from ..storage import write_text

_EXPECTED_END = signal.SIGTERM  # with which the others are stopped when one has failed


def launch(argv: list[str]) -> int:
    """`larpo launch`: runs `larpo STAGE ...` in several processes. Returns the exit status of the one that failed."""
    parser = argparse.ArgumentParser(prog="larpo launch", allow_abbrev=False)
    parser.add_argument("--num_processes", type=int, required=True)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--mixed_precision", default="no", help="that of the run, whatever accelerate's file says")
    parser.add_argument("--log", required=True, help="file for what the processes say of their errors")
    parser.add_argument("--message", required=True, help="file for the one line of it that a person should read")
    options, words = parser.parse_known_args(argv)
    launch_workers()
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their reports are longer than ours, and say less
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.num_processes)))
    log = Path(options.log)
    log.unlink(missing_ok=True)
    try:
        if options.accelerate_config:
            from accelerate.commands.launch import launch_command, launch_command_parser

            flags = ["--config_file", options.accelerate_config, "--num_processes", str(options.num_processes)]
            flags += ["--mixed_precision", options.mixed_precision]
            launch_command(launch_command_parser().parse_args([*flags, "-m", "trl_larpo", *words]))
        else:
            flags = ["--standalone", "--nproc_per_node", str(options.num_processes)]
            torchrun.run(torchrun.get_args_parser().parse_args([*flags, "-m", "trl_larpo", *words]))
    except ChildFailedError as error:
        message, status = describe(error, options.num_processes, log)
        write_text(Path(options.message), message)
        return status
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def describe(error: ChildFailedError, num_processes: int, log: Path) -> tuple[str, int]:
    """What went wrong first, and the exit status for it. All else that was said is kept in the log."""
    rank, failure = first_failure(error)
    who, status = f"Process {rank} of {num_processes}", exit_status(failure.exitcode)
    if failure.exitcode < 0:
        return f"{who} {ended_by(-failure.exitcode)}.", status
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        for other, each in _failures(error):
            file.write(f"Process {other}, exit status {each.exitcode}:\n{_text(each.message, whole=True)}\n\n")
    message = _text(failure.message)
    for kind in (ConfigError, DataError, LarPOError, LostProcessError):
        if message.startswith(f"{kind.__name__}: "):  # already says what to do
            return message.removeprefix(f"{kind.__name__}: "), kind.exit_status
    return f"{who}: {message} (all of it: {log})", status


def first_failure(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """Number of the process that failed first, and how. The others failed because of it."""
    failures = _failures(error)
    # When a process is killed, the others fail in their communication: the cause is the kill
    killed = [(rank, failure) for rank, failure in failures if failure.exitcode < 0]
    return min(killed or failures or list(error.failures.items()), key=lambda pair: pair[1].timestamp)


def _failures(error: ChildFailedError) -> list[tuple[int, ProcessFailure]]:
    return [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode != -_EXPECTED_END]


def _text(message: str | dict, whole: bool = False) -> str:
    """The message of an error file; whole with its stack trace."""
    while isinstance(message, dict):
        if whole and "extraInfo" in message:
            return str(message["extraInfo"].get("py_callstack", message))
        message = message.get("message", str(message))
    return message


def run_as_worker(function) -> int:
    """Runs a function in one of several processes; its error goes to the launcher, not to the terminal."""
    handler = get_error_handler()
    handler.initialize()
    try:
        function()
    except (Exception, SystemExit) as error:  # `sys.exit(0)` in somebody's code is no end of the work
        handler.record_exception(error)
        from ..waiting import tell_others  # here, as the launcher has no use for accelerate

        tell_others(error)  # those on other machines; after the record, from which the launcher has the cause
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            raise
        sys.stdout.flush()
        os._exit(1)  # not through the end of the process group, which would wait for the others
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave()
    return 0


def leave() -> NoReturn:
    """
    Ends one of several processes that has done its work.

    The process group is closed, and what libraries have to do at the exit is done (trackers send what they still hold).
    Then the process ends without the interpreter's last clean-up: in it one process in some hundred aborts, as threads
    of the communication are still there.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
    end_now(0)
