"""Schedulers decide by the exit status whether to start a command again: one event, one status, in every command."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate.commands.launch
import psutil
import pytest
import tiny
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trl_larpo import ConfigError, cli
from trl_larpo.errors import ProcessError
from trl_larpo.lifetime import SECONDS_TO_END, Stopped
from trl_larpo.run import launch

needs_online = pytest.mark.skipif(not tiny.HAS_ONLINE, reason="`larpo online` needs TRL 1.16")

COMMANDS = [name for name, (_, text) in cli.COMMANDS.items() if text is not None]
RERUN, FROM_CHECKPOINT = (
    "Run the same command again to resume; what was saved is kept.",
    "`--resume_from_checkpoint last`",
)
RESUMES = {**dict.fromkeys(("run", "generate", "reward", "recall"), RERUN),
           **dict.fromkeys(("train", "online"), FROM_CHECKPOINT)}  # fmt: skip


def ending_with(error):
    def command(argv):
        raise error

    return command, ""


@pytest.mark.parametrize("command", COMMANDS)
def test_one_event_has_one_status_in_every_command(monkeypatch, capsys, command):
    for error, status, said in (
        (ConfigError("`x` is 3."), 2, "larpo: error: `x` is 3."),
        (ProcessError("Process 1 was ended by SIGKILL.", 137), 137, "larpo: error: Process 1 was ended by SIGKILL."),
        (SystemExit(0), 1, "larpo: error: some code called `sys.exit(0)` before the end"),
        (KeyboardInterrupt(), 130, "larpo: stopped by SIGINT."),
        (Stopped(signal.SIGTERM), 143, "larpo: stopped by SIGTERM."),
        (Stopped(signal.SIGHUP), 129, "larpo: stopped by SIGHUP."),
    ):
        monkeypatch.setitem(cli.COMMANDS, command, ending_with(error))
        assert cli.main([command]) == status
        told = capsys.readouterr().err.strip()
        assert told.startswith(said) and len(told.splitlines()) == 1
        assert (RESUMES.get(command, "to resume") in told) == (
            isinstance(error, KeyboardInterrupt) and command in RESUMES
        )
    for error in (ZeroDivisionError(), SystemExit(3)):
        monkeypatch.setitem(cli.COMMANDS, command, ending_with(error))
        with pytest.raises(type(error)):
            cli.main([command])
    with pytest.raises(SystemExit) as unknown:
        cli.main(["no-such-command"])
    assert unknown.value.code == 2


def child_failed(*codes):
    """Of processes that ended with these exit codes, one after the other."""
    failures = {rank: ProcessFailure(rank, 7, code, "no file") for rank, code in enumerate(codes) if code}
    for failure in failures.values():
        failure.timestamp = 5 - failure.local_rank
    return ChildFailedError("larpo", failures)


@pytest.mark.parametrize("command", ["train", pytest.param("online", marks=needs_online)])
@pytest.mark.parametrize(
    "error, status, said",
    [
        (subprocess.CalledProcessError(2, "larpo"), 2, ""),  # which has said why
        (subprocess.CalledProcessError(-9, "larpo"), 137, "larpo: error: The process was ended by SIGKILL (often:"),
        (child_failed(0, 2), 2, ""),
        (child_failed(1, 1), 1, ""),
        (child_failed(1, -9, -15), 137, "larpo: error: Process 1 was ended by SIGKILL (often: out of memory)."),
        (SignalException("stop", signal.SIGTERM), 143, "larpo: stopped by SIGTERM. With `--resume_from_checkpoint"),
        (SignalException("stop", signal.SIGHUP), 129, "larpo: stopped by SIGHUP."),
    ],
)
def test_a_launcher_hands_on_the_status_of_its_processes(monkeypatch, capsys, tmp_path, command, error, status, said):
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", lambda args: ending_with(error)[0](args))
    monkeypatch.delenv("LARPO_LAUNCHER", raising=False)
    flags = ["--dataset_name", "x", "--output_dir", tmp_path, "--num_processes", 2, "--bf16", False]
    assert cli.main([command, *map(str, flags)]) == status
    assert capsys.readouterr().err.strip().startswith(said)
    assert os.environ.pop("LARPO_LAUNCHER").startswith(f"{os.getpid()}@")


def test_a_stage_has_the_status_of_its_first_failure(tmp_path):
    refused = child_failed(0, 1)
    refused.failures[1].message = {"message": {"message": "ConfigError: `x` is 3."}}
    lost = child_failed(1)
    lost.failures[0].message = {"message": {"message": "LostProcessError: Process 1 of 2 has shown no sign of life."}}
    unexpected = child_failed(1, -15)
    unexpected.failures[0].message = {"message": {"message": "ZeroDivisionError: division by zero"}}
    for error, message, status in (
        (refused, "`x` is 3.", 2),
        (lost, "Process 1 of 2 has shown no sign of life.", 137),
        (unexpected, f"Process 0 of 2: ZeroDivisionError: division by zero (all of it: {tmp_path / 'log'})", 1),
        (child_failed(1, -9), "Process 1 of 2 was ended by SIGKILL (often: out of memory).", 137),
    ):
        assert launch.describe(error, 2, tmp_path / "log") == (message, status)


def test_the_end_of_the_interpreter_is_no_end_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    monkeypatch.setattr(launch.os, "_exit", lambda status: (_ for _ in ()).throw(RuntimeError(f"status {status}")))
    with pytest.raises(RuntimeError, match="status 1"):
        launch.run_as_worker(lambda: sys.exit(0))
    assert "SystemExit: 0" in (tmp_path / "error").read_text()


@pytest.fixture
def slurm_job(tmp_path):
    """Starts the job of the guide with stand-ins for `larpo`, which is given as a script, and for `scontrol`."""
    page = (Path(__file__).parents[1] / "docs/running.md").read_text(encoding="utf-8")
    job = re.search(r"^(#!/bin/bash\n#SBATCH.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "job.sh").write_text(job)

    def start(larpo, restarts=0):
        for name, text in (("larpo", larpo), ("scontrol", f'echo "$@" >> {tmp_path}/requeued')):
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
        return subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize(
    "status, restarts, requeued", [(0, 0, False), (1, 0, False), (2, 0, False), (137, 0, True), (137, 50, False)]
)
def test_a_slurm_job_requeues_what_was_stopped(slurm_job, tmp_path, status, restarts, requeued):
    assert slurm_job(f"exit {status}", restarts).wait(timeout=20) == status
    assert (tmp_path / "requeued").exists() == requeued


def test_a_slurm_job_waits_for_the_run_that_it_stops(slurm_job, tmp_path):
    process = slurm_job("trap 'sleep 0.3; echo stopped; exit 143' TERM; echo began; sleep 60 & wait")
    assert process.stdout.readline() == "began\n"
    process.terminate()
    assert process.stdout.readline() == "stopped\n" and process.wait(timeout=20) == 143
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.slow
def test_a_training_that_is_stopped(tmp_path, tiny_model):
    tiny.lists().to_json(tmp_path / "lists.jsonl")
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", tmp_path / "lists.jsonl", "--output_dir", tmp_path,
             "--max_steps", 100_000, "--use_cpu", "--bf16", False, "--report_to", "none"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_larpo", "train", *map(str, flags)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (found := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=SECONDS_TO_END)
    assert process.returncode == 143
    assert "larpo: stopped by SIGTERM. With `--resume_from_checkpoint last` it resumes" in errors
    assert not psutil.wait_procs(found, timeout=SECONDS_TO_END)[1]
