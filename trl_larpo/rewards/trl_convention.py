"""[`as_function`]: a reward in TRL's convention, for trainers that sample on their own."""

import asyncio
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from .asynchronous import is_asynchronous
from .functions import Comparison, Reward, as_list, mean_preferences


def as_function(reward: Reward) -> Callable[..., Any]:
    """
    A reward as TRL's trainers call it; asynchronous if it is.

    A ranker sees the completions of one prompt at a time, those that stand beside one another, and gives
    [`mean_preferences`].
    """

    def comparisons(prompts: list[Any], completions: list[Any]) -> list[Comparison]:
        pairs = zip(prompts, completions, strict=True)
        groups = (list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair[0]))
        return [(group[0][0], [completion for _, completion in group]) for group in groups]

    def rates(matrices: Iterable[Any]) -> list[float | None]:
        return [rate for matrix in matrices for rate in mean_preferences(as_list(matrix))]

    def function(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        if reward.pairwise:
            return rates(reward.function(*each) for each in comparisons(prompts, completions))
        return list(reward.function(prompts=prompts, completions=completions, **columns))

    async def asynchronous(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        if reward.pairwise:
            return rates(await asyncio.gather(*(reward.function(*each) for each in comparisons(prompts, completions))))
        return list(await reward.function(prompts=prompts, completions=completions, **columns))

    if inspect.iscoroutinefunction(reward.function) and not reward.pairwise:
        return reward.function
    made: Callable[..., Any] = asynchronous if is_asynchronous(reward.function) else function
    made.__name__ = reward.name
    return made
