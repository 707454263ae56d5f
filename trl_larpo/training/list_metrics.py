"""What a training on lists logs: sums and counts of each metric, over batches and processes."""

import torch
from accelerate import Accelerator
from torch import Tensor

from ..losses import best_and_worst
from ..metrics import kendall_tau, mrr, ndcg, pair_accuracy
from .objective import Objective, shares
from .scorer import CandidateOutputs
from .token_rows import Batch

Averages = dict[str, tuple[Tensor, Tensor]]
"""Name → sum, and the number of things summed."""


def list_averages(batch: Batch, policy: CandidateOutputs, objective: Objective, beta: float) -> Averages:
    """
    Metrics of one batch, under DPOTrainer's names where there is one.

    The best candidate of a list is its "chosen" one and the worst its "rejected" one; where several tie, their mean
    counts. Lists with nothing to compare are left out of every metric that compares.

    Args:
        batch: The batch.
        policy: The policy's forward pass.
        objective: Log ratios and scores; the scores are β times the log ratios but for scores per token and for
            f-divergences other than reverse KL.
        beta: β of the implicit rewards.
    """
    relevance, mask, tokens, scores = batch["relevance"], batch["candidate_mask"], policy.tokens, objective.scores
    rewards = beta * objective.log_ratios
    best, worst = best_and_worst(relevance, mask)
    chosen, rejected = shares(best), shares(worst)
    num_lists = torch.tensor(mask.size(0))
    comparable = chosen.any(dim=1)
    num_comparable = comparable.sum()
    chosen_rewards, rejected_rewards = (chosen * rewards).sum(dim=1), (rejected * rewards).sum(dim=1)
    chosen_tokens, rejected_tokens = (chosen * tokens["count"]).sum(), (rejected * tokens["count"]).sum()
    # On the CPU, because they need float64
    lists = [tensor[comparable].cpu() for tensor in (scores, relevance, mask)]

    averages = {
        "entropy": (tokens["entropy"].sum(), tokens["count"].sum()),
        "logits/chosen": ((chosen * tokens["mean_logits"]).sum(), chosen_tokens),
        "logits/rejected": ((rejected * tokens["mean_logits"]).sum(), rejected_tokens),
        "mean_token_accuracy": ((chosen * tokens["is_top1"]).sum(), chosen_tokens),
        "rewards/chosen": (chosen_rewards.sum(), num_comparable),
        "rewards/rejected": (rejected_rewards.sum(), num_comparable),
        "rewards/accuracies": ((chosen_rewards > rejected_rewards).sum(), num_comparable),
        "rewards/margins": ((chosen_rewards - rejected_rewards).sum(), num_comparable),
        "logps/chosen": ((chosen * policy.logps).sum(), num_comparable),
        "logps/rejected": ((rejected * policy.logps).sum(), num_comparable),
        "ranking/ndcg": (ndcg(*lists).sum(), num_comparable),
        "ranking/mrr": (mrr(*lists).sum(), num_comparable),
        # NaN where all scores are equal, as at the very first step: no correlation
        "ranking/kendall_tau": (kendall_tau(*lists).nan_to_num(0.0).sum(), num_comparable),
        "ranking/accuracy": (pair_accuracy(*lists).sum(), num_comparable),
        "list_size": (mask.sum(), num_lists),
        "completions/mean_length": (tokens["count"].sum(), mask.sum()),
    }
    if policy.aux_loss is not None:
        averages["aux_loss"] = (policy.aux_loss.detach() * num_lists, num_lists)
    return averages


class ListMetrics:
    """
    Sums and counts since the last log, so that every candidate of every process weighs the same.

    Args:
        accelerator: That of the training.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._totals: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}

    def add(self, mode: str, averages: Averages) -> dict[str, Tensor]:
        """
        Adds a batch, which every process does at the same time.

        Args:
            mode: `"train"` or `"eval"`.
            averages: From [`list_averages`].

        Returns:
            Sum and count over all processes by name, `(2,)` each, on the CPU.
        """
        device = averages["entropy"][0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        flat = torch.stack([x.to(device, dtype) for pair in averages.values() for x in pair])
        reduced = self._accelerator.reduce(flat, reduction="sum").view(-1, 2).cpu()
        sums = dict(zip(averages, reduced, strict=True))
        totals = self._totals[mode]
        for name, of_batch in sums.items():
            totals[name] = totals.get(name, 0) + of_batch
        return sums

    def take(self, mode: str) -> dict[str, float]:
        """The averages since the last time."""
        totals = self._totals[mode]
        averages = {name: float(total / count) for name, (total, count) in totals.items() if count > 0}
        totals.clear()
        return averages
