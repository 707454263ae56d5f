"""OnlineLarPOTrainer: one step of it is one step of LarPOTrainer on the same lists, whatever splits them."""

import copy
import itertools
import json
from pathlib import Path

import lanes
import pytest
import tiny
import torch
import trl
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler
from trajectories import assert_same_weights, trajectory, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

if not tiny.HAS_ONLINE:
    pytest.skip("OnlineLarPOTrainer needs TRL 1.16", allow_module_level=True)

from scripted_online import ONLINE, PROMPTS, Scripted, vowels
from trl.trainer.utils import RepeatSampler, nanstd, shuffle_sequence_dict, split_tensor_dict

from trl_larpo import ConfigError, DataError, LarPOTrainer, OnlineLarPOConfig, OnlineLarPOTrainer, cli
from trl_larpo.losses import RANKING_LOSSES, lambdarank_loss
from trl_larpo.training.groups import Group, Sample, collate_groups, total_rewards, whole_groups
from trl_larpo.training.objective import RankingObjective
from trl_larpo.training.sample_memory import SampleMemory


class InOrder(LarPOTrainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset or self.train_dataset)


class Gradients(TrainerCallback):
    def __init__(self):
        self.of_steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.of_steps.append(named)


@pytest.fixture
def online(tiny_model, config):
    """Trains online and returns the trainer."""

    def train(options=None, cls=Scripted, dataset=PROMPTS, resume=None, **kwargs):
        args = config(OnlineLarPOConfig, **(ONLINE | (options or {})))
        kwargs = {"model": tiny_model, "reward_funcs": vowels} | kwargs
        trainer = cls(args=args, train_dataset=dataset, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def lora(*more_modules, dropout=0.0):
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "v_proj", *more_modules]
    return peft.LoraConfig(r=4, target_modules=modules, lora_dropout=dropout, init_lora_weights=True)


