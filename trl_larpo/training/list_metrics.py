"""What a training on lists logs: sums and counts of each metric, over batches and processes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ..losses import best_and_worst
from ..metrics import kendall_tau, mrr, ndcg, pair_accuracy
from .objective import Objective, shares
from .scorer import CandidateOutputs
from .token_rows import Batch, count_tokens

Averages = dict[str, tuple[Tensor, Tensor]]
"""Name → sum, and the number of things summed."""

_MOST_KEPT = 64  # batches whose metrics are still to be worked out


@dataclass
class Measurements:
    """
    What is kept of a batch until its metrics are worked out. That takes no time of the device's then.

    Attributes:
        names: Of what is measured of each candidate.
        values: float32 `(names, batch, list_size)`.
        num_tokens: Tokens of the batch in separate rows, a scalar.
        aux_loss: Load-balancing loss of a mixture of experts, a scalar.
    """

    names: list[str]
    values: Tensor
    num_tokens: Tensor
    aux_loss: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, policy: CandidateOutputs, objective: Objective) -> "Measurements":
        values = {
            "relevance": batch["relevance"],
            "mask": batch["candidate_mask"],
            "scores": objective.scores,
            "log_ratios": objective.log_ratios,
            "logps": policy.logps,
        } | policy.tokens
        stacked = torch.stack([x.detach().float() for x in values.values()])
        aux_loss = None if policy.aux_loss is None else policy.aux_loss.detach()
        return cls(list(values), stacked, count_tokens(batch), aux_loss)

    def first(self, num_lists: int) -> "Measurements":
        """
        The first lists of the batch, for metrics that leave out the others. All tokens still count.

        Args:
            num_lists: Lists that stay; with 0, every sum and count of the metrics is 0, even where values are NaN.
        """
        aux_loss = self.aux_loss
        if aux_loss is not None and num_lists == 0:
            aux_loss = torch.zeros_like(aux_loss)
        return Measurements(self.names, self.values[:, :num_lists], self.num_tokens, aux_loss)


def list_averages(batches: list[Measurements], beta: float) -> Averages:
    """
    Metrics of some batches, under DPOTrainer's names where there is one.

    The best candidate of a list is its "chosen" one and the worst its "rejected" one; where several tie, their mean
    counts. Lists with nothing to compare are left out of every metric that compares.

    Args:
        batches: What was measured.
        beta: β of the implicit rewards. Scores are β times the log ratios but for scores per token and for
            f-divergences other than reverse KL.
    """
    width = max(batch.values.size(2) for batch in batches)
    values = torch.cat([F.pad(batch.values, (0, width - batch.values.size(2))) for batch in batches], dim=1)
    # In one transfer, as small operations cost less there
    of = dict(zip(batches[0].names, values.cpu().double(), strict=True))
    relevance, mask = of["relevance"].float(), of["mask"].bool()
    rewards = beta * of["log_ratios"]
    best, worst = best_and_worst(relevance, mask)
    chosen, rejected = shares(best), shares(worst)
    num_lists = torch.tensor(mask.size(0))
    comparable = chosen.any(dim=1)
    num_comparable = comparable.sum()
    chosen_rewards, rejected_rewards = (chosen * rewards).sum(dim=1), (rejected * rewards).sum(dim=1)
    chosen_tokens, rejected_tokens = (chosen * of["count"]).sum(), (rejected * of["count"]).sum()
    lists = [tensor[comparable] for tensor in (of["scores"].float(), relevance, mask)]

    averages = {
        "entropy": (of["entropy"].sum(), of["count"].sum()),
        "logits/chosen": ((chosen * of["mean_logits"]).sum(), chosen_tokens),
        "logits/rejected": ((rejected * of["mean_logits"]).sum(), rejected_tokens),
        "mean_token_accuracy": ((chosen * of["is_top1"]).sum(), chosen_tokens),
        "rewards/chosen": (chosen_rewards.sum(), num_comparable),
        "rewards/rejected": (rejected_rewards.sum(), num_comparable),
        "rewards/accuracies": ((chosen_rewards > rejected_rewards).sum(), num_comparable),
        "rewards/margins": ((chosen_rewards - rejected_rewards).sum(), num_comparable),
        "logps/chosen": ((chosen * of["logps"]).sum(), num_comparable),
        "logps/rejected": ((rejected * of["logps"]).sum(), num_comparable),
        "ranking/ndcg": (ndcg(*lists).sum(), num_comparable),
        "ranking/mrr": (mrr(*lists).sum(), num_comparable),
        # NaN where all scores are equal, as at the very first step: no correlation
        "ranking/kendall_tau": (kendall_tau(*lists).nan_to_num(0.0).sum(), num_comparable),
        "ranking/accuracy": (pair_accuracy(*lists).sum(), num_comparable),
        "list_size": (mask.sum(), num_lists),
        "completions/mean_length": (of["count"].sum(), mask.sum()),
        "num_tokens": (torch.stack([batch.num_tokens.cpu() for batch in batches]).sum(), torch.tensor(1)),
    }
    aux_losses = [batch.aux_loss.cpu() * batch.values.size(1) for batch in batches if batch.aux_loss is not None]
    if aux_losses:
        averages["aux_loss"] = (torch.stack(aux_losses).sum(), num_lists)
    return averages


class ListMetrics:
    """
    Sums and counts since the last log, so that every candidate of every process weighs the same.

    Args:
        accelerator: That of the training.
        beta: β of the implicit rewards.
    """

    def __init__(self, accelerator: Accelerator, beta: float):
        self._accelerator, self._beta = accelerator, beta
        self._kept: dict[str, list[Measurements]] = {"train": [], "eval": []}
        self._totals: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}

    def add(self, mode: str, batch: Measurements, is_finite: bool = True) -> None:
        """
        Adds a batch, which every process does at the same time.

        Args:
            mode: `"train"` or `"eval"`. In evaluations, lists that repeat others to fill the last batches do not count.
            batch: What was measured.
            is_finite: Whether its numbers are finite. If not, it adds tokens alone.
        """
        if not is_finite:
            batch = batch.first(0)
        elif (num_counted := self.num_counted(mode, batch.values.size(1))) is not None:
            batch = batch.first(num_counted)
        self._kept[mode].append(batch)
        if self._accelerator.num_processes > 1 or len(self._kept[mode]) == _MOST_KEPT:
            self._count(mode)

    def take(self, mode: str) -> dict[str, float]:
        """The averages since the last time."""
        self._count(mode)
        totals = self._totals[mode]
        averages = {
            name: float(total / count)
            for name, (total, count) in totals.items()
            if count > 0 and name != "num_tokens"  # which is summed up
        }
        totals.clear()
        return averages

    def take_tokens(self, mode: str) -> int:
        """The tokens since the last time; to be asked for before the averages."""
        self._count(mode)
        tokens = self._totals[mode].pop("num_tokens", None)
        return 0 if tokens is None else int(tokens[0])

    def num_counted(self, mode: str, batch_size: int) -> int | None:
        """
        How many lists of this process's batch no other one has had, in the order of the data set. `None`: all count.

        At the end of an evaluation, accelerate fills the batches of all processes with lists from its start.
        """
        if mode != "eval" or self._accelerator.num_processes == 1:
            return None
        state = self._accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0 or not self._accelerator.even_batches:
            return batch_size
        # Processes of tensor parallelism have the same lists
        sharing = getattr(getattr(self._accelerator, "parallelism_config", None), "tp_size", 1)
        num_batches, position = self._accelerator.num_processes // sharing, self._accelerator.process_index // sharing
        # Online, the remainder counts prompts up to a batch of samples, which may be several batches of lists
        remaining = state.remainder % (num_batches * batch_size) or num_batches * batch_size
        return min(max(remaining - position * batch_size, 0), batch_size)

    def _count(self, mode: str) -> None:
        if not self._kept[mode]:
            return
        averages = list_averages(self._kept[mode], self._beta)
        self._kept[mode].clear()
        flat = torch.stack([x.double() for pair in averages.values() for x in pair])
        if self._accelerator.num_processes > 1:
            device = self._accelerator.device
            flat = flat.to(device, torch.float32 if device.type == "mps" else torch.float64)
            flat = self._accelerator.reduce(flat, reduction="sum").cpu()
        for name, of_batches in zip(averages, flat.view(-1, 2), strict=True):
            self._totals[mode][name] = self._totals[mode].get(name, 0) + of_batches
