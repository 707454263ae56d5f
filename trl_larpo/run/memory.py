"""
Memory: rows of earlier iterations that are trained on again (paper, section 3.2 and Algorithm 1).

The data of an iteration are the union of its own rows and those of earlier iterations. Where a prompt comes again, its
earlier candidates join the pool of the new ones ([`add_earlier_candidates`]); rows whose prompts do not come again
stay as they were ([`earlier_rows`]).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..candidates import Candidate, CandidatePool
from ..errors import ConfigError
from ..pools import StoredPools, ids_of, places_by_id
from ..prompts import Content, Prompt, in_form_of, prompt_id

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
    pools: Sequence[CandidatePool],
    earlier: Iterable[tuple[Sequence[CandidatePool], int | None]],
    reward_id: str,
) -> StoredPools:
    """
    Adds earlier candidates of the same prompts.

    Args:
        pools: Those of the current iteration.
        earlier: Pools to look into, and the iteration whose candidates are wanted; `None`: all of them.
        reward_id: Candidates that other rewards have scored lose their rewards: they are scored again.
    """
    ids = ids_of(pools)
    current = set(ids)
    sources = [(of_source, places_by_id(ids_of(of_source)), iteration) for of_source, iteration in earlier]

    def with_earlier(place: int) -> CandidatePool:
        pool = pools[place]
        names = [pool.prompt.id, *sorted(_other_names(pool.prompt.content) - current)]
        added = [
            _to_be_compared(candidate, pool.prompt.content, reward_id)
            for of_source, places, iteration in sources
            for earlier_place in sorted(place for name in names for place in places.get(name, []))
            for candidate in of_source[earlier_place].candidates
            if iteration is None or candidate.iteration == iteration
        ]
        return pool.with_candidates([*pool.candidates, *added])

    return StoredPools(ids, with_earlier)


def joined_prompts(prompts: Iterable[Prompt], earlier: Sequence[CandidatePool]) -> set[str]:
    """Names of those earlier prompts whose candidates [`add_earlier_candidates`] adds to `prompts`."""
    names = {name for prompt in prompts for name in (prompt.id, *_other_names(prompt.content))}
    return names & set(ids_of(earlier))


def _other_names(prompt: Content) -> set[str]:
    """Names of a conversation in files made elsewhere, which hold its bare text or no system message."""
    if isinstance(prompt, str):
        return set()
    turns = [message for message in prompt if message["role"] != "system"]
    return {prompt_id(turns)} | ({prompt_id(turns[0]["content"])} if len(turns) == 1 else set())


def _to_be_compared(candidate: Candidate, prompt: Content, reward_id: str) -> Candidate:
    """A candidate in the form of the prompt, and without a reward if other rewards have scored it."""
    candidate = replace(candidate, completion=in_form_of(prompt, candidate.completion))
    if candidate.scored_by == reward_id:
        return candidate
    return replace(candidate, reward=None, reward_parts={}, scored_by=None)


def earlier_rows(
    pools: Sequence[CandidatePool],
    earlier: Iterable[tuple[Sequence[CandidatePool], int]],
    memory: str,
    is_relative: bool,
) -> StoredPools:
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
    known, places = set(ids_of(pools)), []

    def row(earlier_pools: Sequence[CandidatePool], place: int, iteration: int) -> CandidatePool:
        pool = earlier_pools[place]
        kept = [each for each in pool.candidates if memory == "all" or each.iteration == iteration]
        of_row = pool.with_candidates(kept)
        return of_row.without_rewards() if is_relative and len(kept) < len(pool.candidates) else of_row

    for earlier_pools, iteration in earlier:
        for place, name in enumerate(ids_of(earlier_pools)):
            if name not in known and row(earlier_pools, place, iteration).candidates:
                known.add(name)
                places.append((name, (earlier_pools, place, iteration)))
    return StoredPools([name for name, _ in places], lambda place: row(*places[place][1]))
