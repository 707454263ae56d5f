"""What may change when a run is continued: speed, memory, rounding and the places of files, but not what comes out."""

import shutil
from pathlib import Path

import pytest
from small_run import rows_of
from trl import ModelConfig

from trl_larpo import ConfigError
from trl_larpo.run.folder import CHANGES, RunFolder
from trl_larpo.run.options import RunConfig, RunTrainingConfig
from trl_larpo.storage import read_yaml

OPTIONS = {"prompts": ["prompts.jsonl"], "reward_funcs": ["./judge"], "num_samples": 4}


@pytest.fixture
def start(tmp_path, config, monkeypatch):
    """Starts a run, or continues it, as far as its configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    shutil.copytree("judge", "model")

    def begin(training=None, model="model", attn_implementation=None, **options):
        arguments = config(RunTrainingConfig, **{"output_dir": "out", "save_strategy": "steps"} | (training or {}))
        folder = RunFolder(
            RunConfig(**OPTIONS | options), arguments, ModelConfig(model, attn_implementation=attn_implementation)
        )
        folder.check_configuration()
        folder.path.mkdir(exist_ok=True)
        folder.save_configuration()
        return folder

    begin()
    return begin


SPEED = [
    ({"candidate_chunk_size": 2}, {}),
    ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, {}),
    ({"shared_prompt": False, "ddp_timeout": 7200}, {}),
    ({}, {"generation_batch_size": 3, "generation_dtype": "float32", "reward_batch_size": 2}),
    ({}, {"max_failed_share": 0.5, "attn_implementation": "eager"}),
]


@pytest.mark.parametrize("training, options", SPEED)
def test_what_changes_speed_memory_or_rounding_is_accepted_and_recorded(start, capsys, training, options):
    start(training, **options)
    [row] = rows_of(f"out/{CHANGES}")
    assert row["changed"].keys() >= (training | options).keys() and row["time"]
    name = next(iter(training | options))
    was, now = row["changed"][name]
    assert f"Changed: `{name}` from {was!r} to {now!r}" in capsys.readouterr().out
    assert read_yaml("out/run.yaml")[name] == now
    start(training, **options)
    assert len(rows_of(f"out/{CHANGES}")) == 1, "the last start had the same options"


@pytest.mark.skipif(not hasattr(RunTrainingConfig, "logging_dir"), reason="this transformers has no `logging_dir`")
def test_a_logging_folder_with_the_time_in_its_name_is_no_change(start):
    start({"logging_dir": "runs/Nov26_22-57-10"})
    start({"logging_dir": "runs/Nov26_22-57-11"})
    assert not Path("out", CHANGES).exists()


@pytest.mark.parametrize("training, options, name", [
    ({"bf16": True}, {}, "bf16"), ({"seed": 1}, {}, "seed"), ({"max_length": 99}, {}, "max_length"),
    ({"reference_free": True}, {}, "reference_free"), ({"truncated_completions": "drop"}, {}, "truncated_completions"),
    ({}, {"reward_dtype": "float32"}, "reward_dtype"), ({}, {"max_new_tokens": 3}, "max_new_tokens"),
])  # fmt: skip
def test_what_changes_results_is_refused(start, training, options, name):
    with pytest.raises(ConfigError, match=rf"`{name}` is .*, but the run in 'out' was made with .* Undo the change"):
        start(training, **options)


@pytest.mark.parametrize("trained", ["model", "trainer/checkpoint-1", "training_log.jsonl"])
def test_options_of_updates_may_change_until_something_is_trained(start, trained):
    """A training that crashed in its first step costs no samples."""
    for path in ("out/iteration_1/trainer/data", "out/iteration_1/trainer/best-1", "out/iteration_1/model.partial"):
        Path(path).mkdir(parents=True)
    Path("out/iteration_1/ref_logps.jsonl").touch()
    corrected = {"learning_rate": 1e-5, "loss_type": ["listmle", "sft"], "loss_weights": [1.0, 0.01], "beta": 0.5}
    start(corrected)
    assert rows_of(f"out/{CHANGES}")[0]["changed"].keys() == corrected.keys()
    Path("out/iteration_1", trained).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"`learning_rate` is 1.0, but the run in 'out' was made with 1e-05. Undo"):
        start(corrected | {"learning_rate": 1.0})


def test_a_run_that_was_stopped_before_it_began_may_start(start, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/run.yaml.partial").touch()
    start({"output_dir": "new"})
    (tmp_path / "new/run.yaml").rename("new/thesis.tex")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.tex\) and no run. Take a new"):
        start({"output_dir": "new"})


def test_moved_files_are_the_same_and_changed_ones_are_not(start, tmp_path):
    for name in ("prompts.jsonl", "model", "judge"):
        (tmp_path / name).rename(f"new-{name}")
    moved = {"prompts": ["new-prompts.jsonl"], "reward_funcs": ["new-judge/"]}
    start(model=f"{tmp_path}/new-model/", **moved)
    assert not (tmp_path / "out" / CHANGES).exists()
    (tmp_path / "new-prompts.jsonl").write_text('{"prompt": "another"}\n')
    with pytest.raises(ConfigError, match=r"`prompts` is \['new-prompts.jsonl'\], and what it holds has changed since"):
        start(model=f"{tmp_path}/new-model/", **moved)


def test_an_edited_reward_function_is_warned_of_and_recorded(start, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    source, names = tmp_path / "edited_rewards.py", ["edited_rewards:best"]
    source.write_text("def best(**_): return [1.0]")
    begin = lambda: start({"output_dir": "new"}, reward_funcs=names)  # noqa: E731
    begin()
    begin()
    assert not caplog.records
    source.write_text("def best(**_): return [2.0]")
    begin()
    assert "Changed:" not in capsys.readouterr().out
    [record] = caplog.records
    assert f"{source}, which holds the reward 'edited_rewards:best', has changed since the last start" in record.message
    [row] = rows_of(f"new/{CHANGES}")
    assert list(row["changed"]) == [f"{source}, which holds edited_rewards:best"]
    begin()
    assert len(caplog.records) == 1