VARIANTS = {
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "steps per generation": {"steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 4},
    "iterations": {"num_iterations": 2, "max_steps": 4},
    "all of them": {
        "steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2,
        "per_device_train_batch_size": 4, "max_steps": 4,
    },
    "chunks": {"candidate_chunk_size": 3},
    "separate rows": {"shared_prompt": "off"},
    "per token": {"per_token_scores": True, "beta": 2.0},
    "no reference": {"reference_free": True},
    "margin": {"target_margin": 0.5, "label_smoothing": 0.1},
    "divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "NLL": {"loss_type": ["listmle", "sft"], "loss_weights": [1.0, 0.5]},
    "drop": {"truncated_completions": "drop"},
    "by reward": {"truncated_completions": "by_reward"},
    "moving reference": {"ref_update_steps": 2, "num_iterations": 3, "max_steps": 5},
    "mixed reference": {
        "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "num_iterations": 3,
        "max_steps": 5,
    },
}  # fmt: skip
CASES = {loss: {"loss_type": [loss]} for loss in RANKING_LOSSES} | VARIANTS
CASES |= {f"LoRA, {name}": VARIANTS[name] for name in ("accumulation", "iterations")}


@pytest.mark.parametrize(
    "case", lanes.some_are_fast(CASES, {"lambdarank", "chunks", "iterations", "LoRA, accumulation"})
)
def test_a_step_equals_one_of_larpo_trainer(online, tiny_model, config, case):
    options = CASES[case]
    peft = {"peft_config": lora()} if case.startswith("LoRA") else {}
    found, expected = Gradients(), Gradients()
    ours = online(options, callbacks=[found], **peft)
    lists_per_batch = ours.args.per_device_train_batch_size // 4
    own = {"num_generations", "max_completion_length", "steps_per_generation", "num_iterations", "ref_update_steps"}
    settings = {name: value for name, value in (ONLINE | options).items() if name not in own}
    if "ref_update_steps" in options:
        steps = {"ref_model_sync_steps": options["ref_update_steps"], "ref_model_mixup_alpha": 1.0}
        settings |= {"sync_ref_model": True} | steps
    settings["per_device_train_batch_size"] = lists_per_batch
    theirs = InOrder(
        model=tiny_model,
        args=config(**settings),
        train_dataset=Dataset.from_list(list(ours.rows())),
        callbacks=[expected],
        **peft,
    )
    theirs.train()
    assert len(found.of_steps) == len(expected.of_steps) == ours.state.global_step > 1
    losses = [torch.tensor(trajectory(trainer, "loss"), dtype=torch.float64) for trainer in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert losses[0].abs().min() > 1e-3
    for ours_at, theirs_at in zip(found.of_steps, expected.of_steps, strict=True):
        assert ours_at.keys() == theirs_at.keys()
        for name, gradient in ours_at.items():
            torch.testing.assert_close(gradient, theirs_at[name], rtol=1e-6, atol=1e-6)
    assert_same_weights(ours.model, theirs.model, rtol=1e-5, atol=1e-6)


# Groups


@pytest.mark.parametrize(
    "num_processes, num_iterations",
    [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1), pytest.param(3, 1, marks=pytest.mark.slow)],
)
def test_groups_stay_whole_in_every_split(num_processes, num_iterations):
    """The way of a batch in GRPOTrainer, from its sampler to a batch of one step, for all processes."""
    for size, lists, steps in itertools.product((2, 3), (1, 2), (1, 3)):
        local = size * lists
        sampler = RepeatSampler(
            range(60), size, local * steps * num_processes // size, num_iterations * steps, seed=size
        )
        seen = []
        for process in range(num_processes):
            loader = DataLoader(range(60), batch_size=local * steps, sampler=sampler, collate_fn=list)
            loader = prepare_data_loader(loader, num_processes=num_processes, process_index=process)
            sampler.generator.manual_seed(1)
            for number, prompts in enumerate(loader.batch_sampler):
                batch = {
                    "prompt_ids": torch.tensor([[0, p + 100] for p in prompts]),
                    "prompt_mask": torch.tensor([[0, 1]] * len(prompts)),
                    "completion_ids": torch.tensor([[p + 100, place] for place, p in enumerate(prompts)]),
                    "completion_mask": torch.ones(len(prompts), 2, dtype=torch.long),
                }
                rewards = torch.arange(len(prompts)).float()
                groups = list(whole_groups(batch, rewards, [True] * len(prompts), size))
                parts = split_tensor_dict(shuffle_sequence_dict(collate_groups(groups, 0, "rank_last")), steps)
                places = []
                for part in parts:
                    assert part["candidate_mask"].shape == (lists, size) and part["candidate_mask"].all()
                    of_prompts = part["prompt_ids"][:, :1].expand(-1, size)
                    assert torch.equal(part["completion_ids"][:, :, 0], of_prompts)
                    assert torch.equal(part["completion_ids"][:, :, 1].float(), part["relevance"])
                    places += part["completion_ids"][:, :, 1].flatten().tolist()
                assert sorted(places) == list(range(len(prompts)))
                seen += [(number, p) for p in set(prompts)]
        # No group is on two processes: each prompt of a step is somewhere exactly once
        assert seen and len(set(seen)) == len(seen)


def test_splits_that_cut_groups_are_refused(config):
    for size, per_device in itertools.product(range(2, 6), range(1, 13)):
        options = {"num_generations": size, "per_device_train_batch_size": per_device, "steps_per_generation": size}
        if per_device % size == 0:
            config(OnlineLarPOConfig, **options)
        else:
            with pytest.raises(ConfigError, match=f"`per_device_train_batch_size` is {per_device}.*multiple of {size}"):
                config(OnlineLarPOConfig, **options)


def test_an_evaluation_that_cuts_groups_is_refused(config, online):
    options = {"num_generations": 4, "num_generations_eval": 3, "per_device_eval_batch_size": 4}
    with pytest.raises(ValueError, match="eval"):
        config(OnlineLarPOConfig, eval_strategy="steps", **options)
    with pytest.raises(ConfigError, match=r"`per_device_eval_batch_size` is 4.*`num_generations_eval` is 3"):
        online(options, eval_dataset=PROMPTS)


@pytest.mark.parametrize("size", [1, 2])
def test_evaluation(online, size):
    trainer = online({"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": size}, eval_dataset=PROMPTS)
    [first, *_] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert first["eval_list_size"] == size and 0 < first["eval_reward"] < 1
    assert first["eval_loss"] == 0 if size == 1 else 0 <= first["eval_ranking/accuracy"] <= 1


def test_metrics_leave_out_a_batch_without_a_finite_loss(online, monkeypatch):
    score, seen = RankingObjective.__call__, []

    def spoilt_at_first(self, policy, ref_logps, batch):
        seen.append(batch)
        if len(seen) == 1:
            policy.logps = policy.logps * float("nan")
        return score(self, policy, ref_logps, batch)

    monkeypatch.setattr(RankingObjective, "__call__", spoilt_at_first)
    trainer = online({"max_steps": 2, "logging_steps": 2})
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["logps/chosen"] < 0 and entry["rewards/margins"] == pytest.approx(0.0, abs=1e-4)


def test_prompts_that_an_environment_makes_different():
    batch = {
        "prompt_ids": torch.tensor([[0, 7, 8], [7, 8, 9]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[3, 4], [5, 0]]),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "tool_mask": torch.tensor([[1, 0], [1, 1]]),
    }
    [group] = whole_groups(batch, torch.tensor([1.0, torch.nan]), [True, False], 2)
    assert group.prompt_ids == [7, 8]
    assert group.samples == [Sample([3, 4], 1.0, True, [True, False]), Sample([9, 5], None, False, [False, True])]
    lists = collate_groups([group], 0, "rank_last")
    assert lists["scored_mask"].tolist() == [[[True, False], [False, True]]]
    assert lists["relevance"][0, 0] > lists["relevance"][0, 1] and lists["candidate_mask"].all()


def test_samples_that_cannot_be_ranked_are_left_out():
    groups = [
        Group([1], [Sample([2], 1.0, True), Sample([3], None, True), Sample([4], 5.0, False)]),
        Group([1], [Sample([5], None, True), Sample([6], None, False)]),
    ]
    kept = {
        choice: [
            tokens[mask][:, 0].tolist()
            for tokens, mask in zip(batch["completion_ids"], batch["candidate_mask"], strict=True)
        ]
        for choice in ("rank_last", "by_reward", "drop")
        for batch in [collate_groups(groups, 0, choice)]
    }
    assert kept == {"rank_last": [[2, 4], [6]], "by_reward": [[2, 4], []], "drop": [[2], []]}
    batch = collate_groups(groups, 0, "drop")
    scores = torch.zeros(batch["relevance"].shape, requires_grad=True)
    assert lambdarank_loss(scores, batch["relevance"], batch["candidate_mask"]).tolist() == [0.0, 0.0]


def test_a_step_of_which_nothing_can_be_ranked_changes_nothing(online, tiny_model):
    trainer = online({"truncated_completions": "drop", "max_completion_length": 1, "per_device_train_batch_size": 4},
                     cls=OnlineLarPOTrainer)  # fmt: skip
    before = AutoModelForCausalLM.from_pretrained(tiny_model)
    for weights, others in zip(trainer.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(weights, others)


def test_transformers_may_sample_in_continuous_batches(online):
    trainer = online({"use_transformers_continuous_batching": True, "shared_prompt": "on"}, cls=OnlineLarPOTrainer)
    assert trainer._policy_scorer.shares_prompt and trainer.state.global_step == 2


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_several_rewards(aggregation):
    values = torch.tensor([[1.0, 5.0], [2.0, torch.nan], [4.0, 9.0], [torch.nan, torch.nan]])
    found = total_rewards(values, torch.tensor([1.0, 0.5]), aggregation, 4)
    if aggregation == "sum_then_normalize":
        expected = torch.tensor([3.5, torch.nan, 8.5, torch.nan])
    else:
        normal = (values - values.nanmean(dim=0)) / (nanstd(values, dim=0) + 1e-4)
        expected = (normal * torch.tensor([1.0, 0.5])).nansum(dim=1)
        expected[[1, 3]] = torch.nan
    torch.testing.assert_close(found, expected, equal_nan=True)
    of_no_other = torch.tensor([[1.0, torch.nan], [1.0, torch.nan], [1.0, 5.0], [1.0, 5.0]])
    assert not total_rewards(of_no_other, torch.tensor([1.0, 0.5]), aggregation, 2).isnan().any()


def test_a_reward_that_is_infinite_is_refused(online):
    with pytest.raises(DataError, match="The reward endless is infinite"):

        def endless(completions, **columns):
            return [float("inf")] * len(completions)

        online(reward_funcs=endless)


def test_rewards_know_what_ended(online):
    seen = []

    def reward(completion_ids, finished, **columns):
        seen.extend((ids[-1], ended) for ids, ended in zip(completion_ids, finished, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    trainer = online(reward_funcs=reward)
    eos = trainer._tokenizer.eos_token_id
    assert all((last == eos) is ended for last, ended in seen) and {True, False} == {ended for _, ended in seen}


def test_columns_named_as_arguments_of_rewards_are_not_passed_on(online):
    """Any file of lists as prompts was a TypeError: multiple values for keyword argument 'completions'."""
    seen = set()

    def reward(completions, **columns):
        seen.update(columns)
        return [float(len(text)) for text in completions]

    rows = [{"prompt": f"{i} why", "completions": ["x"], "prompts": "y", "finished": "z", "more": i} for i in range(4)]
    online({"max_steps": 1}, dataset=Dataset.from_list(rows), reward_funcs=reward)
    assert "more" in seen and "completions" not in seen


def test_prompts_are_looked_for_before_models_are_loaded(tmp_path, tiny_model, capsys):
    (tmp_path / "a.jsonl").write_text('{"question": "why", "answer": "so"}\n')
    flags = ["--model_name_or_path", tiny_model, "--reward_funcs", "org/judge", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["online", "--dataset_name", str(tmp_path / "a.jsonl"), "--use_cpu", *flags]) == 2
    assert "train_dataset has no column `prompt`. Its columns: question, answer." in capsys.readouterr().err


def test_tokens_of_tools_are_seen_and_not_scored(online, tiny_model, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # of `rollout_func`

    def rollout(prompts, trainer):
        tokenize = trainer._tokenizer
        ids = [tokenize(prompt)["input_ids"] for prompt in prompts]
        completions = [tokenize(f" ab {'xyz' * (i % 3)} c")["input_ids"] for i in range(len(prompts))]
        masks = [[int(4 <= place < len(tokens) - 2) ^ 1 for place in range(len(tokens))] for tokens in completions]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": masks}

    trainer = online({"max_steps": 1, "learning_rate": 0.0}, rollout_func=rollout)
    [batch] = trainer.batches
    outputs = trainer._policy_scorer(trainer.model, {name: batch[name] for name in batch})
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for i, j in itertools.product(range(2), range(4)):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i, j][batch["completion_mask"][i, j].bool()]
        scored = batch["scored_mask"][i, j][: len(completion)]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion])[None]).logits[0].log_softmax(-1)
        of_tokens = logits[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]
        torch.testing.assert_close(outputs.logps[i, j], of_tokens[scored].sum(), rtol=1e-5, atol=1e-4)
        assert outputs.tokens["count"][i, j] == scored.sum() and (len(completion) > 6) == (not scored.all())


# The reference


def advantages(loss_type, worse):
    """Of the candidates of a list, as docs/online.md has them, for β = 1; `worse[i, j]`: j is worse than i."""
    num_worse, num_better = worse.sum(dim=1), worse.sum(dim=0)
    best = ((num_better == 0) & (num_worse > 0)).float()
    last = ((num_worse == 0) & (num_better > 0)).float()
    share = worse / (1 + num_worse)[:, None]  # what a candidate takes from each worse one
    of_best = best / best.sum().clamp(min=1)
    return {
        "lambdarank": (num_worse - num_better) / 2,
        "listmle": share.sum(dim=1) - share.sum(dim=0),
        "contrastive": of_best * share.sum(dim=1) - (of_best[:, None] * share).sum(dim=0),
        "pairwise": (of_best - last / last.sum().clamp(min=1)) / 2,
    }[loss_type]


@pytest.mark.parametrize(
    "loss_type", lanes.some_are_fast(["lambdarank", "listmle", "contrastive", "pairwise"], {"lambdarank"})
)
def test_on_policy_the_gradient_is_a_policy_gradient_with_advantages_of_ranks(online, tiny_model, loss_type):
    gradients = Gradients()
    options = {"loss_type": [loss_type], "ref_update_steps": 1, "beta": 0.3, "max_steps": 1, "max_grad_norm": 0.0}
    trainer = online(options, callbacks=[gradients])
    assert trainer.ref_model is None
    [batch] = trainer.batches
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    objective = 0.0
    for i, relevance in enumerate(batch["relevance"]):
        worse = (relevance[:, None] > relevance[None, :]).float()
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        of_list = advantages(loss_type, worse).tolist()
        assert sum(of_list) == pytest.approx(0, abs=1e-6) and max(of_list) > 0
        for j, advantage in enumerate(of_list):
            completion = batch["completion_ids"][i, j][batch["completion_mask"][i, j].bool()]
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, completion[:, None]).sum()
            objective = objective + 0.3 * advantage * logp / len(batch["relevance"])
    (-objective).backward()
    [found] = gradients.of_steps
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("adapter", lanes.some_are_fast([False, True], {True}))
def test_the_reference_follows_the_policy(online, adapter):
    scores = {}
    for steps in (1, 2, 100):
        options = {"ref_update_steps": steps, "max_steps": 4, "learning_rate": 1e-2}
        trainer = online(options, **({"peft_config": lora()} if adapter else {}))
        scores[steps] = [value == 0 for [value] in trajectory(trainer, "rewards/margins")]
    # Right after it was replaced, all scores are 0
    assert scores == {1: [True] * 4, 2: [True, False] * 2, 100: [True, False, False, False]}


