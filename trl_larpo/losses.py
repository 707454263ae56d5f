"""
Listwise ranking losses on implicit rewards.

Every loss is a pure function of three tensors that share the shape `(batch, list_size)`:

- `scores` (float): what the model says of each candidate, γ(y|x) = β · (log π_θ(y|x) - log π_ref(y|x)). Gradients flow
  into this one only.
- `relevance` (float): ground truth, larger is better. Only differences within a list carry meaning.
- `mask` (bool): `True` where a real candidate stands, `False` for padding. What padding holds never matters.

and returns one loss per list, shape `(batch,)`, not reduced.

One rule governs order and ties in all of them: **a candidate is compared only with strictly worse ones.** A list in
which nothing is strictly worse than anything else has loss 0 and no gradient. The pairwise, contrastive, LambdaRank and
ListMLE losses of a list of two are all DPO's sigmoid loss, -log σ(γ_chosen - γ_rejected).

The losses share two options. With a `margin` m, a better candidate has to be ahead of a worse one by m: the difference
of the two, γ_j - γ_i, becomes γ_j - γ_i + m (SimPO's target margin, arXiv 2405.14734, on lists of any size). With
[`smoothed`], an order is taken to be the other way round with a small probability.

Half-precision scores are computed in float32 (float64 stays float64). The formulas work on differences of scores and
never take the logarithm of an exponential, so that losses and gradients stay finite at scores of ±1e4.

Paper: "LLM Alignment as Retriever Optimization: An Information Retrieval Perspective", arXiv 2502.03699.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

RankingLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

LambdaWeight = Callable[[Tensor, Tensor, Tensor], Tensor]


def pairwise_loss(scores: Tensor, relevance: Tensor, mask: Tensor, *, margin: float = 0.0) -> Tensor:
    """
    The best candidate against the worst one: -log σ(γ_best - γ_worst), the loss of DPO.

    Where several candidates tie for best or for worst, the loss is the mean over all (best, worst) pairs.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.
        margin: See [`trl_larpo.losses`].

    Returns:
        Loss of each list, `(batch,)`, in float32 or wider.
    """
    scores, relevance = _prepare(scores, relevance, mask)
    best, worst = best_and_worst(relevance, mask)
    pairs = best.unsqueeze(2) & worst.unsqueeze(1)
    losses = F.softplus(_differences(scores) + margin).masked_fill(~pairs, 0.0).sum(dim=(1, 2))
    return losses / pairs.sum(dim=(1, 2)).clamp(min=1)


def contrastive_loss(
    scores: Tensor, relevance: Tensor, mask: Tensor, *, positives: int = 1, margin: float = 0.0
) -> Tensor:
    """
    The best candidate against all worse ones (InfoNCE; paper, eq. 5 and 9).

    -log [ e^γ_w / (e^γ_w + Σ_l e^γ_l) ], where l runs over the candidates strictly worse than w. Where several
    candidates tie for best, the loss is the mean over them. With several `positives`, each of them is compared with the
    worse ones that are no positives: chosen against rejected only.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.
        positives: How many places of the ranking are positives; all that tie for the last of them are, but the worst of
            a list never is.
        margin: See [`trl_larpo.losses`].

    Returns:
        Loss of each list, `(batch,)`, in float32 or wider.
    """
    scores, relevance = _prepare(scores, relevance, mask)
    worse = _worse(relevance, mask)
    chosen = mask & (_num_better(relevance, mask) < positives) & worse.any(dim=2)
    compared = worse & chosen.unsqueeze(2) & ~chosen.unsqueeze(1)
    return _against_worse(scores, compared, margin).sum(dim=1) / compared.any(dim=2).sum(dim=1).clamp(min=1)


def lambdarank_loss(
    scores: Tensor,
    relevance: Tensor,
    mask: Tensor,
    *,
    lambda_weight: LambdaWeight | None = None,
    normalize: bool = False,
    margin: float = 0.0,
) -> Tensor:
    """
    Every candidate against every worse one: -Σ_{i better than j} w_ij · log σ(γ_i - γ_j) (paper, eq. 6 and 15).

    The paper weights all pairs equally (the loss known as RankNet); that is the default. LambdaRank as first published
    weights a pair by the change in NDCG from swapping it: pass [`ndcg_lambda_weight`].

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.
        lambda_weight: Function of the same three tensors that returns the weights w, `(batch, list_size, list_size)`.
            No gradient flows through it. `None` means w = 1.
        normalize: Whether to divide by the number of pairs, so that long lists weigh no more than short ones.
        margin: See [`trl_larpo.losses`].

    Returns:
        Loss of each list, `(batch,)`, in float32 or wider: a sum over pairs, or their mean.
    """
    scores, relevance = _prepare(scores, relevance, mask)
    worse = _worse(relevance, mask)
    losses = F.softplus(_differences(scores) + margin)
    if lambda_weight is not None:
        losses = losses * lambda_weight(scores.detach(), relevance, mask).detach()
    total = losses.masked_fill(~worse, 0.0).sum(dim=(1, 2))
    return total / worse.sum(dim=(1, 2)).clamp(min=1) if normalize else total


def listmle_loss(
    scores: Tensor,
    relevance: Tensor,
    mask: Tensor,
    *,
    top_k: int | None = None,
    normalize: bool = False,
    margin: float = 0.0,
) -> Tensor:
    """
    Likelihood of the whole ranking under the Plackett-Luce model (paper, eq. 7 and 23).

    -Σ_i log [ e^γ_i / (e^γ_i + Σ_j e^γ_j) ], where j runs over the candidates strictly worse than i. The sum starts at
    j = i + 1 as in the proof (eq. 21-23); Table 1 and eq. 20 print j = i, which would count the candidate twice.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.
        top_k: Only the first k places of the ranking count, as in top-k ListMLE (Xia et al., NIPS 2009): the sum runs
            over candidates that fewer than k are better than. `None`: all.
        normalize: Whether to divide by the number of candidates in the sum.
        margin: See [`trl_larpo.losses`].

    Returns:
        Loss of each list, `(batch,)`, in float32 or wider: a sum over candidates, or their mean.
    """
    scores, relevance = _prepare(scores, relevance, mask)
    worse = _worse(relevance, mask)
    if top_k is not None:
        worse = worse & (_num_better(relevance, mask) < top_k).unsqueeze(2)
    total = _against_worse(scores, worse, margin).sum(dim=1)
    return total / worse.any(dim=2).sum(dim=1).clamp(min=1) if normalize else total


def listnet_loss(
    scores: Tensor, relevance: Tensor, mask: Tensor, *, temperature: float = 1.0, margin: float = 0.0
) -> Tensor:
    """
    Cross-entropy between a softmax of the rewards (soft targets) and the softmax of the scores.

    -Σ_i p_i · log softmax(γ)_i with p = softmax(relevance / temperature): the top-one form of ListNet (Cao et al.,
    ICML 2007). Unlike the paper's losses it uses how far rewards lie apart, not only their order.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.
        temperature: Temperature of the targets, in units of the reward. Towards 0 all weight goes to the best
            candidate.
        margin: See [`trl_larpo.losses`]: added to the scores of worse candidates, and taken from those of better ones,
            in each candidate's softmax.

    Returns:
        Loss of each list, `(batch,)`, in float32 or wider.
    """
    scores, relevance = _prepare(scores, relevance, mask)
    comparable = _worse(relevance, mask).any(dim=(1, 2))
    # A list of padding alone would be a softmax over nothing: let it see its (zero) scores, it is set to 0 below
    visible = mask | ~comparable.unsqueeze(1)
    targets = torch.softmax((relevance / temperature).masked_fill(~visible, -torch.inf), dim=1)
    differences = _differences(scores) + margin * _order(relevance)
    # Rows of padding keep finite entries, because a softmax over nothing has a NaN gradient
    hidden = ~visible.unsqueeze(1) & visible.unsqueeze(2)
    losses = torch.logsumexp(differences.masked_fill(hidden, -torch.inf), dim=2)  # -log softmax of each candidate
    return (targets * losses).masked_fill(~visible, 0.0).sum(dim=1).masked_fill(~comparable, 0.0)


def approx_ndcg_loss(
    scores: Tensor, relevance: Tensor, mask: Tensor, *, temperature: float = 0.1, margin: float = 0.0
) -> Tensor:
    """
    1 - NDCG with each rank replaced by a smooth one (ApproxNDCG; Qin, Liu and Li, Information Retrieval 2010).

    rank_i ≈ 1 + Σ_{j ≠ i} σ((γ_j - γ_i) / temperature). Gains are linear in the relevance, as in
    [`~trl_larpo.metrics.ndcg`].

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.
        temperature: Smoothness of the ranks, in units of the score. Towards 0 the loss becomes 1 - NDCG.
        margin: See [`trl_larpo.losses`]: a better candidate that is not ahead by it counts as behind.

    Returns:
        Loss of each list, `(batch,)`, between 0 and 1, in float32 or wider.
    """
    scores, relevance = _prepare(scores, relevance, mask)
    comparable = _worse(relevance, mask).any(dim=(1, 2))
    gains, ideal = gains_and_ideal_dcg(relevance, mask)
    others = mask.unsqueeze(1) & ~torch.eye(mask.size(1), dtype=torch.bool, device=mask.device)
    differences = _differences(scores) + margin * _order(relevance)
    ranks = 1 + torch.sigmoid(differences / temperature).masked_fill(~others, 0.0).sum(dim=2)
    ndcg = (gains / torch.log2(1 + ranks)).sum(dim=1) / ideal
    return (1 - ndcg).masked_fill(~comparable, 0.0)


def ndcg_lambda_weight(scores: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
    """
    Change in NDCG from swapping two candidates, |ΔNDCG_ij|: the pair weights of LambdaRank (Burges 2010).

    Candidates are ranked by their scores. Among equal scores the less relevant one is ranked higher, so that pairs keep
    a weight at the first step of training, when every score is 0.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.

    Returns:
        Symmetric weights, `(batch, list_size, list_size)`, 0 wherever padding takes part.
    """
    scores, relevance = _prepare(scores, relevance, mask)
    gains, ideal = gains_and_ideal_dcg(relevance, mask)
    discounts = mean_discounts(*_ahead_and_level(scores, relevance, mask), dtype=scores.dtype)
    weights = (_differences(gains) * _differences(discounts)).abs() / ideal[:, None, None]
    return weights.masked_fill(~(mask.unsqueeze(1) & mask.unsqueeze(2)), 0.0)


def ndcg2pp_lambda_weight(scores: Tensor, relevance: Tensor, mask: Tensor, *, mu: float = 10.0) -> Tensor:
    """
    Weights of NDCG-Loss2++ (Wang et al., "The LambdaLoss Framework for Ranking Metric Optimization", CIKM 2018):
    (rho_ij + μ δ_ij) · |G_i - G_j| / ideal DCG.

    With discounts 1 / D_r = 1 / log2(1 + r) at rank r, rho_ij = |1 / D_i - 1 / D_j| is LambdaRank's weight, and δ_ij =
    |1 / D_|i-j| - 1 / D_(|i-j|+1)| depends on the distance of the two ranks alone, which bounds NDCG more tightly.

    Args:
        scores: Implicit rewards γ, float `(batch, list_size)`.
        relevance: Ground truth, larger is better, float `(batch, list_size)`.
        mask: `True` for real candidates, bool `(batch, list_size)`.
        mu: Weight of δ against rho.

    Returns:
        Symmetric weights, `(batch, list_size, list_size)`, 0 wherever padding takes part. Ties in the scores are broken
        as in [`ndcg_lambda_weight`]; candidates level in both share the mean of their ranks.
    """
    scores, relevance = _prepare(scores, relevance, mask)
    gains, ideal = gains_and_ideal_dcg(relevance, mask)
    ahead, level = _ahead_and_level(scores, relevance, mask)
    ranks = 0.5 + ahead.sum(dim=2).to(scores.dtype) + level.sum(dim=2).to(scores.dtype) / 2
    distance = _differences(ranks).abs().clamp(min=1e-6)  # 0 only where the gains are the same
    discounts, of_distance = 1 / torch.log2(1 + ranks), (1 / torch.log2(1 + distance) - 1 / torch.log2(2 + distance))
    weights = (_differences(discounts).abs() + mu * of_distance.abs()) * _differences(gains).abs()
    return (weights / ideal[:, None, None]).masked_fill(~(mask.unsqueeze(1) & mask.unsqueeze(2)), 0.0)


def smoothed(
    loss_fn: Callable[..., Tensor],
    smoothing: float,
    margin: float = 0.0,
    reversed_loss_fn: Callable[..., Tensor] | None = None,
) -> RankingLoss:
    """
    A loss for orders that are wrong now and then: (1 - ε) · loss of the order + ε · loss of the reversed order.

    In the reversed order the best candidate has the relevance of the worst, and the other way round: gains of NDCG are
    between the same limits in both. On two candidates it is the conservative DPO loss,
    -(1 - ε) log σ(d - m) - ε log σ(m - d) with the difference d of the scores and the margin m.

    Args:
        loss_fn: A ranking loss; with a margin, one that takes it.
        smoothing: ε, the share of orders that are wrong, at least 0 and below 0.5.
        margin: See [`trl_larpo.losses`]; in the reversed order it counts the other way.
        reversed_loss_fn: The loss of the reversed order, if that is another function.
    """
    of_reversed = loss_fn if reversed_loss_fn is None else reversed_loss_fn

    def smoothed_loss(scores: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
        right, reversed_order = ({"margin": m} if margin else {} for m in (margin, -margin))
        right_loss = loss_fn(scores, relevance, mask, **right)
        wrong_loss = of_reversed(scores, reversed_relevance(relevance, mask), mask, **reversed_order)
        return (1 - smoothing) * right_loss + smoothing * wrong_loss

    return smoothed_loss


def reversed_relevance(relevance: Tensor, mask: Tensor) -> Tensor:
    """
    The relevance of each candidate if the order of its list were the opposite: highest + lowest - relevance. A lowest
    relevance below 0 is taken for 0, as in [`gains_and_ideal_dcg`], so that a large penalty swallows no differences.

    Args:
        relevance: Float `(batch, list_size)`.
        mask: Bool `(batch, list_size)`.

    Returns:
        Float `(batch, list_size)`, 0 in the padding.
    """
    highest = relevance.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    lowest = relevance.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(mask, (highest - relevance) + lowest.clamp(min=0.0), 0.0)


RANKING_LOSSES: dict[str, Callable[..., Tensor]] = {  # each a `RankingLoss`; some have options of their own
    "pairwise": pairwise_loss,
    "contrastive": contrastive_loss,
    "lambdarank": lambdarank_loss,
    "listmle": listmle_loss,
    "listnet": listnet_loss,
    "approx_ndcg": approx_ndcg_loss,
}
"""Names that `LarPOConfig.loss_type` takes beside TRL's own. Add a function here to make it reachable by name."""


