"""Ranking metrics against scikit-learn and SciPy; recall@N against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from trl_larpo.metrics import kendall_tau, mrr, ndcg, pair_accuracy, recall_at_n


def random_lists(batch=60, max_size=9, lowest_relevance=0):
    """Ragged lists with ties in scores and relevance, and NaN in the padding."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, max_size + 1, (batch,), generator=generator)
    mask = torch.arange(max_size) < sizes[:, None]
    scores = torch.randint(-3, 4, (batch, max_size), generator=generator).float() / 2
    relevance = torch.randint(lowest_relevance, 4, (batch, max_size), generator=generator).float()
    return scores.masked_fill(~mask, torch.nan), relevance.masked_fill(~mask, torch.nan), mask


def each_list(scores, relevance, mask):
    for s, r, m in zip(scores, relevance, mask, strict=True):
        yield s[m].tolist(), r[m].tolist()


@pytest.mark.parametrize("k", [None, 1, 3])
def test_ndcg_equals_scikit_learn(k):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    lists = random_lists()
    expected = [sklearn_metrics.ndcg_score([r], [s], k=k) for s, r in each_list(*lists)]
    np.testing.assert_allclose(ndcg(*lists, k=k), expected, atol=1e-6)


def test_ndcg_lifts_negative_relevance():
    scores, relevance, mask = random_lists(lowest_relevance=-3)
    lifted = torch.stack([r - min(0.0, r[m].min().item()) for r, m in zip(relevance, mask, strict=True)])
    torch.testing.assert_close(ndcg(scores, relevance, mask), ndcg(scores, lifted, mask))


def test_kendall_tau_equals_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    lists = random_lists()
    expected = [scipy_stats.kendalltau(s, r).statistic for s, r in each_list(*lists)]
    np.testing.assert_allclose(kendall_tau(*lists), expected, atol=1e-12)


def test_mrr_equals_the_mean_over_all_orders_of_ties():
    lists = random_lists(batch=30, max_size=6)
    for value, (scores, relevance) in zip(mrr(*lists).tolist(), each_list(*lists), strict=True):
        reciprocal_ranks = []
        for order in itertools.permutations(range(len(scores))):
            ranking = sorted(order, key=lambda i: -scores[i])  # stable: every order of the ties is met equally often
            first = next(rank for rank, i in enumerate(ranking, 1) if relevance[i] == max(relevance))
            reciprocal_ranks.append(1 / first)
        assert value == pytest.approx(sum(reciprocal_ranks) / len(reciprocal_ranks))


def test_pair_accuracy_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 9.0], [1.0, 2.0, 9.0]])
    relevance = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 9.0], [1.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    # (0,1) and (0,2) right, (1,2) wrong; a tie in the scores counts as wrong; nothing to order in the third
    np.testing.assert_allclose(pair_accuracy(scores, relevance, mask), [2 / 3, 0.0, math.nan])


def test_pair_accuracy_and_kendall_tau_agree_without_ties():
    generator = torch.Generator().manual_seed(1)
    scores, relevance = torch.randn(20, 6, generator=generator), torch.randn(20, 6, generator=generator)
    mask = torch.ones(20, 6, dtype=torch.bool)
    torch.testing.assert_close(kendall_tau(scores, relevance, mask), 2 * pair_accuracy(scores, relevance, mask) - 1)


def test_recall_at_n_equals_enumeration():
    for samples in range(1, 8):
        for correct in range(samples + 1):
            outcomes = [True] * correct + [False] * (samples - correct)
            for n in range(1, samples + 1):
                draws = list(itertools.combinations(outcomes, n))
                expected = sum(any(draw) for draw in draws) / len(draws)
                assert recall_at_n(samples, correct, n) == pytest.approx(expected, abs=1e-12)


def test_recall_at_n_takes_arrays_and_large_counts():
    values = recall_at_n(np.array([100, 100, 1000]), np.array([0, 100, 1]), 100)
    np.testing.assert_allclose(values, [0.0, 1.0, 0.1])


@pytest.mark.parametrize("arguments", [(4, 2, 5), (4, 2, 0), (4, 5, 2), (4, -1, 2)])
def test_recall_at_n_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError, match="between"):
        recall_at_n(*arguments)
