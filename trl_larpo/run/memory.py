"""
Memory: rows of earlier iterations that are trained on again (paper, section 3.2 and Algorithm 1).

The data of an iteration are the union of its own rows and those of earlier iterations. Where a prompt comes again, its
earlier candidates join the pool of the new ones ([`add_earlier_candidates`]); rows whose prompts do not come again
stay as they were ([`earlier_rows`]).
"""

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
    for pool in pools:  # files made elsewhere hold the bare text, or no system message, of what is a conversation here
        if not isinstance(pool.prompt.content, str):
            turns = [message for message in pool.prompt.content if message["role"] != "system"]
            by_id.setdefault(prompt_id(turns), pool)
            if len(turns) == 1:
                by_id.setdefault(prompt_id(turns[0]["content"]), pool)
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


def earlier_rows(
    pools: list[CandidatePool], earlier: Iterable[tuple[list[CandidatePool], int]], memory: str, is_relative: bool
) -> list[CandidatePool]:
    """
    Rows of earlier iterations whose prompts have not come again.

    Args:
        pools: Those of the current iteration.
        earlier: Rewarded pools of earlier iterations and the number of each, latest first.
        memory: `"previous"`: candidates that the iteration itself sampled; `"all"`: also those that had joined them.
        is_relative: Whether rewards hold only among the candidates they were given with: where candidates are left
            behind, the others are to be scored again, and lose their rewards.

    Returns:
        The latest row of each prompt, rows of the latest iteration first.
    """
    known, rows = {pool.prompt.id for pool in pools}, []
    for earlier_pools, iteration in earlier:
        for pool in earlier_pools:
            kept = [each for each in pool.candidates if memory == "all" or each.iteration == iteration]
            if pool.prompt.id not in known and kept:
                known.add(pool.prompt.id)
                row = pool.with_candidates(kept)
                rows.append(row.without_rewards() if is_relative and len(kept) < len(pool.candidates) else row)
    return rows