def test_the_reference_follows_an_adapter_on_embeddings(online):
    options = {"ref_update_steps": 2, "max_steps": 3, "learning_rate": 1e-2}
    trainer = online(options, peft_config=lora("embed_tokens"))
    assert [value == 0 for [value] in trajectory(trainer, "rewards/margins")] == [True, False, True]


@pytest.mark.parametrize("steps", [None, 2])
def test_scores_of_a_reference_in_the_policy_have_no_dropout(online, tmp_path, steps):
    model = tiny.save_tiny_model(tmp_path / "model", attention_dropout=0.5)
    options = {"ref_update_steps": steps, "max_steps": 1, "disable_dropout": False}
    trainer = online(options, model=model, peft_config=lora(dropout=0.5))
    assert trainer.ref_model is None and ("ref" in trainer.model.peft_config) == (steps == 2)
    trainer.model.train()
    modes = [module.training for module in trainer.model.modules()]
    first, second = (trainer._score_reference(trainer.model, trainer.batches[0]) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    policy = [trainer._policy_scorer(trainer.model, trainer.batches[0]).logps for _ in range(2)]
    assert not torch.equal(*policy)  # the policy keeps its dropout
    assert [module.training for module in trainer.model.modules()] == modes


def test_dropout_is_disabled_in_the_adapter_of_the_reference(online):
    options = {"ref_update_steps": 2, "max_steps": 3, "learning_rate": 1e-2, "disable_dropout": True}
    trainer = online(options, peft_config=lora(dropout=0.5))
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {0}
    assert [value == 0 for [value] in trajectory(trainer, "rewards/margins")] == [True, False, True]


def test_a_deep_copy_of_a_trained_model_is_trained_online(online, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    online({"max_steps": 1}, model=model)
    other = copy.deepcopy(model)
    before = weights_of(model)
    online({"max_steps": 1, "learning_rate": 1e-2}, model=other)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(other).items())


def test_memory_keeps_the_latest_and_joins_what_is_new():
    def group(*tokens):
        return Group([1], [Sample([token], float(token), True) for token in tokens])

    memory = SampleMemory(3)
    assert memory.join(group(5, 6)) == group(5, 6)
    memory.remember([group(5, 6)])
    memory.remember([Group([1], [Sample([7], None, True), *group(8, 5).samples]), Group([2], group(9).samples)])
    assert memory.join(group(8, 4)) == group(8, 4, 5, 6)
    copy = SampleMemory(3)
    copy.from_rows(json.loads(json.dumps(memory.to_rows())))
    assert copy.join(group(8, 4)) == group(8, 4, 5, 6)
    empty = SampleMemory(0)
    empty.remember([group(5)])
    assert empty.to_rows() == []


def test_lists_grow_by_memory(online):
    trainer = online({"memory_size": 3, "max_steps": 4})  # two epochs
    sizes = [value for [value] in trajectory(trainer, "list_size")]
    assert sizes[:2] == [4, 4] and all(4 < size <= 7 for size in sizes[2:])
    fresh = trainer.batches[2]["completion_ids"][0, :4]
    assert not any(torch.equal(fresh[0], earlier) for earlier in trainer.batches[2]["completion_ids"][0, 4:])


# Checkpoints

RESUMED = {  # the samples are trained on in eight steps; the reference is replaced after each second step
    "num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
    "ref_update_steps": 2, "memory_size": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 9,
    "truncated_completions": "by_reward",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["model", "adapter", "mixed"])
def test_a_resumed_training_ends_as_an_uninterrupted_one(online, tmp_path, reference):
    peft = {"peft_config": lora()} if reference == "adapter" else {}

    def letters(completions, **columns):
        return [float(len(set(text))) for text in completions]

    def logged(trainer):
        timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [{name: value for name, value in entry.items() if name not in timed} for entry in entries]

    options = {**RESUMED, "output_dir": str(tmp_path / "whole"), "learning_rate": 3e-3}
    if reference == "mixed":
        options |= {"ref_update_steps": None, "sync_ref_model": True, "ref_model_sync_steps": 2}
    peft |= {"cls": OnlineLarPOTrainer, "reward_funcs": letters}
    whole = online(options, **peft)
    assert min(entry["loss"] for entry in logged(whole)) > 0.1
    for step in (3, 4, 6):  # in the middle of the samples, at the end of an epoch, in the second epoch
        resumed = online(
            options | {"output_dir": str(tmp_path / str(step))},
            resume=str(tmp_path / "whole" / f"checkpoint-{step}"),
            **peft,
        )
        assert logged(resumed) == logged(whole)
        assert_same_weights(resumed.model, whole.model, rtol=0, atol=0)


def test_a_checkpoint_of_other_processes_resumes_with_new_samples(online, tmp_path):
    folder = tmp_path / "out"
    online({"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "max_steps": 1})
    path = folder / "checkpoint-1" / "online-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_processes": 2}))
    trainer = online({"num_iterations": 2}, resume=str(folder / "checkpoint-1"))
    assert trainer.state.global_step == 2 and len(trainer.batches) == 1


