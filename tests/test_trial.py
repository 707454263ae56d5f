"""`larpo run --try N`: one short iteration in a folder of its own, and what it tells of the whole run."""

import json
from types import SimpleNamespace

import pytest
from small_run import change_options, larpo_run, rows_of

from trl_larpo import LarPOError, cli
from trl_larpo.locks import exclusive_lock
from trl_larpo.prompts import Prompt
from trl_larpo.run import trial as trial_module
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.options import RunConfig, RunModelConfig, RunTrainingConfig
from trl_larpo.run.plan import num_steps
from trl_larpo.run.stages import STAGES
from trl_larpo.run.trial import as_text, forecast, trial_of
from trl_larpo.storage import write_json, write_jsonl


@pytest.fixture
def runs(tmp_path):
    """A run of 2 iterations of 100 prompts, and its trial of 10 prompts as it is when it has ended."""
    whole = RunFolder(
        RunConfig(
            prompts=["p.jsonl"], num_iterations=2, num_held_out=30, temperature=[1.0, 0.9], reward_funcs=["gsm8k"]
        ),
        RunTrainingConfig(str(tmp_path / "out"), per_device_train_batch_size=2, report_to="none", use_cpu=True),
        RunModelConfig(model_name_or_path="model"),
    )
    whole.prompts = [Prompt.of(f"prompt {i}") for i in range(100)]
    whole.held_out = [Prompt.of(f"held out {i}") for i in range(30)]
    trial = trial_of(whole, 10)
    trial.iteration(1).mkdir(parents=True)
    times = [{"iteration": i, "stage": "held_out_samples", "seconds": 25.0, "work": 20.0} for i in (0, 1)]
    times += [{"iteration": i, "stage": "held_out", "seconds": 4.0, "work": 4.0} for i in (0, 1)]
    times += [{"iteration": i, "stage": "evaluate", "seconds": 5.0, "work": 2.0} for i in (0, 1)]
    for name, seconds, work in (
        ("generate", 110.0, 50.0), ("reward", 20.0, 20.0), ("select", 1.0, 1.0), ("reference", 13.0, 8.0),
        ("train", 70.0, 40.0),
    ):  # fmt: skip
        times.append({"iteration": 1, "stage": name, "seconds": seconds, "work": work})
    write_jsonl(trial.path / "timings.jsonl", times)
    folder = trial.iteration(1)
    (folder / "samples.jsonl").write_text("s" * 10_000)
    (folder / "held_out.jsonl").write_text("h" * 500)
    write_jsonl(folder / "training_log.jsonl", [{"step": 4, "loss": 1.0}, {"step": 4, "train_loss": 1.0}])
    write_json(folder / "selection.json", {"lists": 8})
    checks = {"truncated": (0.5, False), "tied_lists": (0.2, True), "length": (1.0, True)}
    write_json(
        folder / "health.json",
        [{"name": n, "value": v, "ok": ok, "limit": "less", "meaning": "Too much."} for n, (v, ok) in checks.items()],
    )
    return SimpleNamespace(whole=whole, trial=trial)


@pytest.fixture
def models(monkeypatch):
    """Bytes of the models of a run; set as `models.size`."""
    found = SimpleNamespace(size=0)
    monkeypatch.setattr(trial_module, "bytes_of_models", lambda folder, config: found.size)
    monkeypatch.setattr(trial_module.AutoConfig, "from_pretrained", lambda *args, **kwargs: None)
    return found


def test_the_trial_is_one_short_iteration_of_the_same_run(runs):
    whole, trial = runs.whole, runs.trial
    assert [prompt.text for prompt in trial.prompts] == [f"prompt {i}" for i in range(10)]
    assert len(trial.held_out) == 10 and str(trial.path).endswith("/out-try")
    changed = {name for name, value in trial.configuration().items() if value != whole.configuration()[name]}
    assert changed == {
        "output_dir", "num_iterations", "temperature", "num_held_out", "stop_on", "max_steps", "save_strategy",
    }  # fmt: skip
    trial.options.check()
    assert whole.training.max_steps == -1 and trial.training.max_steps == 4


def test_time_grows_with_the_work_and_not_with_loading(runs, models):
    seconds = forecast(runs.whole, runs.trial)["seconds"]
    assert set(seconds) == set(STAGES)
    assert seconds["generate"] == [110, 2 * (60 + 50 * 10)]
    assert seconds["reward"] == [20, 2 * 200] and seconds["select"] == [1, 2 * 10]
    assert seconds["reference"] == [13, 2 * (5 + 80)]
    assert seconds["train"] == [70, 2 * (30 + 10 * 120)]  # 80 lists by 2, 3 times; 10 seconds a step
    assert seconds["held_out"] == [8, 3 * 12]
    # 30 prompts in place of 10, before and after each iteration
    assert seconds["held_out_samples"] == [50, 3 * (5 + 60)]
    assert seconds["evaluate"] == [10, 5 + 2 * (3 + 6)]


def test_steps_are_rounded_up_in_each_epoch(runs):
    assert num_steps(runs.whole, 3) == 2 * 3  # 3 lists by 2, 3 times; rounded once it would be 5


