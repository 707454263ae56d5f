"""The study of one pass runs, shares samples between its arms, resumes, and its tasks are sound."""

import json
import sys
from pathlib import Path

import pytest
from small_run import rows_of

FOLDER = Path(__file__).parents[1] / "examples" / "studies" / "one_pass"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    import study
    import tasks

    yield study, tasks
    for name in ("study", "tasks"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_two_arms_of_a_tiny_task(project, study, talkative_model, monkeypatch, capsys):
    study, tasks = study
    rows = [{"prompt": [{"role": "user", "content": f"{i} why is the dog blue"}]} for i in range(16)]
    task = tasks.Task(rows[:8], rows[8:], "run_rewards:vowels", 24)
    monkeypatch.setattr(study, "TASKS", {"tiny": lambda: task})
    monkeypatch.setattr(study, "MODEL", talkative_model)
    monkeypatch.setattr(study, "SETTINGS", study.SETTINGS | {"use_cpu": True, "bf16": False, "learning_rate": 1e-3})
    words = ["study.py", "--tasks", "tiny", "--seeds", "0", "1", "--arms", "default", "sums", "--results", "results"]
    monkeypatch.setattr(sys, "argv", words)
    study.main()
    assert capsys.readouterr().out.count("| tiny | ") == 6  # two arms of two seeds, and their means
    found = {path.name: json.loads(path.read_text()) for path in Path("results").glob("*.json")}
    assert len(found) == 4
    default, sums = (found[f"tiny_seed0_{arm}.json"] for arm in ("default", "sums"))
    assert default["start"] == sums["start"] and default["end"] != sums["end"]
    runs = Path("outputs/one_pass/tiny_seed0")
    samples = [rows_of(runs / arm / "iteration_1/samples.jsonl") for arm in ("default", "sums")]
    assert samples[0] == samples[1] and len(samples[0]) == 8
    before = {path: path.stat().st_mtime_ns for path in Path("results").iterdir()}
    study.main()
    assert before == {path: path.stat().st_mtime_ns for path in Path("results").iterdir()}


def test_tasks_hold_out_what_they_do_not_train_on(study):
    study, tasks = study
    for name, make in tasks.TASKS.items():
        task = make()
        assert len(task.train) >= study.NUM_PROMPTS and len(task.held_out) >= study.NUM_HELD_OUT, name
        assert not {str(row) for row in task.train} & {str(row) for row in task.held_out}
    assert not set(tasks.TOPICS[: tasks.NUM_TRAIN_TOPICS]) & set(tasks.TOPICS[tasks.NUM_TRAIN_TOPICS :])
