"""On chosen/rejected pairs LarPOTrainer is DPOTrainer: its very code, or the same numbers from lists of two."""

import pytest
import tiny
from trajectories import assert_close, trajectory
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_larpo import ConfigError, LarPOConfig
from trl_larpo.losses import listmle_loss

PAPER_LOSSES = ["pairwise", "contrastive", "lambdarank", "listmle"]
TEN_STEPS = {"max_steps": 10, "gradient_accumulation_steps": 1}

SHARED_METRICS = [
    "entropy",
    "num_tokens",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
]


def run_both(trained, dataset, options, dpo_options, **trainer_kwargs):
    ours = trained(dataset, TEN_STEPS | options, **trainer_kwargs)
    theirs = trained(dataset, TEN_STEPS | dpo_options, cls=DPOTrainer, config_cls=DPOConfig, **trainer_kwargs)
    return ours, theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"loss_type": "exo_pair", "label_smoothing": 1e-3},
        {"loss_type": "nca_pair"},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "bco_pair"},
        {"loss_type": "sppo_hard"},
        {"loss_type": "aot"},
        {"loss_type": "aot_unpaired"},
        {"loss_type": "apo_zero"},
        {"loss_type": "apo_down"},
        {"loss_type": "discopop"},
        {"loss_type": "sft"},
        {"loss_type": "sft", "beta": 0.0},
        {"loss_type": "sigmoid_norm"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": "sigmoid", "ld_alpha": 0.5},
        {"loss_type": "sigmoid", "use_weighting": True},
        {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_trl_losses_equal_dpo_trainer(trained, options):
    ours, theirs = run_both(trained, tiny.pairs(), options, options)
    assert not ours._list_mode
    assert len(trajectory(ours, "loss")) == 10
    assert_close(ours, theirs, ("loss", "grad_norm", *SHARED_METRICS), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["reverse_kl", "js_divergence"])
@pytest.mark.parametrize("loss_type", PAPER_LOSSES)
def test_scores_per_token_are_those_of_sigmoid_norm(trained, loss_type, divergence):
    options = {"beta": 2.0, "f_divergence_type": divergence}
    ours, theirs = run_both(
        trained,
        tiny.pairs(),
        options | {"loss_type": loss_type, "per_token_scores": True},
        options | {"loss_type": "sigmoid_norm"},
    )
    assert ours._list_mode
    assert_close(ours, theirs, ("loss", "grad_norm", *SHARED_METRICS), rtol=1e-4, atol=1e-5)


def test_scores_per_token_have_no_meaning_where_trl_scores(trained):
    with pytest.raises(
        ConfigError, match="`per_token_scores` ranks candidates and cannot be combined with `loss_type`"
    ):
        trained(tiny.pairs(), {"loss_type": "hinge", "per_token_scores": True})


@pytest.mark.parametrize(
    "loss_type",
    ["lambdarank", *(pytest.param(x, marks=pytest.mark.slow) for x in PAPER_LOSSES if x != "lambdarank")],
)
@pytest.mark.parametrize(
    "dataset",
    [
        tiny.pairs(),
        pytest.param(tiny.pairs(conversational=True), marks=pytest.mark.slow),
        pytest.param(tiny.pairs(implicit_prompt=True), marks=pytest.mark.slow),
    ],
    ids=["standard", "conversational", "implicit prompt"],
)
def test_ranking_losses_equal_dpo_sigmoid(trained, loss_type, dataset):
    ours, theirs = run_both(trained, dataset, {"loss_type": loss_type}, {"loss_type": "sigmoid"})
    assert ours._list_mode
    assert_close(ours, theirs, ("loss", "grad_norm"), rtol=1e-5, atol=0)
    assert_close(ours, theirs, SHARED_METRICS, rtol=1e-5, atol=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"precompute_ref_log_probs": True},
        {"max_length": 20},
        {"max_length": 20, "truncation_mode": "keep_end"},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
        {"gradient_checkpointing": True},
        {"pad_to_multiple_of": 16},
        {"beta": 0.5, "gradient_accumulation_steps": 2},
        {"bf16": True},
    ],
    ids=lambda options: "-".join(map(str, options)) + "-" + "-".join(map(str, options.values())),
)
def test_options_equal_dpo_sigmoid(trained, options):
    ours, theirs = run_both(
        trained, tiny.pairs(), {"loss_type": "lambdarank"} | options, {"loss_type": "sigmoid"} | options
    )
    assert ours._list_mode
    tolerance = 2e-2 if "bf16" in options else 1e-4 if "f_divergence_type" in options else 2e-5
    assert_close(ours, theirs, ("loss", "grad_norm"), rtol=tolerance, atol=0)