# Options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": 0.3}, "`epsilon=0.3` belongs to GRPO's loss"),
        ({"cast_lm_head_to_fp32": True}, "`cast_lm_head_to_fp32=True` belongs to GRPO's loss"),
        ({"scale_rewards": False}, "`scale_rewards='none'` belongs to GRPO's loss"),
        ({"vllm_importance_sampling_correction": True}, "`vllm_importance_sampling_correction=True` belongs"),
        ({"mask_truncated_completions": True}, "Set `truncated_completions` to 'drop'"),
        ({"loss_type": "dapo"}, "'dapo', which is unknown"),
        ({"loss_type": ["sigmoid"]}, "on two completions 'lambdarank' is 'sigmoid'"),
        ({"loss_weights": [1.0, 2.0]}, "`loss_weights` has 2 numbers for 1 losses"),
        ({"beta": 0.0}, "`beta` is 0.0; it must be greater than 0"),
        ({"temperature": 0.0}, "`temperature` is 0.0; samples that differ need one above 0"),
        ({"f_divergence_type": "kl"}, "`f_divergence_type` is 'kl'"),
        ({"ref_update_steps": 0}, "`ref_update_steps` is 0; it must be at least 1"),
        ({"ref_update_steps": 2, "sync_ref_model": True}, "`sync_ref_model` and `ref_update_steps` exclude"),
        ({"ref_update_steps": 2, "reference_free": True}, "`reference_free` and `ref_update_steps` exclude"),
        ({"memory_size": -1}, "`memory_size` is -1"),
        (
            {"memory_size": 2, "multi_objective_aggregation": "normalize_then_sum"},
            r"`memory_size=2`.*`multi_objective_aggregation='normalize_then_sum'`.*Set `memory_size` to 0, or",
        ),
        ({"lambda_weight": "ndcg", "loss_type": ["listmle"]}, "`lambda_weight='ndcg'` belongs to 'lambdarank'"),
    ],
)
def test_impossible_options_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(OnlineLarPOConfig, **(ONLINE | options))


