"""[`SampleMemory`]: samples of earlier steps, which join the new ones of their prompt."""

from dataclasses import asdict, replace
from typing import Any

from .groups import Group, Sample


class SampleMemory:
    """
    The last samples of every prompt, each with the reward that it got when it was sampled.

    Args:
        size: Most samples that are kept of a prompt.
    """

    def __init__(self, size: int):
        self._size = size
        self._samples: dict[tuple[int, ...], list[Sample]] = {}

    def join(self, group: Group) -> Group:
        """A group with the earlier samples of its prompt behind its own. Those that it has already are left out."""
        new = {tuple(sample.token_ids) for sample in group.samples}
        earlier = self._samples.get(tuple(group.prompt_ids), [])
        return replace(group, samples=group.samples + [x for x in earlier if tuple(x.token_ids) not in new])

    def remember(self, groups: list[Group]) -> None:
        """Keeps the samples of some groups, and of the earlier ones as many as there is room for, the latest first."""
        if self._size == 0:
            return
        for group in groups:
            rewarded = [sample for sample in group.samples if sample.reward is not None]
            samples = rewarded + self._samples.get(tuple(group.prompt_ids), [])
            distinct = {tuple(sample.token_ids): sample for sample in reversed(samples)}
            latest_first = [distinct.pop(key) for x in samples if (key := tuple(x.token_ids)) in distinct]
            self._samples[tuple(group.prompt_ids)] = latest_first[: self._size]

    def to_rows(self) -> list[dict[str, Any]]:
        """What [`from_rows`] takes, as JSON has it."""
        return [
            {"prompt_ids": list(prompt_ids), "samples": [asdict(sample) for sample in samples]}
            for prompt_ids, samples in self._samples.items()
        ]

    def from_rows(self, rows: list[dict[str, Any]]) -> None:
        """Takes the place of what is there."""
        self._samples = {tuple(row["prompt_ids"]): [Sample(**sample) for sample in row["samples"]] for row in rows}
