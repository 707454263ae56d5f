"""What a model is worth: the stages `held_out_samples`, `held_out` and `evaluate`."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ..candidates import Candidate, CandidateList, CandidatePool
from ..generation.sampler import finish_samples
from ..pools import read_pools
from ..storage import GrowingFile, write_json
from .context import RunContext
from .evaluation import evaluate as evaluate_pools

# Prompts differ more than completions of one prompt do, so more of them would tell more than more completions of each
MAX_KL_PROMPTS = 128
MAX_KL_COMPLETIONS = 2
"""Of each prompt."""


def held_out_samples(context: RunContext, iteration: int, path: Path) -> None:
    """Samples on held-out prompts."""
    pools = context.sampler.sample(context.folder.held_out, context.held_out_task(iteration), path)
    if PartialState().is_main_process:
        finish_samples(path, pools)


def held_out(context: RunContext, iteration: int, path: Path) -> None:
    """Rewards the samples on held-out prompts."""
    samples = path.with_name("held_out_samples.jsonl")
    description, against = f"Iteration {iteration}: rewarding held-out", context.initial_completions()
    scored = context.scorer.score(read_pools(samples), path, description, against=against)
    if PartialState().is_main_process:
        GrowingFile.finish(path, (pool.to_row() for pool in scored))


def evaluate(context: RunContext, iteration: int, path: Path) -> None:
    """Compares the samples on held-out prompts with those of the initial model."""
    pools = list(read_pools(path.with_name("held_out.jsonl")))
    # Of what was sampled: in the rewarded file completions may lack their thoughts
    samples = read_pools(path.with_name("held_out_samples.jsonl"))
    divergence = kl_from_initial(context, samples, iteration) if iteration else None
    if PartialState().is_main_process:
        folder = context.folder
        start = list(read_pools(folder.iteration(0) / "held_out.jsonl")) if iteration else pools
        before = list(read_pools(folder.iteration(iteration - 1) / "held_out.jsonl")) if iteration else pools
        change = evaluate_pools(pools, before)["gain"]
        write_json(path, evaluate_pools(pools, start) | {"change": change, "kl_from_initial": divergence})


def kl_from_initial(
    context: RunContext, pools: Sequence[CandidatePool], iteration: int
) -> dict[str, float | int | None] | None:
    """
    Estimate of the KL divergence of the policy from the initial model, in nats per completion.

    The mean of log π_θ - log π_initial over completions that the policy sampled: unbiased at temperature 1. It takes
    the first [`MAX_KL_COMPLETIONS`] of each of [`MAX_KL_PROMPTS`] prompts.

    Args:
        context: The run.
        pools: Held-out prompts with samples of the policy.
        iteration: The policy is the model that it ends with.
    """
    lists, counts = [], []
    for pool in itertools.islice(pools, MAX_KL_PROMPTS):
        sampled = [candidate for candidate in pool.candidates if candidate.text.strip()][:MAX_KL_COMPLETIONS]
        if sampled:
            distinct: dict[tuple[str, bool], Candidate] = {_key(candidate): candidate for candidate in sampled}
            lists.append(CandidateList(pool.prompt, list(distinct.values())))
            counts.append([Counter(map(_key, sampled))[key] for key in distinct])
    if not lists:
        return None
    from .training_stages import log_probabilities  # here, as to sample and reward held-out prompts needs no trainer

    policy, initial = (
        log_probabilities(context, lambda: lists, number, context.folder.iteration(iteration))
        for number in (iteration, 0)
    )
    by_prompt = []
    for made, of_list in zip(lists, counts, strict=True):
        if (name := made.prompt.id) in policy:  # it is not where its prompt fills `max_length`
            log_ratios = [p - q for p, q in zip(policy[name], initial[name], strict=True)]
            by_prompt.append(sum(x * count for x, count in zip(log_ratios, of_list, strict=True)) / sum(of_list))
    if not by_prompt:
        return None
    error = statistics.stdev(by_prompt) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else None
    return {"mean": statistics.fmean(by_prompt), "standard_error": error, "prompts": len(by_prompt)}


def _key(candidate: Candidate) -> tuple[str, bool]:
    return candidate.text, candidate.finished