def test_memory_makes_lists_longer(runs, models):
    # Rows were counted, and not their candidates
    runs.whole.options.memory = "all"
    (runs.trial.iteration(1) / "rewarded.jsonl").write_text("r" * 10_000)
    found = forecast(runs.whole, runs.trial)
    # In the second iteration each prompt has the candidates of both
    assert found["disk"]["files"] == (2 + 1) * 100 * 1000 + 3 * 100 * 1000 + 3 * 30 * 50
    assert found["seconds"]["select"] == [1, 3 * 10] and found["seconds"]["generate"] == [110, 2 * (60 + 50 * 10)]
    assert found["seconds"]["reference"] == [13, 2 * 5 + 3 * 80]
    assert found["seconds"]["train"] == [70, 2 * 30 + 3 * 10 * 120]
    runs.whole.options.max_list_size = runs.trial.options.max_list_size = runs.whole.options.num_samples
    assert forecast(runs.whole, runs.trial)["seconds"]["reference"] == [13, 2 * (5 + 80)]


def test_disk_and_what_speaks_against_the_run(runs, models):
    found = forecast(runs.whole, runs.trial)
    # Samples of one iteration are there twice while their file is being finished
    assert found["disk"]["files"] == (2 + 1) * 100 * 1000 + 3 * 30 * 50
    assert found["concerns"] == ["truncated is 0.5, should be less. Too much."]
    rows = [{"prompt_id": "x", "prompt": "too long", "reason": "no room"}]
    write_jsonl(runs.trial.iteration(1) / "samples.set_aside.jsonl", rows)
    models.size = 10**18
    found = forecast(runs.whole, runs.trial)
    assert found["concerns"][1].startswith(
        "10% of the prompts failed (samples); with more than 5% (`max_failed_share`)"
    )
    assert found["concerns"][2].startswith("The disk has too little space: ")
    text = as_text(found)
    assert (
        "set aside  1 prompts\n    'too long': no room" in text and "Before you start the run:\n  - truncated" in text
    )
    assert "lists      8 of 10 prompts; all samples tie for 20% of them" in text
    assert "  generate                2 min         19 min\n" in text and "in all" in text


def test_prompts_that_may_fail_are_no_concern(runs, models):
    # Failures of all stages and iterations were added up: one held-out prompt that failed twice was a fifth
    row = {"prompt_id": "x", "prompt": "too long", "reason": "no room"}
    for number in (0, 1):
        path = runs.trial.iteration(number) / "held_out_samples.set_aside.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, [row])
    found = forecast(runs.whole, runs.trial)  # 3 of 30 held-out prompts may fail
    assert len(found["concerns"]) == 1 and found["set_aside"] == [row]
    runs.whole.held_out = runs.whole.held_out * 2
    found = forecast(runs.whole, runs.trial)  # 6 of 60 are too many
    assert found["concerns"][1].startswith("10% of the prompts failed (held out samples); with more than 5%")


@pytest.mark.slow
def test_the_whole_chain_on_a_few_prompts(project, capsys):
    change_options(project, stop_on="any", num_held_out=3)
    assert larpo_run("--try", 4) == 0
    printed = capsys.readouterr().out
    assert not (project / "out").exists()
    assert len(rows_of(project / "out-try/iteration_1/samples.jsonl")) == 4
    assert "sample 7 × 4" in printed and "What the trial of 4 prompts tells of the whole run:" in printed  # both plans
    found = json.loads((project / "out-try/trial.json").read_text())
    assert set(found["seconds"]) == set(STAGES) and found["prompts"] == 4
    times = rows_of(project / "out-try/timings.jsonl")
    assert all(0 <= row["work"] <= row["seconds"] + 0.01 for row in times), times
    # Loading the model is no work
    loading = ("generate", "reference", "train")
    assert all(row["work"] < row["seconds"] for row in times if row["stage"] in loading), times


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--try"], "`--try` needs a number of prompts, e.g. `--try 20`"),
        (["--try", "--dry_run"], "`--try` needs a number of prompts"),
        (["--try", "1"], "`--try` is 1; try at least 2 prompts"),
        (["--try", "4", "--dry_run"], "`--dry_run` runs nothing, and `--try` does: leave one of them out"),
        (["--try", "4", "--num_held_out", "90"], "there are only 10 prompts to hold out"),  # of the whole run
    ],
)
def test_what_cannot_be_tried(project, capsys, flags, message):
    assert cli.main(["run", "--config", "it.yaml", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (project / "out-try").exists()


def test_a_trial_takes_the_place_of_an_earlier_one_and_of_nothing_else(project, monkeypatch, capsys):
    (project / "out-try").mkdir()
    (project / "out-try/thesis.txt").write_text("mine")
    assert larpo_run("--try", 4) == 2
    assert "`--try` uses the folder 'out-try', which holds something else than a trial" in capsys.readouterr().err
    (project / "out-try/trial.json").write_text("{}")
    with exclusive_lock(project / "out-try"):
        assert larpo_run("--try", 4) == 2
    assert "Another process is running in out-try" in capsys.readouterr().err
    assert (project / "out-try/thesis.txt").exists()
    # With other options than the earlier one, which are not compared
    (project / "out-try/run.yaml").write_text("beta: 17")
    monkeypatch.setattr(trial_module, "run", lambda *parts: (_ for _ in ()).throw(LarPOError("the chain is broken")))
    assert larpo_run("--try=4") == 2
    assert "the chain is broken" in capsys.readouterr().err and len(rows_of("out-try/prompts.jsonl")) == 4
    assert not (project / "out-try/thesis.txt").exists()
