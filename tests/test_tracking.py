"""What W&B, trackio and TensorBoard get of a run: the numbers of each iteration and its candidates, in one group."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from small_run import change_options, larpo_run, rows_of
from transformers.integrations import TensorBoardCallback

from trl_larpo import ConfigError
from trl_larpo.run import tracking
from trl_larpo.run.options import RunTrainingConfig
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
    found = dict(logged_steps(project / "out/tracking"))
    assert found == {1: pytest.approx(rewards[0]), 2: pytest.approx(rewards[1])}
    assert list((project / "out/iteration_1/tensorboard").rglob("events*"))  # the trainer's


def test_a_tracker_leaves_mixed_precision_to_the_next_iteration(project):
    """accelerate keeps the precision of a process's first Accelerator."""
    change_options(project, report_to="tensorboard", bf16=True)
    assert larpo_run() == 0
    assert not any("report_to" in warning for warning in status_of("out")["warnings"])
    assert list((project / "out/tracking").rglob("events*"))


def logged_steps(folder):
    """Step → reward, of all times that the loop has logged one to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for path in folder.rglob("events*"):
        events = EventAccumulator(str(path)).Reload()
        if "held_out/reward" in events.Tags()["scalars"]:
            found += [(x.step, x.value) for x in events.Scalars("held_out/reward")]
    return sorted(found)


def test_a_restart_logs_what_is_not_logged_yet(project, finished_run, monkeypatch):
    shutil.copytree(finished_run, project / "out")
    numbers = tracking.Tracking.numbers

    def fails_for_two(self, iteration, checks):
        if iteration == 2:
            raise ConnectionError("no route to host")
        return numbers(self, iteration, checks)

    with monkeypatch.context() as patched:
        patched.setattr(tracking.Tracking, "numbers", fails_for_two)
        assert larpo_run("--report_to", "tensorboard", "--mirror", f"file://{project}/store") == 0
    assert [step for step, _ in logged_steps(project / "store/tracking")] == [1], "on another machine, too"
    assert [step for step, _ in logged_steps(project / "out/tracking")] == [1]
    for _ in range(2):
        assert larpo_run("--report_to", "tensorboard") == 0
        assert [step for step, _ in logged_steps(project / "out/tracking")] == [1, 2]
    # A tracker that comes later gets all
    folder = SimpleNamespace(path=project / "out", training=SimpleNamespace(report_to=["trackio"], run_name="mine"))
    later, had = tracking.Tracking(folder), []
    monkeypatch.setattr(later, "_log", lambda iteration, checks, names, run_id: had.append((iteration, names)))
    for iteration in (1, 2, 1):
        later.log(iteration, [])
    assert had == [(1, ["trackio"]), (2, ["trackio"])]


def test_a_missing_package_is_named_before_the_start(project, capsys, monkeypatch):
    find = tracking.importlib.util.find_spec
    monkeypatch.setattr(
        tracking.importlib.util, "find_spec", lambda name, *more: None if name == "trackio" else find(name, *more)
    )
    assert larpo_run("--report_to", "trackio") == 2
    assert "`report_to` names 'trackio', and that package is not installed: pip install" in capsys.readouterr().err
    assert not (project / "out/iteration_0").exists()


def test_an_unknown_tracker_is_named_before_the_start(project, capsys):
    assert larpo_run("--report_to", "foo", "--dry_run") == 2
    assert "`report_to` names 'foo'; the trackers are " in capsys.readouterr().err


@pytest.fixture
def _no_session(tmp_path, monkeypatch):
    """W&B as in a process that has not used it yet, on a machine without a key."""
    import wandb
    from wandb.sdk.lib import wbauth

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "init", lambda **settings: pytest.fail("nothing is opened for a check"))
    wandb.teardown()
    wbauth.unauthenticate_session()
    yield
    wandb.teardown()
    wbauth.unauthenticate_session()


@pytest.mark.parametrize("flags", [(), ("--dry_run",)], ids=["run", "dry run"])
def test_a_missing_key_of_wandb_is_named_before_the_start(project, _no_session, capsys, flags):
    """W&B asks for it when the first training begins, and waits."""
    assert larpo_run("--report_to", "wandb", *flags) == 2
    said = capsys.readouterr().err
    assert "there is no API key: run `wandb login`, set the environment variable WANDB_API_KEY, or" in said
    assert "WANDB_MODE=offline" in said and not (project / "out/iteration_0").exists()


@pytest.mark.parametrize("variable", ["WANDB_MODE", "WANDB_API_KEY", "NETRC", "settings"])
def test_what_wandb_needs_is_found_where_wandb_looks(tmp_path, _no_session, monkeypatch, variable):
    with pytest.raises(ConfigError, match="there is no API key"):
        tracking.check_trackers(["tensorboard", "wandb"])
    if variable == "NETRC":
        (tmp_path / "netrc").write_text(f"machine {wandb_host()} login user password {'k' * 40}\n")
    elif variable == "settings":
        (tmp_path / "wandb-config").mkdir(exist_ok=True)
        (tmp_path / "wandb-config/settings").write_text("[default]\nmode = offline\n")
    else:
        monkeypatch.setenv(variable, "offline" if variable == "WANDB_MODE" else "k" * 40)
    sys.modules["wandb"].teardown()
    tracking.check_trackers(["tensorboard", "wandb"])


def wandb_host() -> str:
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton().settings.base_url.removeprefix("https://")


@pytest.mark.parametrize("variable, value, said", [
    ("WANDB_API_KEY", "short", "'wandb', which cannot be used: .*API key must have"),
    ("WANDB_MODE", "OFFLINE", "WANDB_MODE is 'OFFLINE'; it must be one of offline"),
])  # fmt: skip
def test_settings_of_wandb_that_are_none_are_refused(_no_session, monkeypatch, variable, value, said):
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=said):
        patch.setenv(variable, value)  # until W&B is closed again, which reads it too
        tracking.check_trackers("wandb")


def test_a_tracker_that_fails_does_not_stop_a_training(project, monkeypatch):
    events = []

    def fails(self, args, state, control, **kwargs):
        events.append("begin")
        raise ConnectionError("no route to host")

    monkeypatch.setattr(TensorBoardCallback, "on_train_begin", fails)
    monkeypatch.setattr(TensorBoardCallback, "on_log", lambda self, *args, **kwargs: events.append("log"))
    assert larpo_run("--report_to", "tensorboard") == 0
    said = "`report_to`: tensorboard gets no more numbers of this training (ConnectionError: no route to host)."
    assert sum(said in warning for warning in status_of("out")["warnings"]) == 2, "once for each iteration's training"
    assert events == ["begin", "begin"], "silent after its first error"
    assert list((project / "out/tracking").rglob("events*")), "the loop's own tracker tries on its own"


def test_without_report_to_there_is_no_tracker(tmp_path):
    """transformers 4 takes all that are installed."""
    assert RunTrainingConfig(str(tmp_path), use_cpu=True, bf16=False).report_to == []
    assert RunTrainingConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=None).report_to == []


def test_a_tracker_out_of_reach_does_not_stop_the_run(project, monkeypatch):
    def fails(*args):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tracking.Tracking, "log", fails)
    assert larpo_run("--num_iterations", 1) == 0
    said = "`report_to`: ConnectionError: no route to host The same numbers are in out."
    assert any(said in warning for warning in status_of("out")["warnings"])
