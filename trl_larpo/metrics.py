"""
How well a model's scores order a list, and how often a list holds a solution at all.

The ranking metrics take the three tensors that the losses take, `(batch, list_size)` each (`scores`, `relevance`,
`mask`), and return one value per list. Ties in the scores are never broken by position: NDCG and MRR are expectations
over a random order of tied candidates, as in scikit-learn. Values come in float64, so pass tensors of a device that has
it (CPU, CUDA).
"""

import itertools
import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from .losses import gains_and_ideal_dcg, mean_discounts

_RESAMPLED_AT_A_TIME = 5_000_000  # counts of prompts


def ndcg(scores: Tensor, relevance: Tensor, mask: Tensor, k: int | None = None) -> Tensor:
    """
    Normalised discounted cumulative gain of the ranking by score (Järvelin and Kekäläinen, 2002).

    Gains are linear in the relevance. If a list's lowest relevance is negative, all of its gains are lifted so that it
    becomes 0. Equals `sklearn.metrics.ndcg_score` on relevance ≥ 0.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.
        k: Only the first k ranks count. `None` means all.

    Returns:
        Values in [0, 1], `(batch,)`; 0 for a list without any gain.
    """
    scores, relevance = _float64(scores, relevance, mask)
    gains, ideal = gains_and_ideal_dcg(relevance, mask, cutoff=k)
    ahead, level = _ahead_and_level(scores, mask)
    return (gains * mean_discounts(ahead, level, cutoff=k, dtype=gains.dtype)).sum(dim=1) / ideal


def mrr(scores: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
    """
    Reciprocal rank, by score, of the best candidate: of the first one where several tie for best.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.

    Returns:
        Values in (0, 1], `(batch,)`; 0 for a list of padding alone.
    """
    scores, relevance = _float64(scores, relevance, mask)
    best = mask & (relevance == relevance.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True))
    top_score = scores.masked_fill(~best, -torch.inf).amax(dim=1, keepdim=True)
    ahead = (mask & (scores > top_score)).sum(dim=1, keepdim=True)
    tied = mask & (scores == top_score)
    tie, best_in_tie = tied.sum(dim=1, keepdim=True), (tied & best).sum(dim=1, keepdim=True)
    # The first of `best_in_tie` candidates in a random order of `tie` stands at place x with probability
    # C(tie - x, best_in_tie - 1) / C(tie, best_in_tie)
    place = torch.arange(1, mask.size(1) + 1, dtype=torch.float64, device=mask.device).unsqueeze(0)
    possible = place <= tie - best_in_tie + 1
    log_probability = _log_binomial((tie - place).clamp(min=0), best_in_tie - 1) - _log_binomial(tie, best_in_tie)
    probability = torch.where(possible & mask.any(dim=1, keepdim=True), log_probability.exp(), 0.0)
    return (probability / (ahead + place)).sum(dim=1)


