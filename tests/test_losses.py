"""Loss values against plain float64 loops, and properties that every ranking loss must have."""

import math

import pytest
import torch
import torch.nn.functional as F

from trl_larpo import LarPOConfig
from trl_larpo.losses import (
    RANKING_LOSSES,
    approx_ndcg_loss,
    contrastive_loss,
    lambdarank_loss,
    listmle_loss,
    listnet_loss,
    ndcg2pp_lambda_weight,
    ndcg_lambda_weight,
    pairwise_loss,
    reversed_relevance,
    smoothed,
)
from trl_larpo.metrics import ndcg
from trl_larpo.training.ranking_options import ranking_loss

PAPER_LOSSES = ["pairwise", "contrastive", "lambdarank", "listmle"]


def neg_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


def neg_log_softmax_first(values):
    """-log softmax of values[0] among values."""
    highest = max(values)
    return highest - values[0] + math.log(sum(math.exp(v - highest) for v in values))


def oracle_pairwise(scores, relevance):
    best = [s for s, r in zip(scores, relevance, strict=True) if r == max(relevance)]
    worst = [s for s, r in zip(scores, relevance, strict=True) if r == min(relevance)]
    if max(relevance) == min(relevance):
        return 0.0
    return sum(neg_log_sigmoid(b - w) for b in best for w in worst) / (len(best) * len(worst))


def oracle_contrastive(scores, relevance):
    if max(relevance) == min(relevance):
        return 0.0
    negatives = [s for s, r in zip(scores, relevance, strict=True) if r < max(relevance)]
    best = [s for s, r in zip(scores, relevance, strict=True) if r == max(relevance)]
    return sum(neg_log_softmax_first([b, *negatives]) for b in best) / len(best)


def oracle_lambdarank(scores, relevance):
    m = len(scores)
    return sum(
        neg_log_sigmoid(scores[i] - scores[j]) for i in range(m) for j in range(m) if relevance[i] > relevance[j]
    )


def oracle_listmle(scores, relevance):
    total = 0.0
    for score, rel in zip(scores, relevance, strict=True):
        worse = [s for s, r in zip(scores, relevance, strict=True) if r < rel]
        if worse:
            total += neg_log_softmax_first([score, *worse])
    return total


def oracle_listnet(scores, relevance):
    if max(relevance) == min(relevance):
        return 0.0
    targets = [math.exp(r - max(relevance)) for r in relevance]
    nlls = [neg_log_softmax_first([s, *scores[:i], *scores[i + 1 :]]) for i, s in enumerate(scores)]
    return sum(t / sum(targets) * nll for t, nll in zip(targets, nlls, strict=True))


def oracle_approx_ndcg(scores, relevance):
    if max(relevance) == min(relevance):
        return 0.0
    lift = min(0.0, *relevance)
    gains = [r - lift for r in relevance]
    dcg = 0.0
    for i, gain in enumerate(gains):
        others = [s for j, s in enumerate(scores) if j != i]
        rank = 1 + sum(math.exp(-neg_log_sigmoid((s - scores[i]) / 0.1)) for s in others)
        dcg += gain / math.log2(1 + rank)
    return 1 - dcg / sum(g / math.log2(2 + i) for i, g in enumerate(sorted(gains, reverse=True)))


ORACLES = {
    "pairwise": oracle_pairwise,
    "contrastive": oracle_contrastive,
    "lambdarank": oracle_lambdarank,
    "listmle": oracle_listmle,
    "listnet": oracle_listnet,
    "approx_ndcg": oracle_approx_ndcg,
}