def test_what_the_trainer_refuses(tiny_model, config):
    args = config(OnlineLarPOConfig, **ONLINE)
    arguments = {"model": tiny_model, "reward_funcs": vowels, "train_dataset": PROMPTS}
    with pytest.raises(ConfigError, match="OnlineLarPOTrainer takes an OnlineLarPOConfig"):
        OnlineLarPOTrainer(args=config(trl.GRPOConfig, num_generations=4), **arguments)
    with pytest.raises(ConfigError, match="`loss_fn` and `loss_type="):
        args.loss_type = ["listmle"]
        OnlineLarPOTrainer(args=args, loss_fn=lambdarank_loss, **arguments)
    images = PROMPTS.add_column("image", [None] * len(PROMPTS))
    with pytest.raises(ConfigError, match="train_dataset has images"):
        OnlineLarPOTrainer(args=args, **(arguments | {"train_dataset": images}))


def test_a_loss_of_the_users_own(online):
    seen = []

    def my_loss(scores, relevance, mask):
        seen.append((scores.dtype, relevance.shape, mask.dtype))
        return lambdarank_loss(scores, relevance, mask)

    own, named = online(loss_fn=my_loss), online()
    assert trajectory(own, "loss") == trajectory(named, "loss")
    assert set(seen) == {(torch.float32, torch.Size([2, 4]), torch.bool)}


