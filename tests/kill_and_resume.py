"""
Kills `larpo run` at random moments, runs it again until it is done, and compares with a run that nobody disturbed.

    python tests/kill_and_resume.py --kills 50                          # in process, two processes, servers by turns
    python tests/kill_and_resume.py --kills 50 --modes servers
    python tests/kill_and_resume.py --kills 50 --config it.yaml         # a run of yours, in the current folder

SIGKILL, SIGTERM, SIGHUP and SIGINT come after a random time, drawn so that they fall into every stage, to the process
that was started, to the one that works, to the keeper or to the group of them. The next start follows at once. It may
not begin while any process of the killed run is left, which must be within ten seconds. The files must be equal byte
for byte, the trained weights to 1e-6. After the last kill the run is left to finish.

Each start is a fork of this process, which has imported what a run needs: that takes longer than a small run. What the
run starts itself (launchers, workers, servers) are processes of their own. With `--new_interpreters` all are.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from small_run import change_options, save_talkative_model, write_project

import trl_larpo.run.loop  # noqa: F401 - what a run needs
from trl_larpo import LarPOTrainer, cli  # noqa: F401

SAME = ("*.jsonl", "evaluation.json", "selection.json", "prompts.json", "health.json")
MAY_DIFFER = {"timings.jsonl", "training_log.jsonl"}
OUTPUTS = {
    "generate": "samples.jsonl",
    "reward": "rewarded.jsonl",
    "select": "selection.json",
    "reference": "ref_logps.jsonl",
    "train": "model",
    "held_out_samples": "held_out_samples.jsonl",
    "held_out": "held_out.jsonl",
    "evaluate": "evaluation.json",
}
FAKE_SERVER = f"{sys.executable} {Path(__file__).resolve().with_name('fake_server.py')} --port {{port}} {{model}}"
MODES = {  # options of the small run
    "in_process": {},
    # Of the stages that train: each start of two processes takes longer than all else
    "two_processes": {"train_processes": 2, "num_iterations": 1, "per_device_train_batch_size": 1},
    "servers": {"server_command": FAKE_SERVER, "num_servers": 2},
}
STATUS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
SECONDS_TO_END = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--config", help="YAML of a small run")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES], help="share the kills equally")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--new_interpreters", action="store_true", help="start each run as a user does")
    options = parser.parse_args()
    rng, run = random.Random(options.seed), NewRun if options.new_interpreters else ForkedRun
    if options.config is not None:
        kill_and_compare(options.config, options.kills, rng, run)
        return 0
    torch.set_num_threads(1)  # a fork has none of the others
    scratch = tempfile.mkdtemp()  # not one that is removed at the exit of any fork
    write_project(Path(scratch), save_talkative_model(Path(scratch) / "model"))
    original = (Path(scratch) / "it.yaml").read_text()
    os.chdir(scratch)
    for number, mode in enumerate(options.modes):
        Path("it.yaml").write_text(original)
        change_options(Path(), **MODES[mode])
        kills = options.kills * (number + 1) // len(options.modes) - options.kills * number // len(options.modes)
        print(f"{mode}: {kills} kills", flush=True)
        kill_and_compare("it.yaml", kills, rng, run)
        print(f"{mode}: equal after {kills} kills", flush=True)
    shutil.rmtree(scratch)
    print(f"{options.kills} kills: files equal to those of the undisturbed runs")
    return 0


class NewRun:
    """`larpo run` in a new interpreter, in a group of its own, so that the group can be killed."""

    def __init__(self, config: str, folder: Path):
        self.words = ["larpo", "run", "--config", config, "--output_dir", str(folder)]
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self.errors = Path(file.name)
        self.returncode: int | None = None
        self.pid = self.start()

    def start(self) -> int:
        with open(self.errors, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trl_larpo", *self.words[1:]],
                stdout=subprocess.DEVNULL,
                stderr=file,
                process_group=0,
                preexec_fn=answer_signals,
            )
        return self.process.pid

    def poll(self) -> int | None:
        self.returncode = self.process.poll()
        return self.returncode

    def communicate(self, timeout: float = float("inf")) -> str:
        """Waits for the end. Returns what was written to stderr so far: children may live on."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"Process {self.pid} is there after {timeout} s.")
            time.sleep(0.01)
        text = self.errors.read_text(errors="replace")
        self.errors.unlink()
        return text


class ForkedRun(NewRun):
    """`larpo run` in a fork of this process."""

    def start(self) -> int:
        if pid := os.fork():
            return pid
        status = 1
        try:
            os.setpgid(0, 0)
            answer_signals()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(self.errors, os.O_WRONLY | os.O_APPEND), 2)
            sys.argv = self.words
            status = cli.main()
        except BaseException:  # as the interpreter does at the end
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def answer_signals() -> None:
    """`&` and `nohup` would let a run ignore them."""
    for number in STATUS:
        signal.signal(number, signal.SIG_DFL)