def kendall_tau(scores: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
    """
    Kendall's rank correlation τ-b of scores and relevance, corrected for ties in either.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.

    Returns:
        Values in [-1, 1], `(batch,)`; NaN where all scores or all relevances are equal, as in `scipy.stats.kendalltau`.
    """
    scores, relevance = _float64(scores, relevance, mask)
    pairs = mask.unsqueeze(1) & mask.unsqueeze(2)
    score_sign, relevance_sign = (
        torch.sign(values.unsqueeze(2) - values.unsqueeze(1)).masked_fill(~pairs, 0.0) for values in (scores, relevance)
    )
    agreement = (score_sign * relevance_sign).sum(dim=(1, 2))
    return agreement / (score_sign.abs().sum(dim=(1, 2)) * relevance_sign.abs().sum(dim=(1, 2))).sqrt()


def pair_accuracy(scores: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
    """
    Share of the strictly ordered pairs whose better candidate has the strictly higher score.

    For a list of two this is what `DPOTrainer` logs as `rewards/accuracies`.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.

    Returns:
        Values in [0, 1], `(batch,)`; NaN for a list without a strictly ordered pair.
    """
    scores, relevance = _float64(scores, relevance, mask)
    ordered = (relevance.unsqueeze(2) > relevance.unsqueeze(1)) & mask.unsqueeze(1) & mask.unsqueeze(2)
    right = ordered & (scores.unsqueeze(2) > scores.unsqueeze(1))
    return right.sum(dim=(1, 2)).double() / ordered.sum(dim=(1, 2))


def recall_at_n(num_samples, num_correct, n: int) -> np.ndarray:
    """
    Chance that at least one of n samples solves the prompt (Recall@N of the paper, also known as Pass@N).

    The unbiased estimator 1 - C(samples - correct, n) / C(samples, n) (Chen et al. 2021, arXiv 2107.03374), as a
    product that never overflows. Average it over prompts.

    Args:
        num_samples: Samples drawn for each prompt, int or array of int.
        num_correct: How many of them are correct, same shape.
        n: Number of samples drawn, 1 ≤ n ≤ `num_samples`.

    Returns:
        Float64 array of the broadcast shape, values in [0, 1].

    Raises:
        ValueError: If n is not between 1 and the smallest `num_samples`, or `num_correct` not between 0 and
            `num_samples`.
    """
    num_samples, num_correct = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
    if n < 1 or (num_samples < n).any():
        raise ValueError(f"n must be between 1 and the number of samples ({num_samples.min()}), got n={n}.")
    if (num_correct < 0).any() or (num_correct > num_samples).any():
        raise ValueError("num_correct must be between 0 and num_samples for every prompt.")
    num_wrong = (num_samples - num_correct)[..., None]
    drawn = np.arange(n)
    # Chance that draw after draw is wrong; the product reaches 0 once the wrong samples are used up
    all_wrong = np.prod(np.maximum(num_wrong - drawn, 0) / (num_samples[..., None] - drawn), axis=-1)
    return 1.0 - all_wrong


def best_of_n_accuracy(judged, correct, n: int) -> float:
    """
    Chance that the sample a judge likes best, of n drawn without repetition, solves the prompt.

    Exact: the average over all choices of n samples. Of those a judge likes equally, each may be the best.

    Args:
        judged: What the judge says of each sample of one prompt, larger is better, float `(num_samples,)`.
        correct: Whether each solves the prompt, bool or 0/1, `(num_samples,)`.
        n: Number of samples that the judge sees, 1 ≤ n ≤ `num_samples`.

    Raises:
        ValueError: If n is out of range.
    """
    judged, correct = np.asarray(judged, dtype=float), np.asarray(correct, dtype=float)
    count = len(judged)
    if not 1 <= n <= count:
        raise ValueError(f"n must be between 1 and the number of samples ({count}), got n={n}.")
    accuracy = 0.0
    for value in np.unique(judged):
        # The best is of this value where none is better and not all are worse
        up_to, below = int((judged <= value).sum()), int((judged < value).sum())
        chance = (math.comb(up_to, n) - math.comb(below, n)) / math.comb(count, n)
        accuracy += chance * float(correct[judged == value].mean())
    return accuracy


def majority_accuracy(answers, correct, n: int, draws: int = 200, seed: int = 0) -> float:
    """
    Chance that the most frequent answer among n samples is right (majority vote, also known as self-consistency).

    Args:
        answers: Answer of each sample of one prompt, any hashable value; `None` or NaN where it gives none, which is no
            vote.
        correct: Whether each is right, bool or 0/1, `(num_samples,)`.
        n: Number of samples that vote, 1 ≤ n ≤ `num_samples`.
        draws: Number of random choices of n samples to average over, where there are more; else all of them.
        seed: Of the random choices.

    Returns:
        The chance. Answers with equally many votes count alike; where nobody votes, 0.

    Raises:
        ValueError: If n is out of range.
    """
    count = len(answers)
    if not 1 <= n <= count:
        raise ValueError(f"n must be between 1 and the number of samples ({count}), got n={n}.")
    answers = [None if answer != answer else answer for answer in answers]  # NaN is not itself
    if math.comb(count, n) <= draws:
        choices = list(itertools.combinations(range(count), n))
    else:
        generator = np.random.default_rng(seed)
        choices = [generator.choice(count, n, replace=False) for _ in range(draws)]
    right = {answer: np.mean([c for a, c in zip(answers, correct, strict=True) if a == answer]) for answer in answers}
    total = 0.0
    for chosen in choices:
        votes = Counter(answers[i] for i in chosen if answers[i] is not None)
        most = max(votes.values(), default=0)
        total += float(np.mean([right[a] for a, v in votes.items() if v == most])) if votes else 0.0
    return total / len(choices)


def bootstrap_interval(values, num_resamples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """
    Percentile interval of the mean over prompts, from resamples of the prompts with repetition.

    Args:
        values: One number for each prompt, float `(num_prompts,)`.
        num_resamples: Resamples.
        level: Share of the resampled means inside, in (0, 1).
        seed: Of the resampling.

    Returns:
        Lower and upper end.
    """
    values = np.asarray(values, dtype=float)
    rng, count = np.random.default_rng(seed), len(values)
    at_a_time = max(1, _RESAMPLED_AT_A_TIME // count)  # in memory; the draws are the same
    means = [
        rng.multinomial(count, [1 / count] * count, size=min(at_a_time, num_resamples - start)) @ values / count
        for start in range(0, num_resamples, at_a_time)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _float64(scores: Tensor, relevance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    # What padding holds, NaN included, must not reach a sum
    return torch.where(mask, scores.detach().double(), 0.0), torch.where(mask, relevance.double(), 0.0)


def _ahead_and_level(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`[b, i, j]`: candidate j has a higher score than i; candidate j has the score of i."""
    real = mask.unsqueeze(1)
    return (scores.unsqueeze(1) > scores.unsqueeze(2)) & real, (scores.unsqueeze(1) == scores.unsqueeze(2)) & real


def _log_binomial(n: Tensor, k: Tensor) -> Tensor:
    n, k = n.double(), k.double().clamp(min=0)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