# The command


@pytest.mark.slow
def test_larpo_online(project, talkative_model, capsys):
    flags = [
        "online", "--model_name_or_path", talkative_model, "--dataset_name", "prompts.jsonl", "--reward_funcs",
        "run_rewards:vowels", "pairwise:run_rewards:prefer_longer", "--reward_weights", "1", "0.1", "--num_generations",
        "4", "--per_device_train_batch_size", "8", "--max_completion_length", "12", "--use_cpu", "--bf16", "false",
        "--report_to", "none", "--output_dir", "aligned", "--save_steps", "1", "--logging_steps", "1",
    ]  # fmt: skip
    assert cli.main([*flags, "--max_steps", "1"]) == 0
    assert cli.main([*flags, "--max_steps", "2", "--resume_from_checkpoint", "last"]) == 0
    assert "Model saved to aligned" in capsys.readouterr().out
    AutoTokenizer.from_pretrained("aligned")
    AutoModelForCausalLM.from_pretrained("aligned")
    history = json.loads((project / "aligned/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert {"rewards/run_rewards:vowels/mean", "rewards/pairwise:run_rewards:prefer_longer/mean"} <= history[0].keys()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "No model: give"),
        (["--model_name_or_path", "m"], "No data: give `dataset_name`"),
        (["--num_generations", "3"], "`per_device_train_batch_size` is 8"),
    ],
)
def test_larpo_online_names_what_is_missing(tmp_path, capsys, flags, message):
    assert cli.main(["online", "--output_dir", str(tmp_path), "--use_cpu", *flags]) == 2
    assert message in capsys.readouterr().err