@pytest.mark.slow
def test_sft_term_equals_dpo_trainer(trained):
    weights = {"loss_weights": [1.0, 0.3]}
    ours, theirs = run_both(
        trained, tiny.pairs(), {"loss_type": ["listmle", "sft"]} | weights, {"loss_type": ["sigmoid", "sft"]} | weights
    )
    assert ours._list_mode
    assert_close(ours, theirs, ("loss", "grad_norm"), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"ld_alpha": 0.5}, {"use_weighting": True}])
@pytest.mark.parametrize("loss_type", PAPER_LOSSES)
def test_ranking_losses_read_as_sigmoid_with_options_of_pairs(trained, loss_type, option):
    ours, theirs = run_both(trained, tiny.pairs(), {"loss_type": loss_type} | option, {"loss_type": "sigmoid"} | option)
    assert not ours._list_mode
    assert trajectory(ours, "loss", "grad_norm") == trajectory(theirs, "loss", "grad_norm")
    assert ours.args.loss_type == [loss_type]


@pytest.mark.slow
def test_own_collator_goes_dpo_trainers_way(trained, tiny_model):
    collator = DataCollatorForPreference(pad_token_id=0)
    ours, theirs = run_both(
        trained, tiny.pairs(), {"loss_type": "listmle"}, {"loss_type": "sigmoid"}, data_collator=collator
    )
    assert ours.data_collator is collator
    assert trajectory(ours, "loss", "grad_norm") == trajectory(theirs, "loss", "grad_norm")


@pytest.mark.slow
def test_lists_cannot_be_evaluated_after_training_dpo_trainers_way(trained):
    with pytest.raises(ConfigError, match="eval dataset holds lists, but this trainer was built for pairs"):
        trained(tiny.pairs(), {"loss_type": "ipo"}).evaluate(tiny.lists())


@pytest.mark.slow
def test_extra_columns_are_ignored_as_in_trl(trained):
    rows = [row | {"completions": ["x"], "rewards": None, "label": 1} for row in tiny.pairs()]
    ours, theirs = run_both(trained, tiny.Dataset.from_list(rows), {"loss_type": "ipo"}, {"loss_type": "ipo"})
    assert trajectory(ours, "loss", "grad_norm") == trajectory(theirs, "loss", "grad_norm")


@pytest.mark.slow
def test_dpo_config_is_accepted(trained):
    ours = trained(tiny.pairs(), TEN_STEPS, config_cls=DPOConfig)
    theirs = trained(tiny.pairs(), TEN_STEPS, cls=DPOTrainer, config_cls=DPOConfig)
    assert trajectory(ours, "loss", "grad_norm") == trajectory(theirs, "loss", "grad_norm")


@pytest.mark.slow
def test_evaluation_equals_dpo_trainer(trained):
    held_out = tiny.pairs(num_rows=6, seed=1)
    one_batch = {"per_device_eval_batch_size": 6}  # of several, DPOTrainer averages the averages
    ours, theirs = run_both(
        trained,
        tiny.pairs(),
        {"loss_type": "listmle"} | one_batch,
        {"loss_type": "sigmoid"} | one_batch,
        eval_dataset=held_out,
    )
    ours_metrics, theirs_metrics = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", *(f"eval_{name}" for name in SHARED_METRICS)):
        assert ours_metrics[name] == pytest.approx(theirs_metrics[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize(
    "options, trainer_kwargs, named",
    [
        ({"loss_type": "listnet", "ld_alpha": 0.5}, {}, "listnet.*ld_alpha"),
        ({"loss_type": ["approx_ndcg", "ipo"]}, {}, "approx_ndcg.*ipo"),
        ({"loss_type": "lambdarank", "lambda_weight": "ndcg", "use_weighting": True}, {}, "lambda_weight.*use_weight"),
        ({"ld_alpha": 0.5}, {"loss_fn": listmle_loss}, "loss_fn.*ld_alpha"),
        ({"label_smoothing": 0.1, "use_weighting": True}, {}, "`label_smoothing=0.1` of .*lambdarank.*use_weighting"),
        ({"loss_type": "sigmoid", "candidate_chunk_size": 1}, {}, "`candidate_chunk_size` has no effect .*sigmoid"),
        ({"loss_type": "sigmoid", "shared_prompt": "on"}, {}, "`shared_prompt='on'` has no effect .*sigmoid"),
    ],
)
def test_list_options_are_refused_where_dpo_trainer_takes_over(tiny_model, config, options, trainer_kwargs, named):
    from trl_larpo import LarPOTrainer

    with pytest.raises(ConfigError, match=named):
        LarPOTrainer(model=tiny_model, args=config(**options), train_dataset=tiny.pairs(), **trainer_kwargs)


def test_lists_for_evaluation_are_refused_where_dpo_trainer_takes_over(tiny_model, config):
    from trl_larpo import LarPOTrainer

    with pytest.raises(ConfigError, match=r"eval_dataset holds lists.*loss_type"):
        LarPOTrainer(
            model=tiny_model,
            args=config(LarPOConfig, loss_type="ipo"),
            train_dataset=tiny.pairs(),
            eval_dataset=tiny.lists(),
        )
