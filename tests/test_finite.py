"""A loss or gradient that is not finite: no step is taken on it, its prompts are named, and training stops."""

import math

import pytest
import tiny
import torch
from datasets import Dataset
from trajectories import weights_of

from trl_larpo import LarPOError, LarPOTrainer
from trl_larpo.training.list_metrics import Measurements, list_averages

BAD = "bad prompt"


def lists_with_bad_ones(num_rows, bad):
    rows = tiny.lists(num_rows=num_rows).to_list()
    for i in bad:
        rows[i]["prompt"] = f"{BAD} {i}"
    return Dataset.from_list(rows)


class Spoilt(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.fixture
def spoil(monkeypatch):
    """Makes the loss, or the gradient alone, of every batch with a bad prompt NaN."""

    def how(kind):
        score = LarPOTrainer._policy_scorer.func

        def scorer(self):
            inner = score(self)

            def spoilt(model, batch, **options):
                outputs = inner(model, batch, **options)
                texts = [self._tokenizer.decode(prompt) for prompt in batch["prompt_ids"]]
                if any(BAD in text for text in texts):
                    outputs.logps = outputs.logps * float("nan") if kind == "loss" else Spoilt.apply(outputs.logps)
                return outputs

            spoilt.shares_prompt = inner.shares_prompt
            spoilt.__dict__ |= vars(inner)
            return spoilt

        class Scorer:
            def __get__(self, trainer, owner):
                return scorer(trainer)

        monkeypatch.setattr(LarPOTrainer, "_policy_scorer", Scorer())

    return how


@pytest.mark.parametrize("kind", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_one_bad_batch_is_left_out(trained, spoil, caplog, kind, accumulation):
    spoil(kind)
    options = {
        "per_device_train_batch_size": 1, "max_steps": 6 // accumulation, "shuffle_dataset": False,
        "gradient_accumulation_steps": accumulation, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    if tiny.TRANSFORMERS_4:
        options.pop("train_sampling_strategy")
    options.pop("shuffle_dataset")
    with caplog.at_level("WARNING", logger="trl_larpo"):
        trainer = trained(lists_with_bad_ones(6, [2]), options)
    [said] = [record.message for record in caplog.records if "No step is taken" in record.message]
    assert f"'{BAD} 2'" in said and ("the loss is nan" in said or "the gradient is not finite" in said)
    assert all(weight.isfinite().all() for weight in weights_of(trainer.model).values())
    assert trainer.state.global_step == 6 // accumulation


def test_metrics_leave_out_a_batch_without_a_finite_loss(trained, spoil):
    """A window with such a batch logs what a window of its other batches does."""
    spoil("loss")
    lists, logs = lists_with_bad_ones(4, [1]), []
    for dataset in (lists, lists.select([0, 2, 3])):
        steps = {"max_steps": len(dataset), "logging_steps": len(dataset)}  # with weights that stay
        trainer = trained(dataset, steps | {"per_device_train_batch_size": 1, "learning_rate": 0.0})
        logs += [entry for entry in trainer.state.log_history if "loss" in entry]
    found, expected = logs
    names = [name for name in expected if "/" in name or name in ("entropy", "list_size", "mean_token_accuracy")]
    assert {"rewards/chosen", "logps/rejected", "ranking/ndcg", "list_size"} <= set(names)
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-9), name


def test_a_batch_of_which_no_list_counts_adds_zeros():
    """Its sums and counts are those of every other batch by name, for processes that add them up together."""
    names = ["relevance", "mask", "scores", "log_ratios", "logps", "count", "entropy", "mean_logits", "is_top1"]
    batch = Measurements(names, torch.full((9, 2, 3), math.nan), torch.tensor(7), torch.tensor(math.nan))
    for name, (total, count) in list_averages([batch.first(0)], beta=0.1).items():
        assert (total, count) == ((7, 1) if name == "num_tokens" else (0, 0)), name


@pytest.mark.parametrize("kind", [pytest.param("loss", marks=pytest.mark.slow), "gradient"])
def test_training_stops_after_three_in_a_row(tiny_model, config, spoil, kind):
    spoil(kind)
    args = config(per_device_train_batch_size=1, max_steps=8)
    trainer = LarPOTrainer(model=tiny_model, args=args, train_dataset=lists_with_bad_ones(8, range(8)))
    before = weights_of(trainer.model)
    with pytest.raises(LarPOError, match="not finite in 3 steps in a row"):
        trainer.train()
    for name, weight in weights_of(trainer.model).items():
        assert torch.equal(weight, before[name]), name
