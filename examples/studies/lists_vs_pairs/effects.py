"""Effects with intervals, where the same prompts were measured with several seeds."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

GOAL = 0.03
"""Half width of the intervals that the study aims at, in units of the reward. Smaller differences are called none."""

MIN_SEEDS = 3
"""With fewer seeds there is no interval: two say next to nothing about how much seeds vary."""


@dataclass(frozen=True)
class Effect:
    """
    A mean difference with its interval.

    Attributes:
        mean: The mean over seeds and prompts.
        low: Lower end of the interval; minus infinity with too few seeds.
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
        if self.num_seeds < MIN_SEEDS:
            return "too few seeds"
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return "no difference" if max(-self.low, self.high) <= GOAL else "cannot tell"

    def __str__(self) -> str:
        if self.num_seeds < MIN_SEEDS:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def effect(differences: np.ndarray, confidence: float = 0.95) -> Effect:
    """
    The mean of paired differences, with an interval for new seeds and new groups of prompts.

    Seeds and groups are random and crossed: every seed has its own samples, order and training, all have the same
    prompts. The variance of the mean is estimated from the mean squares of a two-way analysis of variance without
    replication (seeds, groups, and what remains), its degrees of freedom by Satterthwaite's formula. Nothing is
    supposed of other arms, as arms do not vary equally.

    Args:
        differences: `(seeds, groups)`. A group is a prompt, or the mean over prompts on the same topic.
        confidence: Of the interval.
    """
    num_seeds, num_groups = differences.shape
    mean = float(differences.mean())
    if num_seeds < MIN_SEEDS:
        return Effect(mean, -math.inf, math.inf, num_seeds)
    of_seeds = num_groups * differences.mean(axis=1).var(ddof=1)
    of_groups = num_seeds * differences.mean(axis=0).var(ddof=1)
    of_rest, degrees = _rest(differences)
    parts = [(of_seeds, 1.0, num_seeds - 1)]
    if of_groups > of_rest:
        parts += [(of_groups, 1.0, num_groups - 1), (of_rest, -1.0, degrees)]
    total = sum(sign * square for square, sign, _ in parts)
    if total <= 0:
        return Effect(mean, mean, mean, num_seeds)
    freedom = total**2 / sum(square**2 / degrees for square, _, degrees in parts)
    half = stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(total / differences.size)
    return Effect(mean, mean - half, mean + half, num_seeds)


def seeds_needed(differences: np.ndarray, half_width: float = GOAL, confidence: float = 0.95) -> int | None:
    """
    How many seeds an interval of `mean ± half_width` would take, if seeds and groups vary as much as here.

    Args:
        differences: `(seeds, groups)`, of at least `MIN_SEEDS` seeds.
        half_width: Half of the interval's width.
        confidence: Of the interval.

    Returns:
        The number of seeds; `None` if with these prompts no number of seeds is enough, or above 1000.
    """
    num_seeds, num_groups = differences.shape
    between = differences.mean(axis=1).var(ddof=1)
    of_rest, _ = _rest(differences)
    of_groups = max(0.0, differences.mean(axis=0).var(ddof=1) - of_rest / num_seeds) / num_groups
    for count in range(2, 1001):
        of_seeds = between / count
        variance = of_seeds + of_groups
        freedom = variance**2 / (of_seeds**2 / (count - 1) + of_groups**2 / (num_groups - 1)) if variance else 1
        if stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(variance) <= half_width:
            return count
    return None


def _rest(differences: np.ndarray) -> tuple[float, int]:
    """The mean square of what neither seeds nor groups explain, and its degrees of freedom."""
    num_seeds, num_groups = differences.shape
    rest = differences - differences.mean(axis=1, keepdims=True) - differences.mean(axis=0) + differences.mean()
    degrees = (num_seeds - 1) * (num_groups - 1)
    return float((rest**2).sum() / degrees), degrees