def kill_and_compare(config: str, num_kills: int, rng: random.Random, run: type[NewRun]) -> None:
    def start(folder: Path) -> NewRun:
        return run(config, folder)

    undisturbed, killed = Path("undisturbed"), Path("killed")
    for folder in (undisturbed, killed):
        shutil.rmtree(folder, ignore_errors=True)
    finish(start(undisturbed))
    kills = runs = 0
    process, before = start(killed), []
    while kills < num_kills:
        await_lock(process, killed, before)
        if runs == 0 or rng.random() < 0.5:
            wait_for_new_file(process, killed, rng)
        time.sleep(rng.uniform(0.0, 3.0))
        if process.poll() is None:
            before, what = kill(process, rng)
            kills += 1
            print(f"kill {kills}, {what}: {state(killed)}", flush=True)
        else:
            finish(process)
            compare(undisturbed, killed)
            runs, before = runs + 1, []
            print(f"run {runs} has ended, equal so far; again from the start", flush=True)
            shutil.rmtree(killed)
        process = start(killed)
    await_lock(process, killed, before)
    finish(process)
    compare(undisturbed, killed)


def kill(process: NewRun, rng: random.Random) -> tuple[list[psutil.Process], str]:
    """Sends a signal to a process of the run. Returns all that the run had, and what was done."""
    front = psutil.Process(process.pid)
    family = [front, *front.children(recursive=True)]
    number = rng.choice([signal.SIGKILL, *STATUS])
    whom = rng.choice(["front", "front", "group", "command", *(["keeper"] if number == signal.SIGKILL else [])])
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if whom == "group":
            os.killpg(process.pid, number)
        else:
            keeper = front.children()[0] if whom != "front" else None
            {
                "front": lambda: front,
                "keeper": lambda: keeper,
                "command": lambda: min(keeper.children(), key=lambda x: x.create_time()),
            }[whom]().send_signal(number)
    began = time.monotonic()
    errors = process.communicate(timeout=SECONDS_TO_END)
    expected = {0, STATUS.get(number, 137), -signal.SIGKILL if number == signal.SIGKILL else 0}
    if process.returncode not in expected or "Traceback" in errors:
        shown = errors[errors.find("Traceback") :][:6000] if "Traceback" in errors else errors[-3000:]
        raise SystemExit(f"{number.name} to the {whom}: exit status {process.returncode}\n{shown}")
    return family, f"{number.name} to the {whom}, {time.monotonic() - began:.1f} s"


def await_lock(process: NewRun, folder: Path, before: list[psutil.Process]) -> None:
    """Waits until the run begins to work. Nothing of the one before may be left then."""
    killed, said = time.monotonic(), not before
    while process.poll() is None and not is_working(process, folder):
        left = alive(before)
        if left and time.monotonic() - killed > SECONDS_TO_END:
            raise SystemExit(f"Left over after {SECONDS_TO_END} s: {left}")
        if not left and not said:
            print(f"  its {len(before)} processes are gone after {time.monotonic() - killed:.1f} s more", flush=True)
            said = True
        time.sleep(0.01 if left else 0.05)
    if process.poll() is None and (left := alive(before)):
        raise SystemExit(f"A second writer: {left} are there while another process has the lock")


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def is_working(process: NewRun, folder: Path) -> bool:
    """Whether a process of this run has locked the folder."""
    with contextlib.suppress(OSError, ValueError, IndexError, psutil.NoSuchProcess):
        owner = int((folder / ".lock").read_text().split()[1])
        return owner in {x.pid for x in psutil.Process(process.pid).children(recursive=True)}
    return False


def finish(process: NewRun) -> None:
    errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"larpo run failed:\n{errors[-3000:]}")


def wait_for_new_file(process: NewRun, folder: Path, rng: random.Random) -> None:
    """Waits until a few more files are there than now, so that kills come near writing."""
    target = count_files(folder) + rng.randint(1, 4)
    while process.poll() is None and count_files(folder) < target:
        time.sleep(0.002)


def count_files(folder: Path) -> int:
    """Files and folders. Unlike `rglob`, `os.walk` passes over a folder that is removed while it looks."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def state(folder: Path) -> str:
    """What there is after a kill, in a few words."""
    done = [
        f"{path.name}: {stage}"
        for path in sorted(folder.glob("iteration_*"))
        for stage, file in OUTPUTS.items()
        if (path / file).exists()
    ]
    partial = [path.name for path in folder.rglob("*.partial*")] + [path.name for path in folder.rglob("checkpoint-*")]
    return f"after {done[-1] if done else 'nothing'}; unfinished: {', '.join(sorted(partial)) or 'nothing'}"


def compare(expected: Path, found: Path) -> None:
    names = sorted(
        path.relative_to(expected)
        for pattern in SAME
        for path in expected.rglob(pattern)
        if path.name not in MAY_DIFFER
    )
    if len(names) < 10:
        raise SystemExit(f"Only {len(names)} files to compare.")
    for name in names:
        if name.name == "evaluation.json" and name.parent.name != "iteration_0":
            continue  # holds a KL of two sets of weights; its samples and rewards are compared
        if name.name in ("health.json", "ref_logps.jsonl"):
            continue  # computed from the weights, which are compared below
        if (expected / name).read_bytes() != (found / name).read_bytes():
            raise SystemExit(f"{name} differs.")
    for weights in expected.rglob("model.safetensors"):
        before, after = load_file(weights), load_file(found / weights.relative_to(expected))
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-6, msg=f"{weights}: {name} differs")
    if leftovers := [str(path) for path in found.rglob("*.partial*")]:
        raise SystemExit(f"Left over: {leftovers}")


if __name__ == "__main__":
    sys.exit(main())
