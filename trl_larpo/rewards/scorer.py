"""[`RewardScorer`]: rewards all candidates of many prompts, in chunks that are saved as they are done."""

import gc
import hashlib
import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..candidates import Candidate, CandidatePool
from ..errors import DataError, LarPOError
from ..pools import StoredPools, ids_of
from ..preparation import preparing
from ..prompts import Row, without_thoughts
from ..set_aside import SetAside, set_aside_in
from ..shares import share_of
from ..storage import GrowingFile
from ..waiting import wait_for_all
from .asynchronous import CallsInFlight, is_asynchronous
from .functions import Completions, Reward, load_rewards, reward_id, score_pools, start_calls
from .options import RewardOptions
from .pairrm import PairRM
from .reward_models import RewardModel

_COMPLETIONS_PER_CALL = 256  # of a reward function
_FIRST_FAILURES = 5  # without any reward before them: then the reward is broken, and the rest is not tried


class RewardScorer:
    """
    Rewards candidates. Reward models are loaded when they are first needed.

    Args:
        options: Who judges.
        use_cpu: Do not use a GPU.
    """

    def __init__(self, options: RewardOptions, *, use_cpu: bool = False):
        self.options, self.use_cpu = options, use_cpu
        self.id = reward_id(options.reward_funcs, options.reward_weights, **options.settings)
        self._rewards: list[Reward] | None = None

    @property
    def rewards(self) -> list[Reward]:
        if self._rewards is None:
            options = self.options
            with preparing():
                self._rewards = load_rewards(options.reward_funcs, options.reward_weights, self._load_model)
        return self._rewards

    def _load_model(self, path: str, pairwise: bool) -> RewardModel | PairRM:
        return (PairRM if pairwise else RewardModel)(
            path,
            batch_size=self.options.reward_batch_size,
            max_length=self.options.reward_max_length,
            dtype=self.options.reward_dtype,
            device="cpu" if self.use_cpu else PartialState().device,
        )

    @property
    def is_relative(self) -> bool:
        """Whether a reward depends on the other candidates of its prompt, and so holds in no other pool."""
        return self.options.normalize_rewards or any(reward.pairwise for reward in self.rewards)

    def close(self) -> None:
        """Lets go of reward models."""
        if self._rewards is None:
            return
        self._rewards = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def score(
        self,
        pools: Sequence[CandidatePool],
        path: Path,
        description: str = "Rewarding",
        *,
        against: Completions | None = None,
    ) -> StoredPools:
        """
        Rewards the candidates that these rewards have not scored, each process its share of the prompts.

        Args:
            pools: Prompts and their candidates.
            path: Where the whole file will be. What is scored is saved beside it ([`GrowingFile`]); called again after
                a kill, the rest is scored.
            description: What the progress bar says.
            against: Completions that rankers compare with, as in [`score_pools`].

        Returns:
            The pools with their rewards, in their order, without those that were set aside: a reward failed on them
            twice ([`SetAside`]). In processes but the first nothing.

        Raises:
            DataError: If a reward fails on too many prompts; the rewards of others are kept. If a prompt occurs twice.
        """
        state = PartialState()
        file = GrowingFile(path, share=state.process_index, key="digest")
        set_aside = SetAside(path, len(pools), self.options.max_failed_share, "rewarded", state.process_index)
        wait_for_all()
        ids = ids_of(pools)
        if len(set(ids)) < len(ids):
            raise DataError("A prompt occurs twice; put its candidates into one pool.")
        pools = self.as_judged(pools)
        work = _Work(self, pools, file, against)
        done = set(work.done)
        with tqdm(
            total=len(pools), initial=len(done), desc=description, unit=" prompts", disable=not state.is_main_process
        ) as progress:
            chunks = [[place for place in chunk if ids[place] not in done] for chunk in work.chunks()]
            mine = share_of([number for number, chunk in enumerate(chunks) if chunk])
            work.score_all([chunks[number] for number in mine], set_aside.limit, progress)
        problem = work.try_again(set_aside)
        file.sync()
        wait_for_all()
        if problem is not None:
            raise DataError(
                f"{problem} Rewards of {len(work.done & set(ids))} of {len(pools)} prompts are kept. Fix the reward "
                "and run the same command again."
            )
        if not state.is_main_process:
            return StoredPools.none()
        if (problem := set_aside.too_many_together()) is not None:
            raise DataError(problem)
        return self._saved_pools(pools, work.digests, path)

    def as_judged(self, pools: Sequence[CandidatePool]) -> Sequence[CandidatePool]:
        """The pools as they are rewarded and kept: without thoughts, if all is to be without them."""
        if self.options.strip_thinking != "all":
            return pools
        return StoredPools(ids_of(pools), pools.__getitem__).map(_without_thoughts)

    def _saved_pools(self, pools: Sequence[CandidatePool], digests: list[str], path: Path) -> StoredPools:
        """
        The pools with the rewards that were saved.

        Raises:
            DataError: If a prompt has neither a reward nor a reason not to have one.
        """
        rows, ids = GrowingFile(path, key="digest").rows, ids_of(pools)
        place_of = {digest: place for place, digest in enumerate(rows.keys)}
        failed = {row["prompt_id"] for row in set_aside_in(path.parent).get(path.stem, [])}
        if any(digest not in place_of and name not in failed for digest, name in zip(digests, ids, strict=True)):
            raise DataError("Another process could not reward its share; see its message.")
        scored = [place for place, digest in enumerate(digests) if digest in place_of]

        def pool(place: int) -> CandidatePool:
            return with_scores(pools[scored[place]], rows[place_of[digests[scored[place]]]], self.id)

        return StoredPools([ids[place] for place in scored], pool)

    def score_now(
        self,
        pools: list[CandidatePool],
        against: Completions | None = None,
        calls: dict[str, Future] | None = None,
    ) -> list[CandidatePool]:
        """As `score`, without saving anything. `calls`: those that [`RewardScorer.start`] has begun for the pools."""
        pools, asked, judged = self._seen_by_rewards(pools)
        against = self._seen_by_rankers(against, pools)
        in_flight = self.options.reward_calls_in_flight
        scored = score_pools(self.rewards, judged, self.options.normalize_rewards, self.id, against, calls, in_flight)
        whole = [
            pool.with_candidates(_in_place_of_unscored(pool.candidates, _scored_as(mine, new), self.id))
            for pool, mine, new in zip(pools, asked, scored, strict=True)
        ]
        return [pool.with_comparable_rewards() for pool in whole]

    def start(self, pools: list[CandidatePool], against: Completions | None = None) -> dict[str, Future]:
        """Starts the calls of asynchronous rewards for some pools, and returns them by reward."""
        return start_calls(self.rewards, self._seen_by_rewards(pools)[-1], self._seen_by_rankers(against, pools))

    def _seen_by_rankers(self, against: Completions | None, pools: list[CandidatePool]) -> Completions | None:
        """Completions of the same prompts, as rankers compare with them."""
        if against is None or self.options.strip_thinking == "none":
            return against
        names = [pool.prompt.id for pool in pools]
        return {name: [without_thoughts(each) for each in against.get(name, [])] for name in names}

    def _seen_by_rewards(self, pools: list[CandidatePool]) -> tuple[list[CandidatePool], ...]:
        """The pools as they are kept, with the candidates alone that have no reward, and as rewards see these."""
        if self.options.strip_thinking == "all":
            pools = [_without_thoughts(pool) for pool in pools]
        asked = [pool.with_candidates([c for c in pool.candidates if c.scored_by != self.id]) for pool in pools]
        stripped = self.options.strip_thinking == "rewards"
        return pools, asked, [_without_thoughts(pool) for pool in asked] if stripped else asked


