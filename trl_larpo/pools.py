"""Pools of candidates that stay in their files: a stage reads one prompt at a time, however many there are."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .candidates import CandidatePool
from .storage import StoredRows


class StoredPools(Sequence[CandidatePool]):
    """
    A sequence of pools, each made when it is asked for. In memory are only the names of the prompts.

    Args:
        ids: Names of the prompts, in their order.
        get: The pool at a place.

    Attributes:
        ids: As above.
    """

    def __init__(self, ids: list[str], get: Callable[[int], CandidatePool]):
        self.ids, self._get = ids, get

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place):
        """One pool, or the list of those of a slice."""
        if isinstance(place, slice):
            return [self._get(each) for each in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._get(place % len(self))

    def map(self, function: Callable[[CandidatePool], CandidatePool]) -> "StoredPools":
        """What a function makes of each pool; the prompts stay."""
        return StoredPools(self.ids, lambda place: function(self._get(place)))

    @classmethod
    def none(cls) -> "StoredPools":
        """No pools."""
        nothing: list[CandidatePool] = []
        return cls([], nothing.__getitem__)


def read_pools(path: Path, skip_damaged: bool = False) -> StoredPools:
    """The prompts and candidates in a file of a run, also without those of damaged lines."""
    rows = StoredRows([path], key="prompt_id", growing=skip_damaged)
    return StoredPools(rows.keys, lambda place: CandidatePool.from_row(rows[place]))


def ids_of(pools: Sequence[CandidatePool]) -> list[str]:
    """Names of the prompts, in the order of the pools."""
    return pools.ids if isinstance(pools, StoredPools) else [pool.prompt.id for pool in pools]


def places_by_id(ids: Iterable[str]) -> dict[str, list[int]]:
    """Where each prompt occurs, in the order in which prompts come first."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(ids):
        places.setdefault(name, []).append(place)
    return places


def chain_pools(files: list[StoredPools]) -> StoredPools:
    """The pools of several files, one file after the other."""
    places = [(pools, place) for pools in files for place in range(len(pools))]

    def pool(number: int) -> CandidatePool:
        pools, place = places[number]
        return pools[place]

    return StoredPools([name for pools in files for name in pools.ids], pool)


def merge_pools(pools: Sequence[CandidatePool]) -> StoredPools:
    """One pool for each prompt, in the order in which prompts come first."""
    places = places_by_id(ids_of(pools))
    groups = list(places.values())

    def merged(place: int) -> CandidatePool:
        first, *others = (pools[each] for each in groups[place])
        if not others:
            return first
        together = [c for pool in (first, *others) for c in pool.candidates]
        return first.with_candidates(together).with_comparable_rewards()

    return StoredPools(list(places), merged)
