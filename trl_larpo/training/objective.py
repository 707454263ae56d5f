"""[`RankingObjective`]: the losses of a training, from log-probabilities of candidates to one number."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..losses import RankingLoss, best_and_worst
from .ranking_options import DPO_LOSSES, ranking_loss
from .scorer import CandidateOutputs
from .scores import candidate_scores
from .token_rows import Batch


@dataclass
class Objective:
    """
    What a batch comes to.

    Attributes:
        loss: Mean over the lists of the batch that count, a scalar with gradient.
        log_ratios: log π_θ - log π_ref of each candidate, `(batch, list_size)`.
        scores: What the ranking losses saw, same shape.
    """

    loss: Tensor
    log_ratios: Tensor
    scores: Tensor


class RankingObjective:
    """
    The weighted sum of the losses that the options name.

    Args:
        loss_types: Names in [`trl_larpo.losses.RANKING_LOSSES`], and "sft".
        loss_weights: Factor of each. `None`: 1.
        args: Options of the training, where those of scores and losses are read.
        loss_fn: Takes the place of all of them.

    Attributes:
        names: Of the losses; `"loss_fn"` for one of the user's own.
        weights: Factor of each.
    """

    def __init__(
        self, loss_types: list[str], loss_weights: list[float] | None, args: Any, loss_fn: RankingLoss | None = None
    ):
        self._args = args
        self._losses: dict[str, RankingLoss] = {"loss_fn": loss_fn} if loss_fn is not None else {}
        if loss_fn is None:
            self._losses = {name: ranking_loss(name, args) for name in loss_types if name not in DPO_LOSSES}
        self.names = ["loss_fn"] if loss_fn is not None else loss_types
        self.weights = [1.0] * len(self.names) if loss_fn is not None or loss_weights is None else loss_weights

    def __call__(
        self, policy: CandidateOutputs, ref_logps: Tensor, batch: Batch, num_counted: int | None = None
    ) -> Objective:
        """
        Args:
            policy: What the policy says of the candidates.
            ref_logps: Log-probability of each completion under the reference, `(batch, list_size)`; 0 without one.
            batch: With `relevance` and `candidate_mask`.
            num_counted: Lists at the beginning of the batch that the loss is the mean of. `None`, and 0, which has no
                mean: all.
        """
        counted = slice(num_counted or None)
        relevance, mask = batch["relevance"][counted], batch["candidate_mask"][counted]
        log_ratios = policy.logps - ref_logps
        scores = candidate_scores(log_ratios, policy.tokens["count"], self._args)
        loss = torch.zeros((), device=scores.device)
        for name, weight in zip(self.names, self.weights, strict=True):
            if name == "sft":
                logps, num_tokens = policy.logps[counted], policy.tokens["count"][counted]
                loss = loss + weight * _sft_loss(logps, num_tokens, relevance, mask)
            else:
                loss = loss + weight * self._losses[name](scores[counted], relevance, mask).mean()
        return Objective(loss, log_ratios, scores)


def _sft_loss(logps: Tensor, num_tokens: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood per token of the best candidates; of several tied for best, each weighs its share."""
    weight = shares(best_and_worst(relevance, mask)[0])
    return -(weight * logps).sum() / (weight * num_tokens).sum().clamp(min=1)


def shares(members: Tensor) -> Tensor:
    """Equal shares of 1 for the `True` entries of each row."""
    return members / members.sum(dim=1, keepdim=True).clamp(min=1)
