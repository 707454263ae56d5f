"""Scores of candidates in a training: per token, without a reference, with a margin, with noisy orders."""

import math

import lanes
import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from trajectories import trajectory
from transformers import AutoModelForCausalLM

from trl_larpo import RANKING_LOSSES, ConfigError, LarPOConfig, LarPOTrainer
from trl_larpo.training import trl_compat

ROW = {"prompt": "p", "completions": [" worse", " best one"], "rewards": [0.0, 1.0]}
ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 1}


def mean_logps(trainer, tiny_model, texts):
    """Log-probability per token of texts after the prompt "p", by the model as it was before training."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    values = []
    for text in texts:
        ids = torch.tensor([trainer.processing_class("p" + text + trainer.processing_class.eos_token)["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        values.append(log_probs.mean().item())  # the prompt is one token
    return values


@pytest.mark.parametrize("per_token", [False, True])
def test_reference_free_scores_are_simpo(trained, tiny_model, per_token, monkeypatch):
    loaded = []
    load = trl_compat.create_model_from_path
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.create_model_from_path", lambda *a, **k: (loaded.append(a), load(*a, **k))[1]
    )
    options = ONE_STEP | {
        "reference_free": True, "per_token_scores": per_token, "target_margin": 0.3, "beta": 2.0,
        "label_smoothing": 0.1,
    }  # fmt: skip
    trainer = trained(Dataset.from_list([ROW]), options)
    assert trainer.ref_model is None and len(loaded) == 1  # the policy alone
    worse, best = mean_logps(trainer, tiny_model, ROW["completions"])
    lengths = (1, 1) if per_token else (len(" worse") + 1, len(" best one") + 1)
    z = torch.tensor(2.0 * (best * lengths[1] - worse * lengths[0]) - 0.3)
    expected = -(0.9 * F.logsigmoid(z) + 0.1 * F.logsigmoid(-z))
    assert trajectory(trainer, "loss")[0][0] == pytest.approx(expected.item(), rel=1e-4, abs=tiny.LOSS_ROUNDING or None)


@pytest.mark.parametrize("loss_type", lanes.some_are_fast(RANKING_LOSSES, {"listmle"}))
def test_they_combine_with_every_loss(trained, loss_type):
    options = {
        "loss_type": loss_type, "reference_free": True, "per_token_scores": True, "target_margin": 0.3,
        "label_smoothing": 0.1, "beta": 2.0, "learning_rate": 1e-2, "max_steps": 8,
    }  # fmt: skip
    trainer = trained(tiny.lists(), options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses) and min(losses[-3:]) < losses[0]


def test_a_stream_needs_no_reference_either(trained):
    stream = tiny.lists().to_iterable_dataset()
    trainer = trained(stream, {"reference_free": True})
    assert trainer.evaluate(tiny.lists(seed=3))["eval_loss"] > 0  # also after training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_margin": -1.0}, "`target_margin` is -1.0; it must be a number of at least 0"),
        ({"target_margin": float("nan")}, "`target_margin` is nan"),
        ({"target_margin": 0.1, "loss_type": "sft"}, "`target_margin=0.1` belongs to ranking losses"),
        ({"label_smoothing": 0.5}, "`label_smoothing` is 0.5; with ranking losses it must be at least 0 and below 0.5"),
        ({"reference_free": True, "f_divergence_type": "forward_kl"}, "no reference to diverge from"),
        ({"reference_free": True, "sync_ref_model": True}, "`sync_ref_model` needs a reference"),
        ({"reference_free": True, "precompute_ref_log_probs": True}, "`precompute_ref_log_probs` needs a reference"),
        ({"listmle_top_k": 0, "loss_type": "listmle"}, "`listmle_top_k` is 0; it must be at least 1"),
        ({"listmle_top_k": 2}, "`listmle_top_k=2` belongs to 'listmle', but `loss_type` is"),
        ({"contrastive_positives": 2}, "`contrastive_positives=2` belongs to 'contrastive'"),
        ({"normalize_comparisons": True, "loss_type": "pairwise"}, "belongs to 'lambdarank' and 'listmle'"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    with pytest.raises(ConfigError) as error:
        LarPOConfig(str(tmp_path), use_cpu=True, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options, trainer_options, message",
    [
        ({"reference_free": True}, {"ref_model": "given"}, "`reference_free` scores need no reference"),
        ({"target_margin": 0.1}, {"loss_fn": lambda s, r, m: s.sum(1)}, "`target_margin` has no effect on a `loss_fn`"),
        ({"loss_weights": [2.0]}, {"loss_fn": lambda s, r, m: s.sum(1)}, "`loss_weights` has no effect on a `loss_fn`"),
        ({"label_smoothing": 0.1, "loss_type": "sft"}, {}, "`label_smoothing=0.1` belongs to ranking losses"),
        ({"beta": -0.1}, {}, "`beta` is -0.1; it must be greater than 0"),
        ({"include_for_metrics": ["inputs"]}, {}, "`include_for_metrics` names 'inputs'"),
    ],
)
def test_options_that_the_data_cannot_honour(tiny_model, config, options, trainer_options, message):
    with pytest.raises(ConfigError) as error:
        LarPOTrainer(model=tiny_model, args=config(**options), train_dataset=tiny.lists(), **trainer_options)
    assert message in str(error.value)


def test_a_registered_loss_of_your_own(tiny_model, config, monkeypatch, trained):
    monkeypatch.setitem(RANKING_LOSSES, "mine", lambda scores, relevance, mask: (scores * relevance * mask).sum(1))
    trainer = trained(tiny.lists(), {"loss_type": "mine", "label_smoothing": 0.2, "max_steps": 1})
    assert trainer.state.global_step == 1
    with pytest.raises(ConfigError, match="the loss 'mine' takes no argument `margin`"):
        LarPOTrainer(model=tiny_model, args=config(loss_type="mine", target_margin=0.1), train_dataset=tiny.lists())


def test_trls_own_losses_do_not_take_them(tiny_model, config):
    with pytest.raises(ConfigError, match="`reference_free` ranks candidates and cannot be combined with `loss_type`"):
        LarPOTrainer(model=tiny_model, args=config(loss_type="ipo", reference_free=True), train_dataset=tiny.pairs())


def test_reference_columns_that_are_not_read_are_named(tiny_model, config, caplog):
    rows = [row | {"ref_logps": [-1.0, -2.0]} for row in tiny.pairs()]
    with caplog.at_level("WARNING", logger="trl_larpo"):
        LarPOTrainer(model=tiny_model, args=config(loss_type="ipo"), train_dataset=Dataset.from_list(rows))
    assert "The column `ref_logps` of train_dataset is not read: these pairs" in caplog.text


@pytest.mark.parametrize(
    "options, with_column, message",
    [
        ({}, {"eval"}, "The column `ref_logps` of eval_dataset is not read: train_dataset has none"),
        (
            {"reference_free": True},
            {"train", "eval"},
            "of train_dataset and eval_dataset is not read: `reference_free`",
        ),
        ({}, {"train", "eval"}, None),
        ({"precompute_ref_log_probs": True}, {"eval"}, None),
    ],
)
def test_reference_log_probabilities_of_lists_that_are_not_read(
    tiny_model, config, options, with_column, message, caplog
):
    rows = [row | {"ref_logps": [-10.0] * len(row["completions"])} for row in tiny.lists(num_rows=4)]
    datasets = {name: Dataset.from_list(rows) if name in with_column else tiny.lists() for name in ("train", "eval")}
    with caplog.at_level("WARNING", logger="trl_larpo"):
        LarPOTrainer(
            model=tiny_model,
            args=config(**options),
            train_dataset=datasets["train"],
            eval_dataset=datasets["eval"],
        )
    assert message in caplog.text if message else "is not read" not in caplog.text


def test_args_stay_as_they_were(trained, tiny_model, config):
    rows = [row | {"ref_logps": [-10.0] * len(row["completions"])} for row in tiny.lists()]
    for dataset, options in ((Dataset.from_list(rows), {}), (tiny.lists(), {"reference_free": True})):
        args = config(**options)
        trainer = LarPOTrainer(model=tiny_model, args=args, train_dataset=dataset)
        assert trainer.ref_model is None and args.precompute_ref_log_probs is False
    again = LarPOTrainer(model=tiny_model, args=config(), train_dataset=tiny.lists())
    assert again.ref_model is not None


@pytest.mark.slow
def test_metrics_do_not_depend_on_the_batch_size(trained):
    held_out = tiny.lists(num_rows=5, seed=4)
    metrics = [
        trained(tiny.lists(), {"per_device_eval_batch_size": size, "max_steps": 1}, eval_dataset=held_out).evaluate()
        for size in (1, 2, 4, 5)
    ]
    for name, expected in metrics[0].items():
        if "time" in name or "per_second" in name:
            continue
        for other in metrics[1:]:
            assert other[name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    assert abs(metrics[0]["eval_rewards/margins"]) > 1e-6
