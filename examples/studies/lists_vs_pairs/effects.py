"""Effects with intervals, where the same prompts were measured with several seeds."""

import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class BetweenSeeds:
    """
    How much the mean difference of two arms varies between seeds.

    Attributes:
        variance: Variance of a seed's mean difference.
        degrees: Degrees of freedom of the estimate that each seed after the first one adds.
    """

    variance: float
    degrees: int = 1

    @classmethod
    def of(cls, differences: np.ndarray) -> "BetweenSeeds":
        """Estimated from the differences, `(seeds, prompts)`, alone."""
        return cls(float(differences.mean(axis=1).var(ddof=1)))

    @classmethod
    def pooled(cls, found: Sequence[np.ndarray]) -> "BetweenSeeds | None":
        """
        Estimated from all arms with these seeds, as two seeds of two arms alone say next to nothing about it: from the
        mean square of the interaction of arms and seeds. Supposes that it is the same for all arms.

        Args:
            found: Rewards of each arm, `(seeds, prompts)`.

        Returns:
            `None` if there are no other arms, or a single seed.
        """
        if len(found) <= 2 or len(found[0]) == 1:
            return None
        rewards = np.array(found)
        of_seeds = rewards.mean(axis=2)
        rest = of_seeds - of_seeds.mean(axis=1, keepdims=True) - of_seeds.mean(axis=0) + of_seeds.mean()
        degrees = len(rewards) - 1
        return cls(float(2 * (rest**2).sum() / (degrees * (of_seeds.shape[1] - 1))), degrees)


def effect(differences: np.ndarray, confidence: float = 0.95, between: BetweenSeeds | None = None) -> Effect:
    """
    The mean of paired differences, with an interval for new seeds and new prompts.

    Seeds and prompts are random and crossed: every seed has its own samples, order and training, all have the same
    prompts. The variance of the mean is estimated from the mean squares of a two-way analysis of variance without
    replication (seeds, prompts, and what remains), its degrees of freedom by Satterthwaite's formula.

    Args:
        differences: `(seeds, prompts)`.
        confidence: Of the interval.
        between: How much they vary between seeds; by default estimated from them.

    Returns:
        The effect. With a single seed the interval is over prompts alone.
    """
    num_seeds, num_prompts = differences.shape
    mean = float(differences.mean())
    of_prompts = num_seeds * differences.mean(axis=0).var(ddof=1)
    if num_seeds == 1:
        parts = [(of_prompts, 1.0, num_prompts - 1)]
    else:
        between = between or BetweenSeeds.of(differences)
        of_rest, degrees = _rest(differences)
        parts = [(num_prompts * between.variance, 1.0, between.degrees * (num_seeds - 1))]
        if of_prompts > of_rest:
            parts += [(of_prompts, 1.0, num_prompts - 1), (of_rest, -1.0, degrees)]
    total = sum(sign * square for square, sign, _ in parts)
    if total <= 0:
        return Effect(mean, mean, mean, num_seeds)
    freedom = total**2 / sum(square**2 / degrees for square, _, degrees in parts)
    half = stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(total / differences.size)
    return Effect(mean, mean - half, mean + half, num_seeds)


def seeds_needed(
    differences: np.ndarray,
    half_width: float = GOAL,
    confidence: float = 0.95,
    between: BetweenSeeds | None = None,
) -> int | None:
    """
    How many seeds an interval of `mean ± half_width` would take, if seeds and prompts vary as much as here.

    Args:
        differences: `(seeds, prompts)`, of at least two seeds.
        half_width: Half of the interval's width.
        confidence: Of the interval.
        between: How much they vary between seeds; by default estimated from them.

    Returns:
        The number of seeds; `None` if with these prompts no number of seeds is enough, or above 1000.
    """
    num_seeds, num_prompts = differences.shape
    between = between or BetweenSeeds.of(differences)
    of_rest, _ = _rest(differences)
    of_prompts = max(0.0, differences.mean(axis=0).var(ddof=1) - of_rest / num_seeds) / num_prompts
    for count in range(2, 1001):
        of_seeds = between.variance / count
        variance = of_seeds + of_prompts
        freedom = variance**2 / (of_seeds**2 / (between.degrees * (count - 1)) + of_prompts**2 / (num_prompts - 1))
        if stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(variance) <= half_width:
            return count
    return None


def _rest(differences: np.ndarray) -> tuple[float, int]:
    """The mean square of what neither seeds nor prompts explain, and its degrees of freedom."""
    num_seeds, num_prompts = differences.shape
    rest = differences - differences.mean(axis=1, keepdims=True) - differences.mean(axis=0) + differences.mean()
    degrees = (num_seeds - 1) * (num_prompts - 1)
    return float((rest**2).sum() / degrees), degrees
