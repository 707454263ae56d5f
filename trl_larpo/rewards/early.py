"""
[`EarlyRewards`]: rewards prompts while others are still being sampled.

What comes out is what the scorer gives when all is sampled: it then finds some candidates rewarded already. A prompt on
which a reward fails here, or that is not reached, is left to the scorer.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger

from ..candidates import CandidatePool
from ..pools import StoredPools, ids_of
from ..storage import GrowingFile, StoredRows, partial_files
from .asynchronous import CallsInFlight
from .functions import load_rewards
from .scorer import RewardScorer, pool_digest, saved_scores, with_scores
from .verifiers import math_reward

logger = get_logger(__name__)

_WITH_ALARMS = "trl.rewards.accuracy_rewards"

_MAX_WAITING = 256  # prompts; with more, some are left to the scorer, so that memory does not grow

_FIRST_FAILURES = 5  # without any reward before them: then all is left to the scorer

_LOOK_UP = 0.1  # seconds after which a wait for calls ends, to see what has been sampled


def can_reward_early(scorer: RewardScorer) -> bool:
    """
    Whether rewards can be had while others are sampled: they are functions, hold for a completion alone, and limit
    their time in any thread. A model needs the memory that sampling takes.
    """
    options = scorer.options
    functions = load_rewards(options.reward_funcs, options.reward_weights)  # leaves out models
    is_relative = options.normalize_rewards or any(reward.pairwise for reward in functions)
    needs_main_thread = any(_has_alarms(reward.function) for reward in functions)
    return len(functions) == len(options.reward_funcs) and not is_relative and not needs_main_thread


def _has_alarms(function: Callable[..., Any]) -> bool:
    """
    Whether a reward limits its time by alarms of the main thread, as TRL's rewards with math-verify do. In another
    thread they have no limit, and one completion can keep them busy forever.
    """
    return function is math_reward or getattr(function, "__module__", None) == _WITH_ALARMS


class EarlyRewards:
    """
    Rewards prompts in a thread of its own, as long as the context is open.

    Args:
        scorer: Whose rewards to give; [`can_reward_early`] tells whether it can.
        output: File of the rewarded candidates to come; what is rewarded early is saved beside it.
        columns: Names of all prompts' columns, which every call of a reward gets.
    """

    def __init__(self, scorer: RewardScorer, output: Path, columns: Iterable[str]):
        self.scorer, self.columns = scorer, dict.fromkeys(columns)
        self._file = GrowingFile(_path(output), share=PartialState().process_index)
        self._waiting: queue.Queue[CandidatePool | None] = queue.Queue(_MAX_WAITING)
        self._num_done = self._num_failed = 0
        self._thread = threading.Thread(target=self._work, name="larpo-early-rewards", daemon=True)

    def __enter__(self) -> "EarlyRewards":
        assert self.scorer.rewards  # loaded here, by one thread
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        """Waits for the calls that have begun, unless there was an error. What has not begun is left to the scorer."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)
        if kind is None:
            self._thread.join()

    def add(self, pools: list[CandidatePool]) -> None:
        """Takes what has just been sampled; returns at once."""
        with contextlib.suppress(queue.Full):
            for pool in pools:
                self._waiting.put_nowait(pool)

    def _work(self) -> None:
        in_flight: CallsInFlight[CandidatePool] = CallsInFlight()
        is_open = True
        while is_open or len(in_flight):
            while is_open and len(in_flight) < self.scorer.options.reward_calls_in_flight:
                try:
                    pool = self._waiting.get(block=not len(in_flight))
                except queue.Empty:
                    break
                if pool is None:
                    is_open = False
                elif self._num_done or self._num_failed < _FIRST_FAILURES:
                    in_flight.add(pool, self.scorer.start([self._as_called(pool)]))
            for ready, calls in in_flight.take_ready(_LOOK_UP):
                self._score(ready, calls)
        with contextlib.suppress(ValueError, OSError):  # it may be closed; rewards that are lost are given again later
            self._file.sync()

    def _as_called(self, pool: CandidatePool) -> CandidatePool:
        return replace(pool, prompt=replace(pool.prompt, columns=self.columns | pool.prompt.columns))

    def _score(self, pool: CandidatePool, calls: dict[str, Future]) -> None:
        try:
            [scored] = self.scorer.score_now([self._as_called(pool)], calls=calls)
            self._file.add([saved_scores(scored, pool_digest(pool))])
            self._num_done += 1
        except Exception as error:  # the scorer meets it again, and says what is to be done
            self._num_failed += 1
            logger.info(f"A prompt could not be rewarded while others are sampled; it is tried again later: {error}")


def with_early_rewards(pools: Sequence[CandidatePool], output: Path, scorer: RewardScorer) -> StoredPools:
    """
    Pools as they were sampled, with the rewards that [`EarlyRewards`] has given.

    Args:
        pools: From the file of samples.
        output: As of [`EarlyRewards`].
        scorer: Likewise.
    """
    rows = StoredRows(partial_files(_path(output)), key="digest", growing=True)
    place_of = {digest: place for place, digest in enumerate(rows.keys)}
    found_at: dict[int, int | None] = {}  # by place of the pool: the stage reads each pool several times

    def rewarded(place: int) -> CandidatePool:
        pool = pools[place]
        # Responses to other prompts were added when all was sampled
        own = pool.with_candidates([candidate for candidate in pool.candidates if candidate.of_prompt is None])
        if place not in found_at:
            found_at[place] = place_of.get(pool_digest(own))
        found = found_at[place]
        if found is None:
            return pool
        scored = iter(with_scores(own, rows[found], scorer.id).candidates)
        return pool.with_candidates([next(scored) if each.of_prompt is None else each for each in pool.candidates])

    return StoredPools(ids_of(pools), rewarded)


def forget_early_rewards(output: Path) -> None:
    """Deletes what was rewarded early, once the output is whole."""
    for path in partial_files(_path(output)):
        path.unlink()


def _path(output: Path) -> Path:
    return output.with_name(f"early_{output.name}")
