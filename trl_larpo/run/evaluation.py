"""Numbers of an evaluation on held-out prompts: rewards, best of N, lengths, and the gain over the initial model."""

import math
import statistics
from typing import Any

from ..candidates import CandidatePool

MIN_PROMPTS_TO_JUDGE = 8
"""With fewer prompts a standard error is too uncertain to act on."""


FALSE_ALARMS = 0.001
"""How often a reward that stayed the same in an iteration is taken for one that fell."""


def fell(change: dict[str, float | None], num_prompts: int, num_errors: float | None = None) -> bool:
    """
    Whether a reward fell.

    Args:
        change: Mean of its change and the standard error over prompts.
        num_prompts: How many prompts.
        num_errors: By more than how many standard errors. By default those of Student's t-test with [`FALSE_ALARMS`]:
            3.7 with 16 prompts, 3.2 with 64.
    """
    if num_prompts < MIN_PROMPTS_TO_JUDGE or change["mean"] is None or change["standard_error"] is None:
        return False
    if num_errors is None:
        num_errors = student_quantile(1 - FALSE_ALARMS, num_prompts - 1)
    return change["mean"] < -num_errors * change["standard_error"]


def student_quantile(level: float, freedom: int) -> float:
    """
    Quantile of Student's t-distribution, to 1 % from 7 degrees of freedom on (Abramowitz and Stegun, 26.7.5).

    Args:
        level: In (0, 1).
        freedom: Degrees of freedom.
    """
    z = statistics.NormalDist().inv_cdf(level)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def evaluate(pools: list[CandidatePool], start: list[CandidatePool]) -> dict[str, Any]:
    """
    Sums up scored samples of held-out prompts.

    Args:
        pools: Prompts with the scored samples of a model.
        start: The same of the initial model.

    Returns:
        `reward` and `gain` (over the initial model, by prompt) as mean and standard error over prompts; `best_of_n`,
        the expected best reward of N samples for N from 1 to the number of samples; `tokens`, the mean number of
        tokens; `finished` and `distinct`, shares of the samples; `unrewarded`, samples to which no reward applied.
    """
    means, before = means_by_prompt(pools), means_by_prompt(start)
    samples = [candidate for pool in pools for candidate in pool.candidates]
    lengths = [sample.num_tokens for sample in samples if sample.num_tokens is not None]
    return {
        "prompts": len(pools),
        "samples": len(samples),
        "reward": mean_and_error(list(means.values())),
        "gain": mean_and_error([means[name] - before[name] for name in means if name in before]),
        "best_of_n": best_of_n(pools),
        "tokens": statistics.fmean(lengths) if lengths else None,
        "finished": statistics.fmean(sample.finished for sample in samples),
        "distinct": statistics.fmean(len({c.text for c in pool.candidates}) / len(pool.candidates) for pool in pools),
        "unrewarded": sum(sample.reward is None for sample in samples),
    }


def means_by_prompt(pools: list[CandidatePool]) -> dict[str, float]:
    """Mean reward of each prompt's samples, by the prompt's name. Prompts without any reward are left out."""
    rewards = {pool.prompt.id: [c.reward for c in pool.candidates if c.reward is not None] for pool in pools}
    return {name: statistics.fmean(known) for name, known in rewards.items() if known}


def mean_and_error(values: list[float]) -> dict[str, float | None]:
    """Mean and its standard error; `None` where there are too few values."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "standard_error": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
    }


def best_of_n(pools: list[CandidatePool]) -> list[float]:
    """
    Expected best reward among N samples of a prompt, averaged over prompts, for N = 1, 2, ...

    The average over all choices of N of the samples, without repetition: unbiased, as recall@N is, which it equals for
    rewards of 0 and 1.
    """
    rewards = [[c.reward for c in pool.candidates if c.reward is not None] for pool in pools]
    rewards = [sorted(of_prompt) for of_prompt in rewards if of_prompt]
    if not rewards:
        return []
    return [
        statistics.fmean(_expected_best(of_prompt, n) for of_prompt in rewards)
        for n in range(1, min(map(len, rewards)) + 1)
    ]


def _expected_best(ascending: list[float], n: int) -> float:
    """The i-th smallest is the best of n in C(i, n - 1) of C(count, n) choices (i from 0)."""
    count = len(ascending)
    return math.fsum(math.comb(i, n - 1) / math.comb(count, n) * value for i, value in enumerate(ascending))
