"""Stages that a command of the user's starts: it is not believed before their output is there."""

import pytest
from trl import ModelConfig

from trl_larpo import LarPOConfig, LarPOError
from trl_larpo.run import loop
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.options import RunConfig
from trl_larpo.run.stages import STAGES


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
