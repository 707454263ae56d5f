"""Groups of samples, on their way from GRPOTrainer's batch of single samples to a batch of candidate lists."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .collator import DataCollatorForCandidateLists
from .token_rows import Batch
from .validation import ranked_relevance


@dataclass(frozen=True)
class Sample:
    """
    A completion that the policy has sampled.

    Attributes:
        token_ids: Its tokens.
        scored: Whether the policy wrote each of them. Answers of tools are seen, and not scored. `None`: all.
        reward: The weighted sum of the rewards; `None` where it has none ([`total_rewards`]).
        finished: Whether it ended on its own.
    """

    token_ids: list[int]
    reward: float | None
    finished: bool
    scored: list[bool] | None = None


@dataclass(frozen=True)
class Group:
    """
    The samples of a prompt.

    Attributes:
        prompt_ids: Tokens that all of them begin with.
        samples: New ones first.
    """

    prompt_ids: list[int]
    samples: list[Sample]


def whole_groups(batch: dict[str, Any], rewards: Tensor, finished: Sequence[bool], group_size: int) -> Iterator[Group]:
    """
    The groups of the samples that one process has.

    Prompts of a group are the same but where an environment adds to them: then the group shares how they begin, and
    the rest of each is what its sample begins with, without a score.

    Args:
        batch: As GRPOTrainer makes it: `prompt_ids`, `completion_ids`, their masks, and perhaps `tool_mask`, int64
            `(samples, length)`, the samples of a group one behind the other.
        rewards: Float `(samples,)`, NaN where no reward applied.
        finished: Whether each ended on its own.
        group_size: Samples of each group.
    """
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    batch = {name: batch[name].cpu() for name in names if name in batch}  # at once, not token by token
    prompts = [ids[real.bool()].tolist() for ids, real in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    for start in range(0, len(prompts), group_size):
        members = range(start, start + group_size)
        shared = _common_prefix([prompts[i] for i in members])
        samples = []
        for i in members:
            real = batch["completion_mask"][i].bool()
            rest, token_ids = prompts[i][len(shared) :], batch["completion_ids"][i][real].tolist()
            scored = None
            if rest or "tool_mask" in batch:
                written = batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]
                scored = [False] * len(rest) + written[i][real].bool().tolist()
            reward = None if rewards[i].isnan() else float(rewards[i])
            samples.append(Sample(rest + token_ids, reward, finished[i], scored))
        yield Group(shared, samples)


def total_rewards(by_function: Tensor, weights: Tensor, aggregation: str, group_size: int) -> Tensor:
    """
    The reward of each sample: a weighted sum over the functions that applied to it.

    Args:
        by_function: Float `(samples, functions)`, NaN where a function did not apply.
        weights: Float `(functions,)`.
        aggregation: GRPOTrainer's `multi_objective_aggregation`: "sum_then_normalize", or "normalize_then_sum", where
            each function is brought to mean 0 and deviation 1 over a group before it is weighted.
        group_size: Samples of each group, one behind the other.

    Returns:
        Float `(samples,)`, NaN where no function applied, or one did not that applied to others of the group: sums of
        different functions cannot be compared.
    """
    values, grouped = by_function, by_function.view(-1, group_size, by_function.size(1))
    if aggregation == "normalize_then_sum":
        known = (~grouped.isnan()).sum(dim=1, keepdim=True)
        offsets = grouped - grouped.nanmean(dim=1, keepdim=True)
        deviation = (offsets.square().nansum(dim=1, keepdim=True) / (known - 1).clamp(min=1)).sqrt()
        values = (offsets / (deviation + 1e-4)).view_as(by_function)
    totals = (values * weights.to(values.device)).nansum(dim=1)
    missing = grouped.isnan()
    counted = ~missing.all(dim=1, keepdim=True)  # functions that applied to the group
    incomparable = (missing & counted).any(dim=2).view(-1)
    return totals.masked_fill(incomparable | by_function.isnan().all(dim=1), torch.nan)


def collate_groups(groups: list[Group], pad_token_id: int, truncated_completions: str) -> Batch:
    """
    A batch of candidate lists, as [`DataCollatorForCandidateLists`] makes it. Where tools took part it has a
    `scored_mask`.

    Samples that cannot be ranked (without a reward, or cut off and to be dropped) are left out. A list of which nothing
    is left keeps its first sample, which no mask shows, so that every batch has its number of lists.

    Args:
        groups: The groups.
        pad_token_id: Token to pad with.
        truncated_completions: As in [`LarPOConfig`].
    """
    examples, kept = [], []
    for group in groups:
        usable = [sample for sample in group.samples if _is_usable(sample, truncated_completions)]
        samples = usable or group.samples[:1]
        finished = [sample.finished for sample in samples]
        examples.append(
            {
                "prompt_ids": group.prompt_ids,
                "completion_ids": [sample.token_ids for sample in samples],
                "relevance": ranked_relevance([sample.reward for sample in samples], finished, truncated_completions),
            }
        )
        kept.append((samples, bool(usable)))
    batch = DataCollatorForCandidateLists(pad_token_id)(examples)
    for place, (_, is_list) in enumerate(kept):
        batch["candidate_mask"][place] &= is_list
    if any(sample.scored is not None for samples, _ in kept for sample in samples):
        batch["scored_mask"] = batch["completion_mask"].bool()
        for i, (samples, _) in enumerate(kept):
            for j, sample in enumerate(samples):
                if sample.scored is not None:
                    batch["scored_mask"][i, j, : len(sample.scored)] = torch.tensor(sample.scored)
    return batch


def _common_prefix(prompts: list[list[int]]) -> list[int]:
    first, length = prompts[0], min(map(len, prompts))
    return next((first[:i] for i in range(length) if any(ids[i] != first[i] for ids in prompts)), first[:length])


def _is_usable(sample: Sample, truncated_completions: str) -> bool:
    if not sample.finished and truncated_completions != "by_reward":
        return truncated_completions == "rank_last"
    return sample.reward is not None