def best_and_worst(relevance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    Which candidates are (tied for) best and which (tied for) worst in their list.

    Args:
        relevance: Float `(batch, list_size)`.
        mask: Bool `(batch, list_size)`.

    Returns:
        Two bool tensors `(batch, list_size)`. Both are all `False` for a list in which nothing is strictly worse than
        anything else.
    """
    highest = relevance.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    lowest = relevance.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    comparable = mask & (highest > lowest)
    return comparable & (relevance == highest), comparable & (relevance == lowest)


def mean_discounts(
    ahead: Tensor, level: Tensor, cutoff: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """
    DCG discount 1 / log2(1 + rank) of each candidate, averaged over the ranks that its tie can take.

    Args:
        ahead: Bool `(batch, list_size, list_size)`; `[b, i, j]` says that candidate j is ranked before candidate i.
        level: Bool, same shape; candidate j ties with candidate i (each candidate with itself).
        cutoff: Ranks beyond this one have discount 0.
        dtype: Of the result.

    Returns:
        Float `(batch, list_size)`.
    """
    discounts = _rank_discounts(ahead.size(1), ahead.device, dtype)
    if cutoff is not None:
        discounts = discounts.masked_fill(torch.arange(discounts.size(0), device=ahead.device) >= cutoff, 0.0)
    cumulative = F.pad(discounts.cumsum(dim=0), (1, 0))
    start, width = ahead.sum(dim=2), level.sum(dim=2)
    return (cumulative[start + width] - cumulative[start]) / width.clamp(min=1)


def gains_and_ideal_dcg(relevance: Tensor, mask: Tensor, cutoff: int | None = None) -> tuple[Tensor, Tensor]:
    """
    Linear DCG gains and the highest DCG they allow.

    Rewards may be negative, gains may not: where a list's lowest relevance is below 0, it is lifted to 0 and the others
    with it.

    Args:
        relevance: Float `(batch, list_size)`.
        mask: Bool `(batch, list_size)`.
        cutoff: Only the first `cutoff` ranks count.

    Returns:
        Gains `(batch, list_size)`, 0 in the padding, and the ideal DCG `(batch,)`, 1 where no gain is positive.
    """
    lowest = relevance.masked_fill(~mask, 0.0).amin(dim=1, keepdim=True).clamp(max=0.0)
    gains = (relevance - lowest).masked_fill(~mask, 0.0)
    discounts = _rank_discounts(gains.size(1), gains.device, gains.dtype)
    discounted = gains.sort(dim=1, descending=True).values * discounts
    ideal = discounted[:, :cutoff].sum(dim=1)
    return gains, torch.where(ideal > 0, ideal, 1.0)


def _prepare(scores: Tensor, relevance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Widens half precision to float32 and clears whatever stands in the padding, NaN included."""
    if scores.dtype != torch.float64:
        scores = scores.float()
    if relevance.dtype != torch.float64:
        relevance = relevance.float()
    return torch.where(mask, scores, 0.0), torch.where(mask, relevance, 0.0)


def _differences(values: Tensor) -> Tensor:
    """`[b, i, j]` = value of j minus value of i."""
    return values.unsqueeze(1) - values.unsqueeze(2)


def _order(relevance: Tensor) -> Tensor:
    """`[b, i, j]` is 1 where j is worse than i, -1 where it is better, else 0."""
    return -_differences(relevance).sign()


def _num_better(relevance: Tensor, mask: Tensor) -> Tensor:
    """How many candidates of its list are strictly better than each, `(batch, list_size)`."""
    return _worse(relevance, mask).sum(dim=1)


def _ahead_and_level(scores: Tensor, relevance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`[b, i, j]`: whether j is ranked before i, by score and then the less relevant first; whether they are level."""
    score_difference, relevance_difference = _differences(scores), _differences(relevance)
    same_score = score_difference == 0
    ahead = (score_difference > 0) | (same_score & (relevance_difference < 0))
    level = same_score & (relevance_difference == 0)
    return ahead & mask.unsqueeze(1), level & mask.unsqueeze(1)


def _worse(relevance: Tensor, mask: Tensor) -> Tensor:
    """`[b, i, j]` is `True` where i and j are real and j is strictly worse than i."""
    return (relevance.unsqueeze(2) > relevance.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)


def _against_worse(scores: Tensor, worse: Tensor, margin: float = 0.0) -> Tensor:
    """
    -log softmax of each candidate among itself and the strictly worse ones, `(batch, list_size)`; 0 where none is.

    softplus(logsumexp_j(γ_j - γ_i)) is that value exactly, and is accurate however far the scores lie apart.
    """
    has_worse = worse.any(dim=2)
    # A row of -inf alone has a NaN gradient, even if its value is discarded: such rows keep their finite entries
    differences = (_differences(scores) + margin).masked_fill(~worse & has_worse.unsqueeze(2), -torch.inf)
    return F.softplus(torch.logsumexp(differences, dim=2)).masked_fill(~has_worse, 0.0)


def _rank_discounts(list_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return 1 / torch.log2(torch.arange(2, list_size + 2, dtype=dtype, device=device))