def test_options_of_rewards_reach_them(tiny_model, tmp_path, monkeypatch):
    given = []

    class Stop(Exception):
        pass

    def stop(options, **settings):
        given.append((options.reward_max_length, options.reward_dtype, options.reward_batch_size, settings))
        raise Stop

    monkeypatch.setattr("trl_larpo.commands.RewardScorer", stop)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "why"}\n')
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "prompts.jsonl"), "--use_cpu"]
    flags += ["--reward_funcs", "owner/model", "--reward_batch_size", "3", "--reward_max_length", "9"]
    with pytest.raises(Stop):
        cli.main(["online", "--output_dir", str(tmp_path), "--reward_dtype", "bfloat16", *flags])
    assert given == [(9, "bfloat16", 3, {"use_cpu": True})]


@pytest.mark.slow
def test_the_examples(talkative_model, monkeypatch, tmp_path, capsys):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    flags = ["--model_name_or_path", talkative_model, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    config = ["online", "--config", "examples/online/cpu.yaml", "--max_completion_length", "8", *flags]
    assert cli.main(config) == 0
    # The one for GPUs is read, and stops where its data would come from the hub
    gpus = ["online", "--config", "examples/online/vllm_8_gpus.yaml", "--bf16", "false", "--use_cpu", *flags]
    assert cli.main(gpus) == 2
    assert "'trl-lib/ultrafeedback-prompt' cannot be read" in capsys.readouterr().err


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: First number.
        b: Second number.

    Returns:
        The product.
    """
    return a * b


class CallsTools(Scripted):
    """Every other completion calls a tool and then answers; the others answer at once."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
        texts = []
        for place, ids in enumerate(prompt_ids):
            asks = place % 2 == 0 and "<tool_response>" not in self._tokenizer.decode(ids)
            texts.append(call if asks else f"It is {'six ' * (place % 3)}")
        return [self._tokenizer(f"{text}<|im_end|>")["input_ids"] for text in texts], None


def test_tools_run_as_in_grpo_trainer(online, tmp_path):
    model = tiny.save_tiny_model(tmp_path / "model", max_position_embeddings=4096)  # bytes of a long template
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = Path(trl.__file__).with_name("chat_templates").joinpath("qwen3.jinja").read_text()
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"2 x 3, {i}"}] for i in range(2)]})

    def reward(completions, **columns):
        return [float(len(str(completion[-1]["content"]))) for completion in completions]

    options = {"max_steps": 1, "max_completion_length": 300, "loss_type": ["listmle"]}
    tools = {"processing_class": tokenizer, "tools": [multiply]}
    trainer = online(options, CallsTools, prompts, model=model, reward_funcs=reward, **tools)
    [batch] = trainer.batches
    used = [entry["tools/call_frequency"] for entry in trainer.state.log_history if "loss" in entry]
    assert used == [0.5]
    decode = tokenizer.decode
    names = ("completion_ids", "completion_mask", "scored_mask")
    for ids, real, scored in zip(*(batch[name].flatten(0, 1) for name in names), strict=True):
        text, written = decode(ids[real.bool()]), decode(ids[real.bool() & scored])
        assert written.endswith("<|im_end|>") and "<tool_response>" not in written
        assert ("\n6\n" in text) == ("<tool_response>" in text) == ("<tool_call>" in written)
