"""Effects with intervals, where the same prompts were measured with several seeds."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

GOAL = 0.03
"""Half width of the intervals that the study aims at, in units of the reward. Smaller differences are called none."""


@dataclass(frozen=True)
class Effect:
    """
    A mean difference with its interval.

    Attributes:
        mean: The mean over seeds and prompts.
        low: Lower end of the interval.
        high: Upper end.
        num_seeds: Number of seeds.
    """

    mean: float
    low: float
    high: float
    num_seeds: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def verdict(self) -> str:
        """What the interval says, in a word or two."""
        if self.num_seeds == 1:
            return "one seed: cannot tell"  # the interval does not cover other seeds
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return "no difference" if max(-self.low, self.high) <= GOAL else "cannot tell"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def effect(differences: np.ndarray, confidence: float = 0.95) -> Effect:
    """
    The mean of paired differences, with an interval for new seeds and new prompts.

    Seeds and prompts are random and crossed: every seed has its own samples, order and training, all have the same
    prompts. The variance of the mean is estimated from the mean squares of a two-way analysis of variance without
    replication (seeds, prompts, and what remains), its degrees of freedom by Satterthwaite's formula.

    Args:
        differences: `(seeds, prompts)`.
        confidence: Of the interval.

    Returns:
        The effect. With a single seed the interval is over prompts alone.
    """
    num_seeds, num_prompts = differences.shape
    mean = float(differences.mean())
    by_seed, by_prompt = differences.mean(axis=1), differences.mean(axis=0)
    of_prompts = num_seeds * by_prompt.var(ddof=1)
    if num_seeds == 1:
        parts = [(of_prompts, 1.0, num_prompts - 1)]
    else:
        of_seeds = num_prompts * by_seed.var(ddof=1)
        rest = differences - by_seed[:, None] - by_prompt[None, :] + mean
        of_rest = (rest**2).sum() / ((num_seeds - 1) * (num_prompts - 1))
        parts = [(of_seeds, 1.0, num_seeds - 1)]
        if of_prompts > of_rest:
            parts += [(of_prompts, 1.0, num_prompts - 1), (of_rest, -1.0, (num_seeds - 1) * (num_prompts - 1))]
    total = sum(sign * square for square, sign, _ in parts)
    if total <= 0:
        return Effect(mean, mean, mean, num_seeds)
    freedom = total**2 / sum(square**2 / degrees for square, _, degrees in parts)
    half = stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(total / differences.size)
    return Effect(mean, mean - half, mean + half, num_seeds)


def seeds_needed(differences: np.ndarray, half_width: float = GOAL, confidence: float = 0.95) -> int | None:
    """
    How many seeds an interval of `mean ± half_width` would take, if seeds and prompts vary as much as here.

    Args:
        differences: `(seeds, prompts)`, of at least two seeds.
        half_width: Half of the interval's width.
        confidence: Of the interval.

    Returns:
        The number of seeds; `None` if with these prompts no number of seeds is enough, or above 1000.
    """
    num_seeds, num_prompts = differences.shape
    by_seed, by_prompt = differences.mean(axis=1), differences.mean(axis=0)
    rest = differences - by_seed[:, None] - by_prompt[None, :] + differences.mean()
    of_rest = (rest**2).sum() / ((num_seeds - 1) * (num_prompts - 1))
    of_seeds = by_seed.var(ddof=1)
    of_prompts = max(0.0, by_prompt.var(ddof=1) - of_rest / num_seeds) / num_prompts
    for count in range(2, 1001):
        variance = of_seeds / count + of_prompts
        freedom = variance**2 / ((of_seeds / count) ** 2 / (count - 1) + of_prompts**2 / (num_prompts - 1))
        if stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(variance) <= half_width:
            return count
    return None