class _Work:
    """
    The scoring of some pools into a file.

    Attributes:
        failures: Places of the pools on which a reward failed, and why.
        done: Names of the prompts whose rewards are saved.
        digests: Of each pool ([`saved_scores`]).
    """

    def __init__(
        self,
        scorer: RewardScorer,
        pools: Sequence[CandidatePool],
        file: GrowingFile,
        against: Completions | None,
    ):
        self.scorer, self.pools, self.file, self.against = scorer, pools, file, against
        self.done: set[str] = set()
        self.digests: list[str] = []
        saved = set(file.rows.keys)
        self.failures: list[tuple[int, str]] = []
        # All prompts get the same columns, so that every call of a reward gets the same arguments
        self.columns: dict[str, None] = {}
        self.most_candidates = 1
        for pool in pools:
            self.columns.update(dict.fromkeys(pool.prompt.columns))
            self.most_candidates = max(self.most_candidates, len(pool.candidates))
            self.digests.append(pool_digest(pool))
            if self.digests[-1] in saved:
                self.done.add(pool.prompt.id)

    @property
    def is_broken(self) -> bool:
        """Whether the reward has failed a few times and never worked."""
        return len(self.failures) >= _FIRST_FAILURES and not self.done

    def chunks(self) -> list[range]:
        """Places of the pools that are scored together."""
        size, count = max(1, _COMPLETIONS_PER_CALL // self.most_candidates), len(self.pools)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def score_all(self, chunks: list[list[int]], limit: float, progress: tqdm) -> None:
        """
        Scores all chunks, until a reward has failed on more prompts than `limit`.

        With an asynchronous reward, the prompts of all chunks are scored as its answers come.
        """
        if any(is_asynchronous(reward.function) for reward in self.scorer.rewards):
            self._score_with_calls_in_flight(deque(place for chunk in chunks for place in chunk), limit, progress)
            return
        for chunk in chunks:
            if chunk and not self.is_broken and len(self.failures) <= limit:
                self.score(chunk)
                progress.update(len(chunk))

    def _score_with_calls_in_flight(self, waiting: deque[int], limit: float, progress: tqdm) -> None:
        in_flight: CallsInFlight[int] = CallsInFlight()
        try:
            while waiting or len(in_flight):
                if self.is_broken or len(self.failures) > limit:
                    waiting.clear()
                while waiting and len(in_flight) < self.scorer.options.reward_calls_in_flight:
                    place = waiting.popleft()
                    in_flight.add(place, self.scorer.start([self._pool(place)], self.against))
                for place, calls in in_flight.take_ready():
                    self.score([place], calls)
                    progress.update()
        finally:
            in_flight.cancel()

    def _pool(self, place: int) -> CandidatePool:
        pool = self.pools[place]
        return replace(pool, prompt=replace(pool.prompt, columns=self.columns | pool.prompt.columns))

    def score(self, places: Sequence[int], calls: dict[str, Future] | None = None) -> None:
        """Scores some pools; where a reward fails, one by one, so that the rewards of the others are kept."""
        pools = [self._pool(place) for place in places]
        try:
            scored = self.scorer.score_now(pools, self.against, calls)
            of_places = zip(places, scored, strict=True)
            self.file.add([saved_scores(pool, self.digests[place]) for place, pool in of_places])
            self.done.update(pool.prompt.id for pool in pools)
            return
        except DataError as error:
            reason = str(error)
        # After the block, as the error holds what a reward model had allocated when it ran out of memory
        if len(places) == 1:
            self.failures.append((places[0], reason))
            return
        for place in places:
            if not self.is_broken:
                self.score([place])

    def try_again(self, set_aside: SetAside) -> str | None:
        """Scores once more what failed: a judge behind a network may answer now. Returns what ends the stage, if so."""
        failures, self.failures = self.failures, []
        if failures and (not self.done or len(failures) > set_aside.limit):
            return failures[0][1]
        for place, _ in failures:
            self.score([place])
        for place, reason in self.failures:
            try:
                set_aside.add(self.pools[place].prompt, reason)
            except LarPOError as error:
                return str(error)
        return None


def _without_thoughts(pool: CandidatePool) -> CandidatePool:
    """The pool with the answers alone. Tokens of what was cut off are no longer those of its text."""
    stripped = [(candidate, without_thoughts(candidate.completion)) for candidate in pool.candidates]
    return pool.with_candidates(
        [
            candidate if text is candidate.completion else replace(candidate, completion=text, token_ids=None)
            for candidate, text in stripped
        ]
    )


def _scored_as(pool: CandidatePool, scored: CandidatePool) -> list[Candidate]:
    """The candidates as they are, with what was said of them without their thoughts."""
    return [
        replace(candidate, completion=own.completion, token_ids=own.token_ids)
        for own, candidate in zip(pool.candidates, scored.candidates, strict=True)
    ]


def _in_place_of_unscored(candidates: list[Candidate], scored: list[Candidate], reward_id: str) -> list[Candidate]:
    remaining = iter(scored)
    return [candidate if candidate.scored_by == reward_id else next(remaining) for candidate in candidates]


def saved_scores(pool: CandidatePool, digest: str) -> Row:
    """What is saved of a pool as it is scored: its texts are in a file already, and the digest tells whose they are."""
    scores = [{"reward": c.reward, "reward_parts": c.reward_parts} for c in pool.candidates]
    return {"digest": digest, "prompt_id": pool.prompt.id, "scores": scores}


def saved_scores_of_row(row: Row) -> Row:
    """As [`saved_scores`], from a row of a file that is whole."""
    pool = CandidatePool.from_row(row)
    return saved_scores(pool, pool_digest(pool))


def pool_digest(pool: CandidatePool) -> str:
    """A name for what rewards see of a pool: 16 hexadecimal digits."""
    candidates = [(candidate.completion, candidate.finished) for candidate in pool.candidates]
    seen = json.dumps([pool.prompt.id, pool.prompt.columns, candidates], sort_keys=True)
    return hashlib.sha256(seen.encode()).hexdigest()[:16]


def with_scores(pool: CandidatePool, row: Row, reward_id: str) -> CandidatePool:
    """A pool with what [`saved_scores`] has of it."""
    pairs = zip(pool.candidates, row["scores"], strict=True)
    return pool.with_candidates([replace(candidate, **score, scored_by=reward_id) for candidate, score in pairs])
