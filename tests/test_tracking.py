"""What W&B, trackio and TensorBoard get of a run: the numbers of each iteration and its candidates, in one group."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest
from small_run import change_options, larpo_run, rows_of

from trl_larpo.run import tracking
from trl_larpo.run.status import status_of

pytestmark = pytest.mark.slow

pytest.importorskip("wandb")
pytest.importorskip("trackio")
pytest.importorskip("tensorboard")


def test_every_tracker_gets_the_numbers_of_each_iteration(project):
    change_options(project, report_to=["wandb", "trackio", "tensorboard"], run_name="mine")
    # In a process of its own, because trackers keep threads and settings
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(project / "trackio")}
    command = [sys.executable, "-m", "trl_larpo", "run", "--config", "it.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING tracking" not in done.stdout
    rewards = [
        json.loads((project / f"out/iteration_{i}/evaluation.json").read_text())["reward"]["mean"] for i in (1, 2)
    ]

    # W&B: a run of the trainer's for each iteration, and the loop's, which goes on in the same run
    runs = {path.name.split("-")[-1] for path in (project / "wandb").glob("offline-run-*")}
    assert len(runs) == 3 and json.loads((project / "out/tracking.json").read_text())["run_id"] in runs
    contents = b"".join(path.read_bytes() for path in (project / "wandb").rglob("*.wandb"))
    for text in (b"mine-loop", b"mine-iteration-1", b"mine-iteration-2", b"held_out/reward", b"ranking/ndcg"):
        assert text in contents, text
    for iteration in (1, 2):
        [table] = (project / "wandb").rglob(f"candidates_{iteration}_*.table.json")
        rows = json.loads(table.read_text())["data"]
        lists = rows_of(project / f"out/iteration_{iteration}/lists.jsonl")
        assert len(rows) == sum(len(row["completions"]) for row in lists)
        assert rows[0][0] == iteration and rows[0][3] == next(r for row in lists for r in row["rewards"])

    # trackio
    [database] = (project / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select step, metrics from metrics where run_name = 'mine-loop'")
    logged = [(step, json.loads(values)) for step, values in rows]
    numbers = {step: values["held_out/reward"] for step, values in logged if "held_out/reward" in values}
    assert numbers == {1: rewards[0], 2: rewards[1]}
    assert sum("candidates" in values for _, values in logged) == 2

    # TensorBoard
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in (project / "out/tracking").rglob("events*"):
        events = EventAccumulator(str(path)).Reload()
        if "held_out/reward" in events.Tags()["scalars"]:
            found |= {x.step: x.value for x in events.Scalars("held_out/reward")}
    assert found == {1: pytest.approx(rewards[0]), 2: pytest.approx(rewards[1])}
    assert list((project / "out/iteration_1/tensorboard").rglob("events*"))  # the trainer's


def test_a_tracker_leaves_mixed_precision_to_the_next_iteration(project):
    """accelerate keeps the precision of a process's first Accelerator."""
    change_options(project, report_to="tensorboard", bf16=True)
    assert larpo_run() == 0
    assert not any("report_to" in warning for warning in status_of("out")["warnings"])
    assert list((project / "out/tracking").rglob("events*"))


def test_a_missing_package_is_named_before_the_start(project, capsys, monkeypatch):
    find = tracking.importlib.util.find_spec
    monkeypatch.setattr(
        tracking.importlib.util, "find_spec", lambda name, *more: None if name == "trackio" else find(name, *more)
    )
    assert larpo_run("--report_to", "trackio") == 2
    assert "`report_to` names 'trackio', and that package is not installed: pip install" in capsys.readouterr().err
    assert not (project / "out/iteration_0").exists()


def test_a_tracker_out_of_reach_does_not_stop_the_run(project, monkeypatch):
    def fails(*args):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tracking.Tracking, "log", fails)
    assert larpo_run("--num_iterations", 1) == 0
    said = "`report_to`: ConnectionError: no route to host The same numbers are in out."
    assert any(said in warning for warning in status_of("out")["warnings"])
