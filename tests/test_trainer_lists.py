"""Training on ranked lists: each candidate once, the losses as given, and everything DPOTrainer supports."""

import copy
import functools
import gc
import json
import logging
import math
from pathlib import Path

import lanes
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler
from trajectories import assert_close, assert_same_weights, trajectory, weights_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaModel, TrainerCallback
from trl import DPOTrainer

from trl_larpo import ConfigError, DataError, LarPOConfig, LarPOTrainer
from trl_larpo.losses import RANKING_LOSSES, lambdarank_loss, listmle_loss, listnet_loss, ndcg_lambda_weight
from trl_larpo.training.scores import divergence_scores


def log_probability(model, prompt_ids, completion_ids):
    """Of a completion, token by token from the logits of one whole sequence."""
    tokens = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        log_probs = model(tokens).logits[0].double().log_softmax(-1)
    start = len(prompt_ids)
    return sum(log_probs[start + i - 1, token].item() for i, token in enumerate(completion_ids))


def log_ratio_of(policy, reference, prompt_ids, completion_ids):
    return log_probability(policy, prompt_ids, completion_ids) - log_probability(reference, prompt_ids, completion_ids)


@pytest.mark.parametrize("loss_type", lanes.some_are_fast(RANKING_LOSSES, {"lambdarank", "listmle"}))
@pytest.mark.parametrize("conversational", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_loss_moves_better_completions_up(trained, tiny_model, loss_type, conversational):
    # A wrong sign, or relevance given to the wrong completion, moves them down
    dataset = tiny.lists(num_rows=4, conversational=conversational)
    trainer = trained(dataset, {"loss_type": loss_type, "max_steps": 6, "learning_rate": 3e-3})
    before = AutoModelForCausalLM.from_pretrained(tiny_model)
    gaps = []
    for row, tokens in zip(dataset, trainer.train_dataset, strict=True):
        gain = [
            log_probability(trainer.model, tokens["prompt_ids"], ids)
            - log_probability(before, tokens["prompt_ids"], ids)
            for ids in tokens["completion_ids"]
        ]
        best, worst = np.equal(row["rewards"], max(row["rewards"])), np.equal(row["rewards"], min(row["rewards"]))
        gaps.append(np.mean(np.array(gain)[best]) - np.mean(np.array(gain)[worst]))
    assert min(gaps) > 1.0, gaps
    margins = [value for [value] in trajectory(trainer, "rewards/margins")]
    assert margins[0] == 0.0 and margins[-1] > 0.1
    assert trajectory(trainer, "ranking/accuracy")[-1][0] > 0.75  # contrastive and pairwise leave the middle alone
    losses = [value for [value] in trajectory(trainer, "loss")]
    assert losses[-1] < losses[0]
    for (name, old), new in zip(before.named_parameters(), trainer.model.parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_first_loss_is_what_the_formula_says_at_score_zero(trained):
    # Before the first step policy and reference agree: every score is 0 and every compared pair costs log 2
    dataset = tiny.lists(num_rows=4)
    trainer = trained(dataset, {"loss_type": "lambdarank", "max_steps": 1})
    num_pairs = [sum(a > b for a in row["rewards"] for b in row["rewards"]) for row in dataset]
    assert trajectory(trainer, "loss")[0][0] == pytest.approx(
        math.log(2) * sum(num_pairs) / 4, abs=tiny.LOSS_ROUNDING or None
    )


@pytest.mark.slow
def test_scores_per_token_equal_a_plain_loop(trained, tiny_model):
    dataset = tiny.lists(num_rows=4)
    seen = []

    def loss_fn(scores, relevance, mask):
        seen.append([row[m].tolist() for row, m in zip(scores.detach(), mask, strict=True)])
        return lambdarank_loss(scores, relevance, mask)

    options = {"max_steps": 2, "beta": 2.0, "per_token_scores": True, "train_sampling_strategy": "sequential"}
    if "train_sampling_strategy" not in LarPOConfig.__dataclass_fields__:
        pytest.skip("this version of transformers shuffles")
    trainer = trained(dataset, options, loss_fn=loss_fn)
    # After one step: log-ratio over tokens, times beta
    policy = trained(dataset, options | {"max_steps": 1}, loss_fn=loss_fn).model
    reference, expected = AutoModelForCausalLM.from_pretrained(tiny_model), []
    for row in trainer.train_dataset:
        expected.append([])
        for ids in row["completion_ids"]:
            log_ratio = log_ratio_of(policy, reference, row["prompt_ids"], ids)
            expected[-1].append(2.0 * log_ratio / len(ids))
    for a, b in zip(seen[1], expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("shared_prompt", ["off", "on"])
def test_a_step_forwards_each_candidate_once(tiny_model, config, shared_prompt):
    dataset = tiny.lists(num_rows=4)
    args = config(max_steps=1, shared_prompt=shared_prompt)
    trainer = LarPOTrainer(model=tiny_model, args=args, train_dataset=dataset)
    rows = {"policy": [], "reference": []}
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: rows[name].append(kwargs["input_ids"].shape), with_kwargs=True
        )
    trainer.train()
    lists = trainer.train_dataset
    if shared_prompt == "off":
        num_rows = sum(len(completions) for completions in dataset["completions"])
        longest = max(len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in lists)
    else:  # a row for each list: the prompt, and every completion once, with a token to begin it
        num_rows = 4
        longest = max(len(row["prompt_ids"]) - 1 + sum(len(c) + 1 for c in row["completion_ids"]) for row in lists)
    assert rows == {"policy": [(num_rows, longest)], "reference": [(num_rows, longest)]}


def test_scores_are_those_of_dpo_trainer_on_each_pair_of_the_list(trained):
    # Loss and gradient of the pairwise loss on (best, worst) must be DPO's on the pair made of these two
    lists = Dataset.from_list(
        [
            {"prompt": "a b", "completions": [" mid", " worst one", " best of all"], "rewards": [0.5, -1.0, 2.0]},
            {"prompt": "c", "completions": [" best", " worst", " mid", " mid 2"], "rewards": [9.0, 1.0, 2.0, 3.0]},
        ]
    )
    pairs = Dataset.from_list(
        [
            {"prompt": "a b", "chosen": " best of all", "rejected": " worst one"},
            {"prompt": "c", "chosen": " best", "rejected": " worst"},
        ]
    )
    options = {"loss_type": "pairwise", "per_device_train_batch_size": 2, "max_steps": 5}
    ours, theirs = trained(lists, options), trained(pairs, options)
    assert_close(ours, theirs, ("loss", "grad_norm", "rewards/margins"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["lambdarank", "listmle", "contrastive", "pairwise"])
def test_trajectory_does_not_depend_on_how_a_batch_is_split(trained, loss_type):
    runs = [
        trained(
            tiny.lists(num_rows=40),
            {
                "loss_type": loss_type,
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": 8 // size,
                "max_steps": 5,
            },
        )
        for size in (8, 1, 2)
    ]
    for run in runs[1:]:
        assert_close(run, runs[0], ("loss", "grad_norm"), rtol=1e-4, atol=1e-5)


def test_unsorted_lists_are_ranked_by_reward_and_best_first_lists_by_order(trained):
    sorted_rows = [
        {"prompt": "p", "completions": [" one", " two", " three"]},
        {"prompt": "q", "completions": [" four", " five"]},
    ] * 4
    shuffled_rows = [
        {"prompt": "p", "completions": [" three", " one", " two"], "rewards": [-1.0, 7.0, 3.0]},
        {"prompt": "q", "completions": [" five", " four"], "rewards": [0.0, 1.0]},
    ] * 4
    runs = [trained(Dataset.from_list(rows)) for rows in (sorted_rows, shuffled_rows)]
    assert_close(*runs, ("loss", "grad_norm"), rtol=1e-5, atol=1e-6)


def test_tied_lists_contribute_nothing(trained, caplog):
    rows = [{"prompt": "p", "completions": [" a", " b", " c"], "rewards": [1.0, 1.0, 1.0]}] * 4
    with caplog.at_level(logging.WARNING):
        trainer = trained(Dataset.from_list(rows), {"loss_type": ["lambdarank", "sft"]})
    assert "in 4 of 4 lists all rewards are equal" in caplog.text
    assert trajectory(trainer, "loss", "grad_norm") == [[0.0, 0.0]] * 3
    assert "ranking/ndcg" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["list_size"] == 3


@pytest.mark.slow
def test_own_loss_takes_the_place_of_loss_type(trained):
    seen = []

    def my_loss(scores, relevance, mask):
        seen.append((scores, relevance, mask))
        return listmle_loss(scores, relevance, mask)

    own = trained(tiny.lists(), loss_fn=my_loss)
    named = trained(tiny.lists(), {"loss_type": "listmle"})
    assert trajectory(own, "loss", "grad_norm") == trajectory(named, "loss", "grad_norm")
    scores, relevance, mask = seen[0]
    assert scores.shape == relevance.shape == mask.shape
    assert (scores.dtype, relevance.dtype, mask.dtype) == (torch.float32, torch.float32, torch.bool)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, loss_fn",
    [
        (
            {"loss_type": "lambdarank", "lambda_weight": "ndcg"},
            functools.partial(lambdarank_loss, lambda_weight=ndcg_lambda_weight),
        ),
        ({"loss_type": "listnet", "listnet_temperature": 0.3}, functools.partial(listnet_loss, temperature=0.3)),
        (
            {"loss_type": ["listmle", "lambdarank"], "loss_weights": [0.7, 2.0]},
            lambda *list_: 0.7 * listmle_loss(*list_) + 2.0 * lambdarank_loss(*list_),
        ),
    ],
    ids=["ndcg weight", "listnet temperature", "weighted combination"],
)
def test_options_of_losses(trained, options, loss_fn):
    by_option, by_function = trained(tiny.lists(), options), trained(tiny.lists(), loss_fn=loss_fn)
    assert_close(by_option, by_function, ("loss", "grad_norm"), rtol=1e-5, atol=1e-6)


def test_sft_term_is_the_nll_per_token_of_the_best(trained, tiny_model):
    row = {"prompt": "p", "completions": [" worse", " best one"], "rewards": [0.0, 1.0]}
    options = {"loss_type": ["sft"], "max_steps": 1, "per_device_train_batch_size": 1}
    trainer = trained(Dataset.from_list([row]), options)
    tokenizer = trainer.processing_class
    ids = torch.tensor([tokenizer("p best one" + tokenizer.eos_token)["input_ids"]])
    with torch.no_grad():
        log_probs = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits.log_softmax(-1)
    nll = -log_probs[0, :-1].gather(1, ids[0, 1:, None])[len("p") - 1 :].mean().item()
    assert trajectory(trainer, "loss")[0][0] == pytest.approx(nll, rel=1e-5, abs=tiny.LOSS_ROUNDING or None)


F_PRIME = {  # derivative of f at the ratio u = π_θ / π_ref (f-DPO, arXiv 2309.16240, table 1; α - 1 is TRL's α there)
    "reverse_kl": lambda u, alpha: math.log(u) + 1,
    "forward_kl": lambda u, alpha: -1 / u,
    "js_divergence": lambda u, alpha: math.log(2 * u / (1 + u)),
    "alpha_divergence": lambda u, alpha: (u ** (alpha - 1) - 1) / (alpha - 1),
}


def from_the_mean(values):
    """A constant for all candidates of a list changes nothing."""
    return [value - sum(values) / len(values) for value in values]


@pytest.mark.parametrize(
    "f_divergence_type, alpha",
    [*(pytest.param(name, 0.5, marks=pytest.mark.slow) for name in F_PRIME), ("alpha_divergence", 1.7)],
)
def test_scores_of_a_training_are_those_of_the_divergence(trained, tiny_model, f_divergence_type, alpha):
    row = {"prompt": "why", "completions": [" a", " dog runs", " is blue", " no cat"], "rewards": [1.0, 0.0, 3.0, 2.0]}
    seen = []

    def loss_fn(scores, relevance, mask):
        seen.append(scores[0].tolist())
        return lambdarank_loss(scores, relevance, mask)

    options = {"per_device_train_batch_size": 1, "beta": 0.7, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    options |= {"f_divergence_type": f_divergence_type, "f_alpha_divergence_coef": alpha}
    # The model that a first step gives is the one which the second step scores
    after_one = trained(Dataset.from_list([row]), options | {"max_steps": 1}, loss_fn=loss_fn)
    assert from_the_mean(seen[0]) == pytest.approx([0.0] * 4, abs=1e-6)
    trained(Dataset.from_list([row]), options | {"max_steps": 2}, loss_fn=loss_fn)
    [tokens], reference = after_one.train_dataset, AutoModelForCausalLM.from_pretrained(tiny_model)
    log_ratios = [
        log_ratio_of(after_one.model, reference, tokens["prompt_ids"], ids) for ids in tokens["completion_ids"]
    ]
    assert max(log_ratios) - min(log_ratios) > 0.3  # far enough for the divergences to differ
    expected = [0.7 * F_PRIME[f_divergence_type](math.exp(x), alpha) for x in log_ratios]
    assert from_the_mean(seen[2]) == pytest.approx(from_the_mean(expected), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("f_divergence_type", F_PRIME)
def test_divergences(f_divergence_type, alpha):
    log_ratios = [-20.0, -3.0, -0.5, 0.0, 1e-3, 0.5, 3.0, 20.0]
    f_prime = F_PRIME["reverse_kl" if (f_divergence_type, alpha) == ("alpha_divergence", 1.0) else f_divergence_type]
    expected = [f_prime(math.exp(x), alpha) for x in log_ratios]
    scores = divergence_scores(torch.tensor(log_ratios, dtype=torch.float64), f_divergence_type, alpha).tolist()
    # From where the ratio is 1: constants are free
    zero = log_ratios.index(0.0)
    shifted = [score - scores[zero] for score in scores]
    assert shifted == pytest.approx([value - expected[zero] for value in expected], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("f_divergence_type", F_PRIME)
def test_divergence_scores_are_finite_and_increasing(f_divergence_type):
    log_ratios = torch.linspace(-60, 60, 241)
    scores = divergence_scores(log_ratios, f_divergence_type, 0.5)
    assert torch.isfinite(scores).all()
    assert (scores.diff() >= 0).all() and scores[-1] > scores[0]
    extreme = divergence_scores(torch.tensor([200.0]), f_divergence_type, 1.7)
    assert torch.isfinite(extreme).all()


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ConfigError, match="f_divergence_type"):
        divergence_scores(torch.zeros(1), "total_variation", 0.5)


# What DPOTrainer supports


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 3])
def test_precomputed_reference_gives_the_same_training(trained, batch_size):
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": batch_size}
    precomputed, plain = trained(tiny.lists(), options), trained(tiny.lists())
    assert precomputed.ref_model is None
    assert [len(x) for x in precomputed.train_dataset["ref_logps"]] == [len(x["completions"]) for x in tiny.lists()]
    assert_close(precomputed, plain, ("loss", "grad_norm"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_caller_brings_reference_log_probabilities(trained, tiny_model, config):
    options = {"max_steps": 3}
    computed = trained(tiny.lists(), options | {"precompute_ref_log_probs": True})
    brought = tiny.lists().add_column("ref_logps", computed.train_dataset["ref_logps"])
    found = trained(brought, options)
    assert found.ref_model is None
    assert_close(found, computed, ("loss", "grad_norm"), rtol=1e-6, atol=1e-6)
    stream = trained(brought.to_iterable_dataset(), options)
    assert stream.ref_model is None
    # They are used, not computed anew
    shifted = brought.map(lambda row: {"ref_logps": [x - 5.0 * i for i, x in enumerate(row["ref_logps"])]})
    assert trajectory(trained(shifted, options), "loss")[0] != trajectory(found, "loss")[0]
    # What an evaluation set lacks is computed
    both = trained(brought, options, eval_dataset=tiny.lists(num_rows=4))
    assert [len(x) for x in both.eval_dataset["ref_logps"]] == [len(x) for x in tiny.lists(num_rows=4)["completions"]]

    with pytest.raises(ConfigError, match="`sync_ref_model` moves the reference, but train_dataset has the column"):
        LarPOTrainer(model=tiny_model, args=config(sync_ref_model=True), train_dataset=brought)
    with pytest.raises(ConfigError, match="`ref_logps`, and `ref_model` is given as well"):
        LarPOTrainer(
            model=tiny_model,
            ref_model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=config(),
            train_dataset=brought,
        )


@pytest.mark.parametrize(
    "ref_logps, message",
    [
        ([-1.0], "is \\[-1.0\\]; give the reference's log-probability of each of the 2 completions"),
        ([-1.0, None], "entry 1 is None; give a finite number of at most 0"),
        ([-1.0, float("nan")], "entry 1 is nan"),
        ([0.5, -1.0], "entry 0 is 0.5"),
    ],
)
def test_bad_reference_log_probabilities_are_named(tiny_model, config, ref_logps, message):
    rows = [{"prompt": "p", "completions": [" a", " b"], "ref_logps": [-1.0, -2.0]}] * 3
    rows.append(rows[0] | {"ref_logps": ref_logps})
    with pytest.raises(DataError, match=f"train_dataset row 3, column `ref_logps`: {message}"):
        LarPOTrainer(model=tiny_model, args=config(), train_dataset=Dataset.from_list(rows))


@pytest.mark.slow
def test_batches_of_lists_of_similar_length(trained):
    option = {"group_by_length": True} if tiny.TRANSFORMERS_4 else {"train_sampling_strategy": "group_by_length"}
    dataset = Dataset.from_list(
        [{"prompt": f"{i} " + "a " * (5 * i), "completions": [" b", " c" * (i + 1)]} for i in range(64)]
    )
    trainer = trained(dataset, option | {"per_device_train_batch_size": 2, "max_steps": 2})
    lengths = trainer.train_dataset["length"]
    assert lengths == [len(r["prompt_ids"]) + sum(map(len, r["completion_ids"])) for r in trainer.train_dataset]
    indices = list(trainer._get_train_sampler())
    gaps = [abs(lengths[a] - lengths[b]) for a, b in zip(indices[::2], indices[1::2], strict=True)]
    # two rows drawn at random are a third of the range apart
    assert sum(gaps) / len(gaps) < (max(lengths) - min(lengths)) / 6


@pytest.mark.slow
def test_precomputed_reference_is_cached_and_depends_on_its_options(trained, tmp_path, monkeypatch):
    path = tmp_path / "lists"
    tiny.lists().save_to_disk(path)
    computed = []
    original = LarPOTrainer._compute_all_ref_logps

    def spy(self, *args):
        computed.append(self.args.max_length)
        return original(self, *args)

    monkeypatch.setattr(LarPOTrainer, "_compute_all_ref_logps", spy)
    for max_length in (64, 64, 20):
        options = {"precompute_ref_log_probs": True, "max_length": max_length}
        trained(Dataset.load_from_disk(path), options)
    assert computed == [64, 20]
    other = {"precompute_ref_log_probs": True, "max_length": 64, "model_init_kwargs": {"rms_norm_eps": 1e-4}}
    trained(Dataset.load_from_disk(path), other)  # the same weights
    assert computed == [64, 20, 64]


def test_a_process_that_writes_no_file_has_the_reference_of_rows_in_memory(tiny_model, config, monkeypatch):
    dataset = tiny.lists()
    assert not dataset.cache_files
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    args = config(precompute_ref_log_probs=True)
    trainer = LarPOTrainer(model=tiny_model, args=args, train_dataset=dataset)
    assert [len(x) for x in trainer.train_dataset["ref_logps"]] == [len(x["completions"]) for x in dataset]


def test_precompute_refuses_a_stream(tiny_model, config):
    with pytest.raises(ConfigError, match=r"precompute_ref_log_probs.*IterableDataset"):
        LarPOTrainer(
            model=tiny_model,
            args=config(precompute_ref_log_probs=True),
            train_dataset=tiny.lists().to_iterable_dataset(),
        )


def test_sets_without_brought_log_probabilities_are_named(trained, tiny_model, config):
    brought = tiny.lists().map(lambda row: {"ref_logps": [-10.0] * len(row["completions"])})
    message = r"train_dataset brings `ref_logps`, so no reference is kept, and the eval dataset .*Add the column"
    with pytest.raises(ConfigError, match=message):
        stream = tiny.lists().to_iterable_dataset()
        LarPOTrainer(model=tiny_model, args=config(), train_dataset=brought, eval_dataset=stream)
    trainer = trained(brought, {"max_steps": 1})
    with pytest.raises(ConfigError, match=message):
        trainer.evaluate(tiny.lists(num_rows=4))
    assert math.isfinite(trainer.evaluate(brought)["eval_loss"])


@pytest.mark.parametrize("alpha", [0.6, pytest.param(1.0, marks=pytest.mark.slow)])
def test_sync_ref_model(tiny_model, config, alpha):
    # Of four steps the second moves the reference to α · policy + (1 - α) · reference; the others leave it alone
    policy_after, reference_after = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step > 0:  # what the step before left behind
                policy_after.append(weights_of(model))
                reference_after.append(weights_of(trainer.ref_model))

    args = config(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=alpha, max_steps=4)
    trainer = LarPOTrainer(model=tiny_model, args=args, train_dataset=tiny.lists(), callbacks=[Watch()])
    trainer.train()
    initial = weights_of(AutoModelForCausalLM.from_pretrained(tiny_model))
    for name, start in initial.items():
        torch.testing.assert_close(reference_after[0][name], start, rtol=0, atol=0)
        expected = alpha * policy_after[1][name] + (1 - alpha) * start
        assert not torch.equal(expected, start), name
        for after in (reference_after[1], reference_after[2]):
            torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)
    # The third step scores against the new reference: with α = 1 it is the policy itself
    margins = [value for [value] in trajectory(trainer, "rewards/margins")]
    assert margins[0] == 0.0 and margins[1] != 0.0 and margins[3] != 0.0
    assert (margins[2] == 0.0) == (alpha == 1.0)


@pytest.fixture
def synced(tiny_model, config, tmp_path):
    """Trains with a reference that is mixed with the policy after every second step, and returns the trainer."""

    def train(folder, resume=None, dataset=None, **options):
        moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
        saving = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / folder)}
        args = config(**moving, **saving, max_steps=5, learning_rate=1e-2, **options)
        trainer = LarPOTrainer(model=tiny_model, args=args, train_dataset=dataset or tiny.lists())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


@pytest.mark.parametrize("data", ["lists", pytest.param("pairs", marks=pytest.mark.slow)])
def test_a_resumed_training_has_the_reference_of_its_checkpoint(synced, tmp_path, data):
    options = {} if data == "lists" else {"dataset": tiny.pairs(), "loss_type": "sigmoid"}
    whole = synced("whole", **options)
    for step in (1, 3):  # before the reference was moved for the first time, and after it
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert (checkpoint / "reference.safetensors").exists() == (step == 3)
        resumed = synced(f"from {step}", resume=str(checkpoint), **options)
        assert_close(resumed, whole, ("loss", "rewards/margins"), rtol=1e-6, atol=1e-7)
        assert_same_weights(resumed.ref_model, whole.ref_model, rtol=1e-6, atol=1e-7)
        assert_same_weights(resumed.model, whole.model, rtol=1e-6, atol=1e-7)


def test_a_reference_that_starts_again_is_announced(synced, tmp_path, caplog):
    trainer = synced("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    reference = checkpoint / "reference.safetensors"
    with caplog.at_level("WARNING", logger="trl_larpo"):
        trainer._moving_reference.load(checkpoint, 3)
        assert "cannot be restored" not in caplog.text
        trainer._moving_reference._is_sharded = True
        trainer._moving_reference.load(checkpoint, 3)
        assert "cannot be restored, because the model is sharded. It starts again from the initial" in caplog.text
        caplog.clear()
        reference.unlink()
        trainer._moving_reference.save(checkpoint, 3)
        assert not reference.exists()
        synced("resumed", resume=str(checkpoint))
    assert f"cannot be restored, because {checkpoint} has no reference.safetensors" in caplog.text


@pytest.mark.slow
def test_explicit_reference_model_is_used(trained, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(tiny.save_tiny_model(tmp_path / "other", initializer_range=0.2))
    trainer = trained(tiny.lists(), {"max_steps": 1}, ref_model=other)
    assert trajectory(trainer, "rewards/chosen")[0][0] != 0.0


@pytest.mark.parametrize("kind", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), "adapter"])
def test_a_deep_copy_of_a_trained_model_is_a_model_of_its_own(trained, tiny_model, kind, caplog):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if kind == "adapter":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
    options = {"learning_rate": 1e-2, "bf16": kind == "bfloat16"}
    trained(tiny.lists(), options, model=model)
    if kind == "adapter":
        model.delete_adapter("ref")
    copies = [copy.deepcopy(model) for _ in range(2)]
    start = weights_of(model)
    caplog.clear()
    trained(tiny.lists(), options, model=copies[0])
    assert "could not be scored" not in caplog.text
    assert all(torch.equal(value, start[name]) for name, value in weights_of(model).items())
    assert any(not torch.equal(value, start[name]) for name, value in weights_of(copies[0]).items())
    # As a reference, it stays where it was when the policy moves
    trainer = trained(tiny.lists(), options, model=model, ref_model=copies[1])
    margins = [value for [value] in trajectory(trainer, "rewards/margins")]
    assert margins[0] == pytest.approx(0.0, abs=0.05 if kind == "bfloat16" else 1e-6) and abs(margins[2]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("peft_type", ["lora", "prompt tuning"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_peft_with_a_new_adapter(trained, tiny_model, peft_type, gradient_checkpointing):
    peft = pytest.importorskip("peft")
    peft_config = (
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        if peft_type == "lora"
        else peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    trainer = trained(
        tiny.lists(),
        {"gradient_checkpointing": gradient_checkpointing, "learning_rate": 0.1},
        peft_config=peft_config,
    )
    assert trainer.ref_model is None
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, parameter in base.named_parameters():
        trained_parameter = trainer.model.get_base_model().state_dict()
        key = name if name in trained_parameter else name.replace(".weight", ".base_layer.weight")
        torch.testing.assert_close(trained_parameter[key], parameter)
    assert all(math.isfinite(loss) for [loss] in trajectory(trainer, "loss"))
    if peft_type == "lora":  # a new LoRA adapter starts as the base model, so the first scores are 0
        assert trajectory(trainer, "rewards/margins")[0][0] == 0.0
        assert trajectory(trainer, "rewards/margins")[2][0] != 0.0


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [False, True])
def test_peft_with_an_existing_adapter_keeps_a_copy_as_reference(trained, tiny_model, precompute):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    trainer = trained(tiny.lists(), {"learning_rate": 0.01, "precompute_ref_log_probs": precompute}, model=model)
    margins = [value for [value] in trajectory(trainer, "rewards/margins")]
    assert margins[0] == pytest.approx(0.0, abs=1e-5)  # the reference is the adapter as it was, not the base model
    assert abs(margins[2]) > 1e-4
    parameters = dict(trainer.model.named_parameters())
    assert any(
        not torch.equal(parameter, parameters[name.replace(".default.", ".ref.")])
        for name, parameter in parameters.items()
        if ".default." in name
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [*range(200)]},
    ],
    ids=["embeddings", "trainable tokens"],
)
@pytest.mark.parametrize("precompute", lanes.some_are_fast([False, True], {False}))
def test_the_copy_of_an_existing_adapter_is_whole(trained, tiny_model, options, precompute):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    trainer = trained(tiny.lists(), {"max_steps": 1, "precompute_ref_log_probs": precompute}, model=model)
    assert trajectory(trainer, "rewards/margins")[0][0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_quantized_base_with_lora(trained, tmp_path):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    folder = tiny.save_tiny_model(tmp_path / "wide", hidden_size=64, intermediate_size=64)
    trainer = trained(
        tiny.lists(),
        model=folder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    )
    assert trainer.model.is_loaded_in_4bit
    assert trajectory(trainer, "rewards/margins")[0][0] == 0.0


@pytest.mark.slow
def test_mixture_of_experts_adds_its_balancing_loss(trained, tmp_path):
    folder = tiny.save_tiny_model(
        tmp_path / "moe",
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=8,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    with_loss = trained(tiny.lists(), {"max_steps": 1}, model=folder)
    without = trained(tiny.lists(), {"max_steps": 1, "router_aux_loss_coef": 0.0}, model=folder)
    [[loss, aux_loss]], [[plain]] = trajectory(with_loss, "loss", "aux_loss"), trajectory(without, "loss")
    assert aux_loss > 0
    assert loss == pytest.approx(plain + 0.1 * aux_loss, rel=1e-5, abs=tiny.LOSS_ROUNDING or None)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 1, 9])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(trained, use_reentrant, chunk_size):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    runs = [trained(tiny.lists(), options | {"candidate_chunk_size": chunk_size}), trained(tiny.lists())]
    assert_close(*runs, ("loss", "grad_norm"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("where", ["set by TRL", "in the model"])
def test_reentrant_checkpoints_that_no_option_asks_for_change_nothing(trained, tiny_model, monkeypatch, where, lora):
    """TRL sets them for adapters with ZeRO-3, after the options are read; users give models that have them."""
    model, more = AutoModelForCausalLM.from_pretrained(tiny_model), {}
    options = {"candidate_chunk_size": 2, "max_steps": 3}
    if lora:
        more["peft_config"] = pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    expected = trained(tiny.lists(), {"max_steps": 3}, **more)
    if where == "in the model":
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    else:
        options["gradient_checkpointing"] = True
        init = DPOTrainer.__init__

        def as_with_zero3(self, *values, args, **named):
            args.gradient_checkpointing_kwargs = {"use_reentrant": True}
            args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs
            init(self, *values, args=args, **named)

        monkeypatch.setattr(DPOTrainer, "__init__", as_with_zero3)
    runs = [trained(tiny.lists(), options, model=model, **more), expected]
    assert_close(*runs, ("loss", "grad_norm"), rtol=1e-5, atol=1e-6)


def test_reentrant_checkpoints_of_chunks_are_refused_where_processes_join_gradients(trained, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_CPU)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ConfigError, match="Set `gradient_checkpointing: false`: chunks are computed again"):
        trained(tiny.lists(), options | {"candidate_chunk_size": 2})


@pytest.mark.slow
def test_reentrant_checkpoints_that_come_too_late_are_an_error(trained, monkeypatch):
    def switched_on(self, *values, **named):
        self.model.gradient_checkpointing_enable({"use_reentrant": True})
        return train(self, *values, **named)

    train = LarPOTrainer.train
    monkeypatch.setattr(LarPOTrainer, "train", switched_on)
    with pytest.raises(ConfigError, match="gradients would be wrong"):
        trained(tiny.lists(), {"candidate_chunk_size": 2, "max_steps": 1})


@pytest.mark.parametrize("conversational", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stream_gives_the_numbers_of_the_same_rows_at_hand(trained, monkeypatch, conversational):
    # A stream comes in its own order
    monkeypatch.setattr(
        LarPOTrainer, "_get_train_sampler", lambda self, dataset=None: SequentialSampler(self.train_dataset)
    )
    dataset = tiny.lists(num_rows=20, conversational=conversational)
    stream, rows = trained(dataset.to_iterable_dataset(), {"max_steps": 5}), trained(dataset, {"max_steps": 5})
    assert isinstance(stream.train_dataset, IterableDataset)
    names = ("loss", "grad_norm", "num_tokens", "list_size", "ranking/ndcg", "rewards/margins", "logps/chosen")
    assert len(trajectory(stream, "loss")) == 5
    assert trajectory(stream, *names) == trajectory(rows, *names)
    assert_same_weights(stream.model, rows.model, rtol=0, atol=0)


@pytest.mark.slow
def test_stream_of_unknown_columns_names_its_bad_row(trained):
    def rows():
        for i in range(40):
            yield {"prompt": "p", "completions": [" a", " b"], "rewards": [1.0, math.nan if i == 30 else 0.0]}

    with pytest.raises(DataError, match="train dataset row 30, column `rewards`: entry 1 is nan"):
        trained(IterableDataset.from_generator(rows), {"max_steps": 20})


@pytest.mark.slow
def test_evaluation_during_training_and_on_new_sets(trained):
    trainer = trained(
        tiny.lists(),
        {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 3},
        eval_dataset={"lists": tiny.lists(num_rows=5, seed=1), "pairs": tiny.pairs(num_rows=3)},
    )
    logged = [entry for entry in trainer.state.log_history if "eval_lists_loss" in entry]
    assert len(logged) == 3
    assert all(0 < entry["eval_ranking/ndcg"] <= 1 for entry in logged)
    tokens = [entry["eval_num_tokens"] for entry in logged]  # of the training so far, logged or not
    assert 0 < tokens[0] < tokens[1] < tokens[2]
    new_set = tiny.lists(num_rows=4, seed=2)
    assert trainer.evaluate(new_set)["eval_list_size"] == sum(len(row["completions"]) for row in new_set) / 4
    assert trainer.evaluate(tiny.pairs(num_rows=3))["eval_list_size"] == 2
    again = trainer.evaluate(trainer.eval_dataset["lists"])  # prepared already
    assert again["eval_loss"] == pytest.approx(trainer.evaluate(tiny.lists(num_rows=5, seed=1))["eval_loss"])


@pytest.mark.slow
def test_prepared_sets_are_evaluated_as_they_are(trained):
    rows = [row | {"finished": [False] + [True] * (len(row["completions"]) - 1)} for row in tiny.lists()]
    rows = [row for row in rows if len(row["completions"]) > 2]
    trainer = trained(Dataset.from_list(rows), {"truncated_completions": "drop"}, eval_dataset=Dataset.from_list(rows))
    for prepared in (trainer.train_dataset, trainer.eval_dataset):
        assert trainer.evaluate(prepared)["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


@pytest.mark.slow
def test_evaluation_checks_new_sets(trained):
    with pytest.raises(DataError, match="eval dataset row 0, column `rewards`"):
        trained(tiny.lists()).evaluate(
            Dataset.from_list([{"prompt": "p", "completions": [" a", " b"], "rewards": [1.0]}])
        )


@pytest.mark.slow
def test_evaluation_after_precomputed_training_is_refused_as_in_trl(trained):
    trainer = trained(tiny.lists(), {"precompute_ref_log_probs": True})
    with pytest.raises(ValueError, match="after training has started"):
        trainer.evaluate(tiny.lists(seed=1))


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("truncated", ["rank_last", "drop"])
def test_evaluation_with_reference_log_probabilities_after_training(trained, as_stream, truncated):
    rows = [
        row | {"ref_logps": [-10.0] * size, "finished": [True] * (size - 1) + [False]}
        for row in tiny.lists(seed=1)
        if (size := len(row["completions"])) > 2
    ]
    trainer = trained(Dataset.from_list(rows), {"max_steps": 1, "truncated_completions": truncated})
    held_out = Dataset.from_list(rows[:4])
    expected = trainer.evaluate(held_out.to_iterable_dataset() if as_stream else held_out)["eval_loss"]
    assert trainer.evaluate({"a": held_out})["eval_a_loss"] == pytest.approx(expected)
    scores = trainer.predict(trainer._prepare_dataset(held_out, trainer.processing_class, trainer.args, "eval"))
    assert scores.metrics["test_loss"] == pytest.approx(expected)


@pytest.mark.skipif(tiny.TRANSFORMERS_4, reason="transformers 4 counts `input_ids` alone")
def test_tokens_seen_are_those_of_the_log(trained, caplog):
    trainer = trained(tiny.lists(), {"include_num_input_tokens_seen": "non_padding"})
    assert trainer.state.num_input_tokens_seen == trajectory(trainer, "num_tokens")[-1][0] > 0
    assert "number of tokens seen" not in caplog.text


@pytest.mark.slow
def test_compute_metrics_receives_scores_and_relevance(trained):
    held_out = tiny.lists(num_rows=6, max_size=6, seed=3)
    received = []

    def compute_metrics(prediction):
        received.append(prediction)
        return {"num_lists": len(prediction.label_ids)}

    trainer = trained(
        tiny.lists(), eval_dataset=held_out, compute_metrics=compute_metrics, options={"learning_rate": 0.01}
    )
    assert trainer.evaluate()["eval_num_lists"] == 6
    (scores, mask), relevance = received[0].predictions, received[0].label_ids
    assert scores.shape == mask.shape == relevance.shape
    for row, s, m, r in zip(held_out, scores, mask, relevance, strict=True):
        np.testing.assert_allclose(r[m == 1], row["rewards"])
        assert len(s[m == 1]) == len(row["completions"])
        assert np.abs(s[m == 1]).min() > 0


@pytest.mark.slow
def test_resuming_from_a_checkpoint_gives_the_same_weights(tiny_model, config, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = LarPOTrainer(model=tiny_model, args=config(**options), train_dataset=tiny.lists())
    whole.train()
    resumed = LarPOTrainer(model=tiny_model, args=config(**options), train_dataset=tiny.lists())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert_same_weights(whole.model, resumed.model, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_model_card_and_tags_name_larpo_and_the_paper(trained, tmp_path):
    trainer = trained(tiny.lists())
    assert set(trainer.model.model_tags) >= {"trl", "dpo", "larpo"}
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained with LarPO" in card
    assert "LLM Alignment as Retriever Optimization" in card
    assert "2502.03699" in card


@pytest.mark.slow
def test_saved_model_loads(trained, tmp_path):
    trainer = trained(tiny.lists())
    trainer.save_model(tmp_path / "saved")
    assert_same_weights(trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


# Lengths


@pytest.mark.slow
def test_over_long_prompts_are_dropped_and_cut_completions_counted(trained, caplog):
    rows = [{"prompt": "x" * length, "completions": [" a", " " + "b" * 30]} for length in (3, 30, 40, 3, 3, 3)]
    with caplog.at_level(logging.WARNING):
        trainer = trained(Dataset.from_list(rows), {"max_length": 20})
    assert len(trainer.train_dataset) == 4
    assert "dropped 2 of 6 lists" in caplog.text
    assert "4 of 8 completions are cut at `max_length=20`" in caplog.text


def test_nothing_left_is_an_error(tiny_model, config):
    rows = [{"prompt": "x" * 30, "completions": [" a", " b"]}]
    with pytest.raises(DataError, match=r"no list is left.*max_length=20"):
        LarPOTrainer(model=tiny_model, args=config(max_length=20), train_dataset=Dataset.from_list(rows))


@pytest.mark.slow
def test_without_max_length_nothing_is_cut(trained):
    rows = [{"prompt": "x" * 30, "completions": [" a", " b" * 30]}] * 4
    trainer = trained(Dataset.from_list(rows), {"max_length": None})
    assert trajectory(trainer, "completions/mean_length")[0][0] == (3 + 61) / 2


def test_columns_of_the_user_do_not_reach_the_model(trained, monkeypatch):
    # Some are called as what a model takes, others as what a row is made into
    others = {"labels": [1, 2], "input_ids": [1], "attention_mask": [0], "position_ids": [7], "source": "web"}
    others |= {"relevance": [9.0, 1.0], "prompt_ids": [5], "candidate_mask": [True], "num_tokens": 5}
    received = []
    forward = LlamaModel.forward

    def spy(self, *args, **kwargs):
        tensors = {name: value.tolist() for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        received[-1].append((args, sorted(kwargs), tensors))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", spy)
    trainers = []
    for columns in ({}, others):
        received.append([])
        trainers.append(trained(tiny.lists().map(lambda row, columns=columns: row | columns)))
    assert received[0] and received[0] == received[1]
    names = ("loss", "grad_norm", "num_tokens", "rewards/margins")
    assert trajectory(trainers[0], *names) == trajectory(trainers[1], *names)


# What has no meaning on lists


@pytest.mark.parametrize(
    "options, trainer_kwargs, named",
    [
        ({"ld_alpha": 0.5}, {}, "`ld_alpha=0.5` has no meaning on lists"),
        ({"use_weighting": True}, {}, "`use_weighting=True` has no meaning on lists"),
        ({"discopop_tau": 0.1}, {}, "`discopop_tau=0.1` has no meaning on lists"),
        *[
            ({"loss_type": name}, {}, f"names '{name}', which TRL defines on chosen/rejected pairs only")
            for name in ("sigmoid", "ipo", "hinge", "aot", "bco_pair")
        ],
        ({"loss_type": ["listmle", "sigmoid"]}, {}, "names 'sigmoid'"),
        ({"loss_type": "listmle"}, {"loss_fn": listmle_loss}, "`loss_fn` and `loss_type=.*listmle.* are both given"),
        ({"lambda_weight": "ndcg"}, {"loss_fn": listmle_loss}, "`lambda_weight` has no effect on a `loss_fn`"),
    ],
)
def test_options_of_pairs_are_refused_on_lists_before_the_model_is_loaded(config, options, trainer_kwargs, named):
    with pytest.raises(ConfigError, match=named):
        LarPOTrainer(model="/no/such/model", args=config(**options), train_dataset=tiny.lists(), **trainer_kwargs)


def test_images_are_refused_on_lists(config):
    rows = [{"prompt": "p", "completions": [" a", " b"], "images": [[0]]}]
    with pytest.raises(ConfigError, match="train_dataset has images"):
        LarPOTrainer(model="/no/such/model", args=config(), train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize("train_dataset", [None, [{"prompt": "p"}], {"train": 1}])
def test_other_kinds_of_dataset_are_refused_as_in_trl(tiny_model, config, train_dataset):
    with pytest.raises((ValueError, TypeError), match="train_dataset"):
        LarPOTrainer(model=tiny_model, args=config(), train_dataset=train_dataset)


@pytest.mark.slow
def test_options_are_saved_as_they_were_given(trained, tmp_path):
    trainer = trained(tiny.lists(), {"loss_type": "listmle", "save_strategy": "steps", "save_steps": 3})
    assert trainer.args.loss_type == ["listmle"]
    saved = torch.load(tmp_path / "out" / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert isinstance(saved, LarPOConfig)
    assert saved.loss_type == ["listmle"]
    state = json.loads(Path(tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, steps", [({}, 200), ({"candidate_chunk_size": 2}, 60), ({"precompute_ref_log_probs": True}, 60)], ids=str
)
def test_nothing_piles_up_over_many_steps(trained, options, steps):
    live = {}

    class CountTensors(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (steps // 2, steps):
                gc.collect()  # the exact types: a test before this one may have left the symbolic tensors of a compiler
                found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
                live[state.global_step] = len(found), sum(each.nbytes for each in found)

    rows = tiny.lists(num_rows=50)
    trained(rows, options | {"max_steps": steps, "per_device_train_batch_size": 2}, callbacks=[CountTensors()])
    assert live[steps][0] == live[steps // 2][0] > 0
    assert live[steps][1] == pytest.approx(live[steps // 2][1], rel=0.01)  # the last batches differ in padding
