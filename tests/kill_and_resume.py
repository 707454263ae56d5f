"""
Kills `larpo run` at random moments, runs it again until it is done, and compares with a run that nobody disturbed.

    python tests/kill_and_resume.py --kills 50                       # a small run of its own, in a temporary folder
    python tests/kill_and_resume.py --kills 50 --config it.yaml      # a run of yours, in the current folder

The files must be equal byte for byte, the trained weights to 1e-6. After the last kill the run is left to finish. Kills
come after a random time, drawn so that they fall into every stage.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_run import save_talkative_model, write_project

SAME = ("*.jsonl", "evaluation.json", "selection.json", "prompts.json", "health.json")
MAY_DIFFER = {"timings.jsonl", "training_log.jsonl"}
OUTPUTS = {
    "generate": "samples.jsonl",
    "reward": "rewarded.jsonl",
    "select": "selection.json",
    "reference": "ref_logps.jsonl",
    "train": "model",
    "held_out": "held_out.jsonl",
    "evaluate": "evaluation.json",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--config", help="YAML of a small run")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        if options.config is None:
            options.config = "it.yaml"
            write_project(Path(scratch), save_talkative_model(Path(scratch) / "model"))
            os.chdir(scratch)
        return kill_and_compare(options, rng)


def kill_and_compare(options: argparse.Namespace, rng: random.Random) -> int:
    def start(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "trl_larpo", "run", "--config", options.config, "--output_dir", str(folder)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    undisturbed, killed = Path("undisturbed"), Path("killed")
    for folder in (undisturbed, killed):
        shutil.rmtree(folder, ignore_errors=True)
    finish(start(undisturbed))
    kills = runs = 0
    while kills < options.kills:
        process = start(killed)
        # First until it begins to work, then a random time on
        while process.poll() is None and not (killed / ".lock").exists():
            time.sleep(0.01)
        if runs == 0 or rng.random() < 0.5:
            wait_for_new_file(process, killed, rng)
        time.sleep(rng.uniform(0.0, 3.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            print(f"kill {kills}: {state(killed)}", flush=True)
        else:
            finish(process)
            compare(undisturbed, killed)
            runs += 1
            print(f"run {runs} has ended, equal so far; again from the start", flush=True)
            shutil.rmtree(killed)
    finish(start(killed))
    compare(undisturbed, killed)
    print(f"{kills} kills: files equal to those of the undisturbed run")
    return 0


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"larpo run failed:\n{errors[-3000:]}")


def wait_for_new_file(process: subprocess.Popen, folder: Path, rng: random.Random) -> None:
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
