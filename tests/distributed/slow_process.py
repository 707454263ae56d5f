"""One of two processes that prepare, sample and reward. Each is later than any collective may wait, at times."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from torch.distributed import distributed_c10d

from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.generation import sampler
from trl_larpo.generation.options import GenerationOptions
from trl_larpo.generation.sampling_task import SampleKind, SamplingTask
from trl_larpo.prompts import Prompt
from trl_larpo.rewards import scorer
from trl_larpo.rewards.functions import Reward
from trl_larpo.rewards.options import RewardOptions
from trl_larpo.waiting import main_process_first

LIMIT, SECONDS_OF_A_PROMPT = 2.0, 0.75  # each process has four prompts

POOLS = [CandidatePool(Prompt.of(f"prompt {number}"), [Candidate("yes"), Candidate("no")]) for number in range(8)]


def prepare():
    with main_process_first():  # before any other wait
        if PartialState().is_main_process:
            time.sleep(1.5 * LIMIT)


def sample(folder):
    def sample_pools(model, tokenizer, prompts, *arguments):
        time.sleep(SECONDS_OF_A_PROMPT * PartialState().process_index)
        return [pool for pool in POOLS if pool.prompt in prompts]

    sampler.sample_pools = sample_pools
    policy = sampler.PolicySampler(GenerationOptions(generation_batch_size=1), seed=0, log_folder=folder)
    policy._load = lambda *arguments: (None, None)
    task = SamplingTask([SampleKind("policy", 1.0)] * 4, "model", 1, "key")  # four samples: a unit is one prompt
    return policy.sample([pool.prompt for pool in POOLS], task, folder / "samples.jsonl")


def reward(folder):
    def slow(prompts, completions, **columns):
        time.sleep(SECONDS_OF_A_PROMPT * PartialState().process_index)
        return [1.0] * len(prompts)

    scorer._COMPLETIONS_PER_CALL = 2  # those of one prompt
    judge = scorer.RewardScorer(RewardOptions(reward_funcs=["slow"]), use_cpu=True)
    judge._rewards = [Reward("slow", slow, 1.0)]
    return judge.score(POOLS, folder / "rewarded.jsonl")


folder = Path(sys.argv[1])
PartialState(cpu=True).wait_for_everyone()
# Not before, as imports may take longer in one of the two
distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT))
distributed_c10d._get_default_store().set_timeout(timedelta(seconds=LIMIT))
prepare()
print(f"{len(sample(folder))} sampled, {len(reward(folder))} rewarded", flush=True)
os._exit(0)
