"""Memory: candidates of earlier iterations that join the pool of their prompt (paper, section 3.2)."""

from collections.abc import Iterable
from dataclasses import replace

from ..candidates import CandidatePool
from ..errors import ConfigError
from ..prompts import in_form_of, prompt_id

MEMORIES = ("none", "previous", "all")


def earlier_iterations(memory: str, iteration: int) -> list[int]:
    """
    Iterations whose candidates join those of `iteration`, latest first (paper, section 3.2: memorization).

    Args:
        memory: `"none"`, `"previous"` or `"all"`.
        iteration: The current one, from 1 on.
    """
    if memory not in MEMORIES:
        raise ConfigError(f"`memory` is {memory!r}; it must be one of {', '.join(MEMORIES)}.")
    first = {"none": iteration, "previous": max(1, iteration - 1), "all": 1}[memory]
    return list(range(iteration - 1, first - 1, -1))


def add_earlier_candidates(
    pools: list[CandidatePool],
    earlier: Iterable[tuple[list[CandidatePool], int | None]],
    reward_id: str,
) -> list[CandidatePool]:
    """
    Adds earlier candidates of the same prompts.

    Args:
        pools: Those of the current iteration.
        earlier: Pools to look into, and the iteration whose candidates are wanted; `None`: all of them.
        reward_id: Candidates that other rewards have scored lose their rewards: they are scored again.
    """
    by_id = {pool.prompt.id: pool for pool in pools}
    for pool in pools:  # files made elsewhere hold the bare text of what is a conversation here
        content = pool.prompt.content
        if not isinstance(content, str) and len(content) == 1:
            by_id.setdefault(prompt_id(content[0]["content"]), pool)
    added: dict[str, list] = {pool.prompt.id: [] for pool in pools}
    for earlier_pools, iteration in earlier:
        for earlier_pool in earlier_pools:
            current = by_id.get(earlier_pool.prompt.id)
            if current is None:
                continue
            for candidate in earlier_pool.candidates:
                if iteration is None or candidate.iteration == iteration:
                    completion = in_form_of(current.prompt.content, candidate.completion)
                    candidate = replace(candidate, completion=completion)
                    if candidate.scored_by != reward_id:
                        candidate = replace(candidate, reward=None, reward_parts={}, scored_by=None)
                    added[current.prompt.id].append(candidate)
    return [pool.with_candidates([*pool.candidates, *added[pool.prompt.id]]) for pool in pools]
