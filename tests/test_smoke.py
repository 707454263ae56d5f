"""The fast lane's look at the whole: a list and a pair are trained on, and the command line answers."""

import pytest
import tiny
import torch
from trl import DPOConfig, DPOTrainer

from trl_larpo import LarPOConfig, LarPOTrainer, cli


def test_a_step_on_lists_moves_the_best_completion_up(tiny_model, config):
    args = config(LarPOConfig, max_steps=3, learning_rate=1e-3)
    trainer = LarPOTrainer(model=tiny_model, args=args, train_dataset=tiny.lists())
    trainer.train()
    first, *_, last = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert last > first


def test_pairs_start_at_the_loss_of_dpo_trainer(tiny_model, config):
    losses = []
    for kind, options, loss_type in ((LarPOTrainer, LarPOConfig, "lambdarank"), (DPOTrainer, DPOConfig, "sigmoid")):
        args = config(options, max_steps=1, loss_type=loss_type)
        trainer = kind(model=tiny_model, args=args, train_dataset=tiny.pairs())
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)


def test_the_command_line_answers(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "--help"])
    assert end.value.code == 0 and "num_samples" in capsys.readouterr().out
    assert cli.main(["run", "--no_such_option", "1"]) == 2
