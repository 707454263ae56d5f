"""Builds ranked candidate lists from scored completions."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class CandidateLists:
    """
    Rows to train on, and what became of the completions that are not in them.

    Attributes:
        rows: `{"prompt", "completions", "rewards"}`, completions best first.
        num_duplicates: Completions dropped because the same prompt had the very same one already.
        num_empty: Completions dropped because they are empty.
        num_unfinished: Completions dropped because they were cut off before they ended.
        num_too_small: Prompts left out because fewer than two distinct completions remained.
        num_tied: Prompts left out because all their completions have the same reward.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    num_duplicates: int = 0
    num_empty: int = 0
    num_unfinished: int = 0
    num_too_small: int = 0
    num_tied: int = 0

    def summary(self) -> str:
        """One sentence for a person."""
        return (
            f"{len(self.rows)} lists of {sum(len(row['completions']) for row in self.rows)} completions; left out: "
            f"{self.num_tied} prompts with all rewards equal, {self.num_too_small} with fewer than 2 distinct "
            f"completions; {self.num_unfinished} cut off, {self.num_duplicates} duplicate and {self.num_empty} empty "
            "completions."
        )


def build_candidate_lists(
    prompts: list[Any],
    completions: list[list[str]],
    rewards: list[list[float]],
    finished: list[list[bool]] | None = None,
) -> CandidateLists:
    """
    Drops duplicate, empty and unfinished completions, ranks the rest, and keeps the lists with something to compare.

    Training ends every completion with an end token. One that was cut off never had it, and pushing it down would
    teach the model not to end its answers there: so it is left out.

    Args:
        prompts: Strings or conversations.
        completions: Texts sampled for each prompt. Of several equal ones the highest rewarded is kept.
        rewards: Their rewards, same shape.
        finished: Whether each completion ended by itself, same shape. `None`: all did.

    Returns:
        The lists, completions best first (in sampling order where rewards tie), and counts of what was left out.
    """
    result = CandidateLists()
    if finished is None:
        finished = [[True] * len(texts) for texts in completions]
    for prompt, texts, values, ended in zip(prompts, completions, rewards, finished, strict=True):
        candidates = [(text, value) for text, value, end in zip(texts, values, ended, strict=True) if end]
        result.num_unfinished += len(texts) - len(candidates)
        ranked = sorted(candidates, key=lambda candidate: -candidate[1])
        filled = [(text, value) for text, value in ranked if text.strip()]
        distinct = {}
        for text, value in filled:
            distinct.setdefault(text, value)
        result.num_empty += len(ranked) - len(filled)
        result.num_duplicates += len(filled) - len(distinct)
        if len(distinct) < 2:
            result.num_too_small += 1
        elif len(set(distinct.values())) == 1:
            result.num_tied += 1
        else:
            conversational = not isinstance(prompt, str)
            result.rows.append(
                {
                    "prompt": prompt,
                    "completions": [
                        [{"role": "assistant", "content": text}] if conversational else text for text in distinct
                    ],
                    "rewards": list(distinct.values()),
                }
            )
    return result
