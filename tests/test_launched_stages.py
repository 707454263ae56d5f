"""Stages in other processes, also ones that a command of the user's starts: that is not believed without its output."""

import logging
import shutil

import pytest
from small_run import rows_of
from trl import ModelConfig

from trl_larpo import LarPOConfig, LarPOError
from trl_larpo.run import evaluation_stages, loop
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.options import RunConfig
from trl_larpo.run.stage_process import run_stage_of
from trl_larpo.run.stages import STAGES
from trl_larpo.run.status import status_of
from trl_larpo.storage import read_json, write_jsonl


@pytest.fixture
def launch(project, talkative_model, monkeypatch):
    """Starts the training of the first iteration with some launcher."""
    monkeypatch.setattr(loop, "_SECONDS_TO_APPEAR", 5)

    def run(launcher):
        options = RunConfig(prompts=["prompts.jsonl"], reward_funcs=["run_rewards:vowels"], train_launcher=launcher)
        training = LarPOConfig(output_dir="out", report_to="none", use_cpu=True, bf16=False)
        folder = RunFolder(options, training, ModelConfig(model_name_or_path=talkative_model))
        loop._launch_stage(folder, STAGES["train"], 1, num_processes=1)

    return run


def test_a_launcher_that_does_not_wait_is_an_error(launch, monkeypatch):
    monkeypatch.setattr(loop, "_SECONDS_TO_APPEAR", 0)
    message = r"'train' of iteration 1: `train_launcher` ended .* without making out/iteration_1/model. It must wait"
    with pytest.raises(LarPOError, match=message):
        launch("true {stage}")


def test_an_output_that_another_machine_shows_late_is_found(launch):
    launch("sh -c '(sleep 0.5; mkdir -p out/iteration_1/model) &' {stage}")


def test_a_launcher_that_fails_is_named_by_its_exit_status(launch):
    with pytest.raises(LarPOError, match="The stage 'train' of iteration 1 failed") as error:
        launch("sh -c 'exit 7' {stage}")
    assert error.value.exit_status == 7


def test_warnings_of_a_stage_in_other_processes_are_kept(finished_run, tmp_path, monkeypatch):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "iteration_2/evaluation.json").unlink()
    monkeypatch.chdir(finished_run.parent)
    monkeypatch.setattr(evaluation_stages, "kl_from_initial", lambda *_: logger.warning("a warning of the stage"))
    logger = logging.getLogger("trl_larpo.run.evaluation_stages")
    run_stage_of(str(run), "evaluate", 2)
    logger.warning("later")
    assert (run / "iteration_2/evaluation.json").exists()
    assert status_of(run)["warnings"][-1].endswith(" a warning of the stage")


def test_the_divergence_is_that_of_what_was_sampled(finished_run, tmp_path, monkeypatch):
    """Also where rewards see, and the file of rewards keeps, answers without the thoughts in front of them."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "iteration_2/evaluation.json").unlink()
    rows = rows_of(run / "iteration_2/held_out.jsonl")
    for row in rows:
        row["completions"] = [[{"role": "assistant", "content": "the answer alone"}] for _ in row["completions"]]
    write_jsonl(run / "iteration_2/held_out.jsonl", rows)
    monkeypatch.chdir(finished_run.parent)
    run_stage_of(str(run), "evaluate", 2)
    now, before = (read_json(folder / "iteration_2/evaluation.json") for folder in (run, finished_run))
    assert now["kl_from_initial"]["mean"] == pytest.approx(before["kl_from_initial"]["mean"], rel=1e-4)