def random_lists(batch, max_size, seed, score_scale=3.0):
    """Ragged lists with many ties in the relevance and junk, NaN included, in the padding."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, max_size + 1, (batch,), generator=generator)
    mask = torch.arange(max_size) < sizes[:, None]
    scores = torch.randn(batch, max_size, generator=generator) * score_scale
    relevance = torch.randint(-2, 4, (batch, max_size), generator=generator).float()
    relevance[::7] = 1.0  # every seventh list is tied throughout
    shuffled = torch.rand(batch, max_size, generator=generator).argsort(dim=1)  # padding may stand anywhere
    scores, relevance, mask = (t.gather(1, shuffled) for t in (scores, relevance, mask))
    return scores.masked_fill(~mask, torch.nan), relevance.masked_fill(~mask, torch.nan), mask


def test_every_registered_loss_has_an_oracle():
    assert set(ORACLES) == set(RANKING_LOSSES)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_equals_plain_loops_on_1000_ragged_lists(name):
    scores, relevance, mask = random_lists(1000, 64, seed=0)
    losses = RANKING_LOSSES[name](scores, relevance, mask)
    assert losses.shape == (1000,)
    assert losses.dtype == torch.float32
    expected = torch.tensor(
        [
            ORACLES[name](s[m].double().tolist(), r[m].double().tolist())
            for s, r, m in zip(scores, relevance, mask, strict=True)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


def test_values_by_hand():
    scores = torch.tensor([[1.0, 2.0, 0.0]])
    relevance = torch.tensor([[3.0, 1.0, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    e = math.exp
    # Best is candidate 0 (score 1), then 2 (score 0), then 1 (score 2)
    assert pairwise_loss(scores, relevance, mask).item() == pytest.approx(math.log(1 + e(2 - 1)))
    assert contrastive_loss(scores, relevance, mask).item() == pytest.approx(-math.log(e(1) / (e(1) + e(0) + e(2))))
    assert lambdarank_loss(scores, relevance, mask).item() == pytest.approx(
        math.log(1 + e(0 - 1)) + math.log(1 + e(2 - 1)) + math.log(1 + e(2 - 0))
    )
    assert listmle_loss(scores, relevance, mask).item() == pytest.approx(
        -math.log(e(1) / (e(1) + e(0) + e(2))) - math.log(e(0) / (e(0) + e(2)))
    )


@pytest.mark.parametrize("name", PAPER_LOSSES)
def test_list_of_two_is_dpo_sigmoid(name):
    scores = torch.randn(50, 2) * 5
    relevance = torch.tensor([[1.0, 0.0]]).expand(50, 2)
    losses = RANKING_LOSSES[name](scores, relevance, torch.ones(50, 2, dtype=torch.bool))
    torch.testing.assert_close(losses, -F.logsigmoid(scores[:, 0] - scores[:, 1]))


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_adding_a_constant_to_a_list_changes_nothing(name):
    scores, relevance, mask = random_lists(50, 8, seed=1)
    shift = torch.randn(50, 1) * 10
    loss_fn = RANKING_LOSSES[name]
    torch.testing.assert_close(
        loss_fn(scores.double(), relevance, mask), loss_fn(scores.double() + shift, relevance, mask)
    )


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_order_of_candidates_changes_nothing(name):
    scores, relevance, mask = random_lists(50, 8, seed=2)
    order = torch.rand(50, 8).argsort(dim=1)
    shuffled = [t.gather(1, order) for t in (scores, relevance, mask)]
    torch.testing.assert_close(RANKING_LOSSES[name](scores, relevance, mask), RANKING_LOSSES[name](*shuffled))


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_mask_is_truncation(name):
    scores, relevance, mask = random_lists(50, 8, seed=3)
    whole = RANKING_LOSSES[name](scores, relevance, mask)
    for i in range(50):
        m = mask[i]
        alone = RANKING_LOSSES[name](
            scores[i, m][None], relevance[i, m][None], torch.ones(1, m.sum(), dtype=torch.bool)
        )
        torch.testing.assert_close(alone[0], whole[i])


@pytest.mark.parametrize("name", RANKING_LOSSES)
@pytest.mark.parametrize(
    "relevance, mask",
    [
        ([0.5, 0.5, 0.5], [True, True, True]),
        ([1.0, 0.0, 0.0], [True, False, False]),
        ([2.0, 1.0, 0.0], [False, False, False]),
    ],
    ids=["all tied", "one candidate", "padding alone"],
)
def test_nothing_comparable_is_zero_without_gradient(name, relevance, mask):
    scores = torch.tensor([[3.0, -1.0, 0.5]], requires_grad=True)
    loss = RANKING_LOSSES[name](scores, torch.tensor([relevance]), torch.tensor([mask]))
    loss.sum().backward()
    assert loss.item() == 0.0
    assert scores.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["pairwise", "contrastive", "lambdarank", "listmle"])
def test_tied_candidates_are_not_compared_with_each_other(name):
    # Two candidates tied for best get equal gradients at equal scores, and their own difference is never penalised
    scores = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    RANKING_LOSSES[name](scores, torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert scores.grad[0, 0] == scores.grad[0, 1] < 0
    assert scores.grad[0, 2] > 0


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_gradient_is_right(name):
    scores, relevance, mask = random_lists(6, 5, seed=4, score_scale=0.3)
    scores = scores.masked_fill(~mask, 0.0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: RANKING_LOSSES[name](s, relevance, mask), (scores,))


@pytest.mark.parametrize("name", RANKING_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_extreme_scores(name, dtype):
    scores = torch.tensor([[-1e4, 1e4, 0.0, 1e4], [1e4, -1e4, 1e4, 80.0], [1e4, 1e4, 1e4, 1e4]]).to(dtype)
    scores.requires_grad_()
    relevance = torch.tensor([[3.0, 2.0, 2.0, -1e3], [1.0, 0.0, 0.0, 5.0], [4.0, 3.0, 2.0, 1.0]])
    loss = RANKING_LOSSES[name](scores, relevance, torch.ones(3, 4, dtype=torch.bool))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("name", PAPER_LOSSES)
def test_worst_ordered_pair_keeps_its_gradient(name):
    # A clamp before the logarithm would silence exactly the pair that needs correcting most
    scores = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    RANKING_LOSSES[name](scores, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert scores.grad.tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("name", PAPER_LOSSES)
def test_tiny_losses_are_not_rounded_to_zero(name):
    scores = torch.tensor([[30.0, 0.0]])
    loss = RANKING_LOSSES[name](scores, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_half_precision_is_computed_in_float32(name):
    scores, relevance, mask = random_lists(50, 8, seed=5)
    half = scores.to(torch.bfloat16)
    torch.testing.assert_close(
        RANKING_LOSSES[name](half, relevance, mask), RANKING_LOSSES[name](half.float(), relevance, mask)
    )


def test_ndcg_weight_is_the_change_in_ndcg_from_swapping():
    scores, relevance, mask = random_lists(20, 6, seed=6)
    weights = ndcg_lambda_weight(scores, relevance, mask)
    before = ndcg(scores, relevance, mask)
    for i in range(6):
        for j in range(6):
            order = list(range(6))
            order[i], order[j] = order[j], order[i]
            change = (ndcg(scores[:, order], relevance, mask) - before).abs().float()
            both_real = mask[:, i] & mask[:, j]
            torch.testing.assert_close(weights[:, i, j], change.masked_fill(~both_real, 0.0), atol=1e-6, rtol=1e-4)


def test_ndcg_weight_keeps_a_gradient_where_all_scores_are_equal():
    # At the first step policy and reference agree and every score is 0
    scores = torch.zeros(1, 4, requires_grad=True)
    relevance = torch.tensor([[3.0, 2.0, 1.0, 1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    lambdarank_loss(scores, relevance, mask, lambda_weight=ndcg_lambda_weight).sum().backward()
    assert scores.grad[0, 0] < scores.grad[0, 1] < 0 < scores.grad[0, 2]
    assert scores.grad[0, 2] == scores.grad[0, 3]


def test_listnet_temperature_sharpens_the_targets():
    scores, relevance, mask = (
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([[1.0, 0.0]]),
        torch.ones(1, 2, dtype=torch.bool),
    )
    nearly_hard = listnet_loss(scores, relevance, mask, temperature=0.01).item()
    assert nearly_hard == pytest.approx(math.log(1 + math.exp(1)))
    assert listnet_loss(scores, relevance, mask, temperature=100.0).item() < nearly_hard


def test_approx_ndcg_approaches_ndcg():
    scores, relevance, mask = random_lists(30, 8, seed=8)
    exact = 1 - ndcg(scores, relevance, mask).float()
    comparable = torch.tensor([len(set(r[m].tolist())) > 1 for r, m in zip(relevance, mask, strict=True)])
    approximate = approx_ndcg_loss(scores, relevance, mask, temperature=1e-6)
    torch.testing.assert_close(approximate[comparable], exact[comparable], atol=1e-3, rtol=1e-3)


# Options that losses share


def softplus(x):
    return neg_log_sigmoid(-x)


def log_sum_exp(values):
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))


def with_margin(name, scores, relevance, margin):
    """The losses as loops over differences of scores, in which a better candidate has to be ahead by the margin."""
    m = range(len(scores))

    def behind(i, j):
        sign = (relevance[i] > relevance[j]) - (relevance[i] < relevance[j])
        return scores[j] - scores[i] + margin * sign

    def against_worse(i):
        worse = [behind(i, j) for j in m if relevance[j] < relevance[i]]
        return softplus(log_sum_exp(worse)) if worse else 0.0

    best = [i for i in m if relevance[i] == max(relevance)]
    worst = [i for i in m if relevance[i] == min(relevance)]
    if len(best) == len(scores):
        return 0.0
    if name == "pairwise":
        return sum(softplus(behind(i, j)) for i in best for j in worst) / (len(best) * len(worst))
    if name == "contrastive":
        return sum(against_worse(i) for i in best) / len(best)
    if name == "lambdarank":
        return sum(softplus(behind(i, j)) for i in m for j in m if relevance[i] > relevance[j])
    if name == "listmle":
        return sum(against_worse(i) for i in m)
    if name == "listnet":
        targets = [math.exp(r - max(relevance)) for r in relevance]
        losses = [log_sum_exp([behind(i, j) for j in m]) for i in m]
        return sum(t / sum(targets) * loss for t, loss in zip(targets, losses, strict=True))
    lift = min(0.0, *relevance)
    gains = [r - lift for r in relevance]
    ranks = [1 + sum(1 / (1 + math.exp(-behind(i, j) / 0.1)) for j in m if j != i) for i in m]
    dcg = sum(gain / math.log2(1 + rank) for gain, rank in zip(gains, ranks, strict=True))
    ideal = sum(gain / math.log2(2 + place) for place, gain in enumerate(sorted(gains, reverse=True)))
    return 1 - dcg / (ideal or 1.0)


LISTS = [
    ([0.3, -1.2, 2.0, 0.7], [1.0, 0.0, 2.0, 2.0]),
    ([0.3, -1.2, 2.0], [1.0, -3.0, 0.5]),
    ([1.0, 2.0], [0.0, 1.0]),
    ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]),
]


def as_tensors(scores, relevance, padding=0):
    lists = [torch.tensor([x + [7.0] * padding], dtype=torch.float64) for x in (scores, relevance)]
    return *lists, torch.tensor([[True] * len(scores) + [False] * padding])


@pytest.mark.parametrize("scores, relevance", LISTS)
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("margin", [0.0, 0.7, -0.4])
@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_margin(name, margin, padding, scores, relevance):
    found = RANKING_LOSSES[name](*as_tensors(scores, relevance, padding), margin=margin).item()
    assert found == pytest.approx(with_margin(name, scores, relevance, margin), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_smoothing_mixes_in_the_reversed_order(name):
    for scores, relevance in LISTS:
        reversed_order = [max(relevance) + min(relevance) - r for r in relevance]
        expected = 0.8 * with_margin(name, scores, relevance, 0.5) + 0.2 * with_margin(
            name, scores, reversed_order, -0.5
        )
        found = smoothed(RANKING_LOSSES[name], 0.2, margin=0.5)(*as_tensors(scores, relevance, 1)).item()
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_large_penalty_leaves_the_reversed_order_of_the_others():
    _, relevance, mask = as_tensors([0.0, 0.0, 0.0], [0.30, 0.31, -1e7])
    [first, second, last] = reversed_relevance(relevance, mask)[0].tolist()
    assert last > first > second >= 0


@pytest.mark.parametrize("name", [*RANKING_LOSSES, "lambdarank, ndcg", "lambdarank, ndcg2++"])
@pytest.mark.parametrize("relevance", [[10.0, 9.5, 9.0], [1.0, 0.5, 0.0], [-1.0, -2.0, -4.0]])
@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_with_smoothing_the_right_order_is_still_the_better_one(name, relevance, smoothing):
    loss, _, weight = name.partition(", ")
    args = LarPOConfig("unused", loss_type=loss, label_smoothing=smoothing, lambda_weight=weight or None, use_cpu=True)
    loss_fn = ranking_loss(loss, args)
    relevance, mask = torch.tensor([[*relevance, 99.0]]), torch.tensor([[True, True, True, False]])
    right, wrong = (loss_fn(torch.tensor([[s, 0.0, -s, 5.0]]), relevance, mask).item() for s in (0.2, -0.2))
    assert right < wrong
    equal = torch.zeros(1, 4, requires_grad=True)
    loss_fn(equal, relevance, mask).sum().backward()
    best, _, worst, padding = equal.grad[0].tolist()
    assert best < 0 < worst and padding == 0


@pytest.mark.parametrize("name", PAPER_LOSSES)
def test_margin_and_smoothing_on_pairs_are_the_published_loss(name):
    # SimPO's loss as its authors' trainer has it: z = score of chosen - score of rejected - margin
    better, worse, margin, smoothing = 0.4, -0.3, 0.5, 0.1
    z = better - worse - margin
    expected = (1 - smoothing) * neg_log_sigmoid(z) + smoothing * neg_log_sigmoid(-z)
    found = smoothed(RANKING_LOSSES[name], smoothing, margin)(*as_tensors([better, worse], [1.0, 0.0])).item()
    assert found == pytest.approx(expected, rel=1e-9)


def test_listmle_over_the_first_places():
    scores, relevance = [0.3, -1.2, 2.0, 0.7, 0.1], [1.0, 0.0, 3.0, 2.0, 2.0]
    terms = {}
    for i, rel in enumerate(relevance):
        worse = [scores[j] for j in range(5) if relevance[j] < rel]
        terms[i] = neg_log_softmax_first([scores[i], *worse]) if worse else 0.0
    for top_k, counted in ((1, [2]), (2, [2, 3, 4]), (3, [2, 3, 4]), (4, [0, 2, 3, 4]), (None, [0, 1, 2, 3, 4])):
        found = listmle_loss(*as_tensors(scores, relevance, 2), top_k=top_k).item()
        assert found == pytest.approx(sum(terms[i] for i in counted), rel=1e-9), top_k


def test_contrastive_with_several_positives_compares_chosen_with_rejected():
    scores, relevance = [0.3, -1.2, 2.0, 0.7], [1.0, 0.0, 3.0, 2.0]
    rejected = [scores[0], scores[1]]
    expected = sum(neg_log_softmax_first([scores[i], *rejected]) for i in (2, 3)) / 2
    assert contrastive_loss(*as_tensors(scores, relevance, 1), positives=2).item() == pytest.approx(expected, rel=1e-9)
    # The worst are never positives, so a short list is compared too
    for positives in (1, 2, 5):
        tied = contrastive_loss(*as_tensors([1.0, 2.0, 3.0], [1.0, 0.5, 0.5]), positives=positives)
        assert tied.item() == pytest.approx(neg_log_softmax_first([1.0, 2.0, 3.0]), rel=1e-9)


def test_normalized_sums_are_means():
    scores, relevance = [0.3, -1.2, 2.0, 0.7], [1.0, 0.0, 2.0, 2.0]
    batch = as_tensors(scores, relevance, 1)
    assert lambdarank_loss(*batch, normalize=True).item() == pytest.approx(lambdarank_loss(*batch).item() / 5)
    assert listmle_loss(*batch, normalize=True).item() == pytest.approx(listmle_loss(*batch).item() / 3)
    nothing = as_tensors([1.0, 2.0], [1.0, 1.0])
    assert lambdarank_loss(*nothing, normalize=True).item() == listmle_loss(*nothing, normalize=True).item() == 0.0


@pytest.mark.parametrize("name, terms", [("lambdarank", 128 * 127 / 2), ("listmle", 127)])
def test_gradients_of_normalized_losses_do_not_grow_with_the_list(name, terms):
    norms = {}
    for size in (2, 128):
        relevance = torch.arange(size, dtype=torch.float64)[None]
        for normalize in (False, True):
            scores = torch.zeros(1, size, dtype=torch.float64, requires_grad=True)
            RANKING_LOSSES[name](
                scores, relevance, torch.ones(1, size, dtype=torch.bool), normalize=normalize
            ).backward()
            norms[size, normalize] = scores.grad.abs().sum().item()
    assert norms[128, True] <= 2 * norms[2, True]
    assert norms[128, False] == pytest.approx(terms * norms[128, True])


def test_weights_of_ndcg_loss_2_plus_plus():
    scores, relevance = [0.3, -1.2, 2.0, 0.7], [1.0, 0.0, 3.0, 2.0]
    ranks = [3, 4, 1, 2]
    ideal = sum(gain / math.log2(2 + place) for place, gain in enumerate(sorted(relevance, reverse=True)))
    found = ndcg2pp_lambda_weight(*as_tensors(scores, relevance, 1))[0]
    for i in range(4):
        for j in range(4):
            if i == j:
                continue
            rho = abs(1 / math.log2(1 + ranks[i]) - 1 / math.log2(1 + ranks[j]))
            distance = abs(ranks[i] - ranks[j])
            delta = abs(1 / math.log2(1 + distance) - 1 / math.log2(2 + distance))
            expected = (rho + 10 * delta) * abs(relevance[i] - relevance[j]) / ideal
            assert found[i, j].item() == pytest.approx(expected, rel=1e-9)
    assert found[4].eq(0).all() and found[:, 4].eq(0).all()
    # Before the first step all scores are equal, and every ordered pair has a weight
    first = ndcg2pp_lambda_weight(*as_tensors([0.0] * 4, relevance))[0]
    assert (first[~torch.eye(4, dtype=torch.bool)] > 0).all()
