"""Several processes share what is left of a step, also when it is resumed."""

from types import SimpleNamespace

import pytest
from small_run import rows_of

from trl_larpo import shares
from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.generation import sampler
from trl_larpo.generation.options import GenerationOptions
from trl_larpo.generation.sampling_task import SampleKind, SamplingTask
from trl_larpo.prompts import Prompt
from trl_larpo.rewards import scorer
from trl_larpo.rewards.functions import Reward
from trl_larpo.rewards.options import RewardOptions
from trl_larpo.storage import GrowingFile

POOLS = [CandidatePool(Prompt.of(f"prompt {number}"), [Candidate("yes"), Candidate("no")]) for number in range(8)]
LEFT = {1, 3, 5, 7}  # by a process that ended early: before, all of them were its own


@pytest.fixture
def as_process(monkeypatch):
    """Makes this process one of two."""

    def become(index):
        state = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=False, wait_for_everyone=lambda: None, device="cpu"
        )
        for module in (shares, sampler, scorer):
            monkeypatch.setattr(module, "PartialState", lambda: state)

    return become


def number_of(prompt):
    return int(prompt.text.split()[1])


@pytest.mark.parametrize("index, mine", [(0, [1, 5]), (1, [3, 7])])
def test_prompts_that_are_left_are_sampled_by_all_processes(tmp_path, monkeypatch, as_process, index, mine):
    path, sampled = tmp_path / "samples.jsonl", []
    GrowingFile(path).add([pool.to_row() for pool in POOLS if number_of(pool.prompt) not in LEFT])

    def sample_pools(model, tokenizer, prompts, *arguments):
        sampled.extend(map(number_of, prompts))
        return [POOLS[number_of(prompt)] for prompt in prompts]

    monkeypatch.setattr(sampler, "sample_pools", sample_pools)
    as_process(index)
    policy = sampler.PolicySampler(GenerationOptions(generation_batch_size=1), seed=0, log_folder=tmp_path)
    monkeypatch.setattr(policy, "_load", lambda *arguments: (None, None))
    task = SamplingTask([SampleKind("policy", 1.0)] * 4, "model", 1, "key")  # four samples: a unit is one prompt
    policy.sample([pool.prompt for pool in POOLS], task, path)
    assert sampled == mine
    rows = rows_of(f"{path}.partial-{index}")
    assert {POOLS[number].prompt.id for number in mine} <= {row["prompt_id"] for row in rows}


@pytest.mark.parametrize("index, mine", [(0, [1, 5]), (1, [3, 7])])
def test_prompts_that_are_left_are_rewarded_by_all_processes(tmp_path, monkeypatch, as_process, index, mine):
    path, rewarded = tmp_path / "rewarded.jsonl", []
    done = [pool for pool in POOLS if number_of(pool.prompt) not in LEFT]
    GrowingFile(path).add([scorer.saved_scores(pool, scorer.pool_digest(pool)) for pool in done])

    def reward(prompts, completions, **columns):
        rewarded.extend(dict.fromkeys(int(prompt.split()[1]) for prompt in prompts))
        return [1.0] * len(prompts)

    as_process(index)
    monkeypatch.setattr(scorer, "_COMPLETIONS_PER_CALL", 2)  # those of one prompt
    judge = scorer.RewardScorer(RewardOptions(reward_funcs=["mine"]), use_cpu=True)
    monkeypatch.setattr(judge, "_rewards", [Reward("mine", reward, 1.0)])
    judge.score(POOLS, path)
    assert rewarded == mine
