"""[`RewardScorer`]: rewards all candidates of many prompts, in chunks that are saved as they are done."""

import gc
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..candidates import Candidate, CandidatePool
from ..errors import DataError, LarPOError
from ..prompts import Row, without_thoughts
from ..set_aside import SetAside, set_aside_in
from ..storage import GrowingFile
from .functions import Completions, Reward, load_rewards, reward_id, score_pools
from .options import RewardOptions
from .pairrm import PairRM
from .reward_models import RewardModel

_COMPLETIONS_PER_CALL = 256  # of a reward function
_FIRST_FAILURES = 5  # without any reward before them: then the reward is broken, and the rest is not tried


_Failure = tuple[CandidatePool, str]
"""Candidates of a prompt, and why a reward failed on them."""


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
        pools: list[CandidatePool],
        path: Path,
        description: str = "Rewarding",
        *,
        against: Completions | None = None,
    ) -> list[CandidatePool]:
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
        file = GrowingFile(path, share=state.process_index)
        set_aside = SetAside(path, len(pools), self.options.max_failed_share, "rewarded", state.process_index)
        state.wait_for_everyone()
        done = {row["prompt_id"] for row in file.rows}
        if len({pool.prompt.id for pool in pools}) < len(pools):
            raise DataError("A prompt occurs twice; put its candidates into one pool.")
        pools = _with_all_columns(pools)
        if self.options.strip_thinking == "all":
            pools = [_without_thoughts(pool) for pool in pools]
        size = max(1, _COMPLETIONS_PER_CALL // max(1, max(len(pool.candidates) for pool in pools)))
        chunks = [pools[start : start + size] for start in range(0, len(pools), size)]
        failures: list[_Failure] = []
        with tqdm(
            total=len(pools), initial=len(done), desc=description, unit=" prompts", disable=not state.is_main_process
        ) as progress:
            for chunk in chunks[state.process_index :: state.num_processes]:
                missing = [pool for pool in chunk if pool.prompt.id not in done]
                is_broken = len(failures) >= _FIRST_FAILURES and not file.rows
                if missing and not is_broken and len(failures) <= set_aside.limit:
                    self._score_into(file, missing, failures, against)
                    progress.update(len(missing))
        problem = self._try_again(file, failures, set_aside, against)
        state.wait_for_everyone()
        if problem is not None:
            kept = {row["prompt_id"] for row in file.rows}
            raise DataError(
                f"{problem} Rewards of {sum(pool.prompt.id in kept for pool in pools)} of {len(pools)} prompts are "
                "kept. Fix the reward and run the same command again."
            )
        if not state.is_main_process:
            return []
        scored = {row["prompt_id"]: row for row in GrowingFile(path).rows}
        failed = {row["prompt_id"] for row in set_aside_in(path.parent).get(path.stem, [])}
        if any(pool.prompt.id not in scored and pool.prompt.id not in failed for pool in pools):
            raise DataError("Another process could not reward its share; see its message.")
        pools = [pool for pool in pools if pool.prompt.id in scored]
        return [_with_scores(pool, scored[pool.prompt.id], self.id) for pool in pools]

    def _score_into(
        self, file: GrowingFile, pools: list[CandidatePool], failures: list[_Failure], against: Completions | None
    ) -> None:
        """Scores a chunk; where a reward fails, prompt by prompt, so that the rewards of the others are kept."""
        try:
            file.add([_scores(pool) for pool in self.score_now(pools, against)])
        except DataError as error:
            if len(pools) == 1:
                failures.append((pools[0], str(error)))
                return
            for pool in pools:
                if len(failures) < _FIRST_FAILURES or file.rows:
                    self._score_into(file, [pool], failures, against)

    def _try_again(
        self, file: GrowingFile, failures: list[_Failure], set_aside: SetAside, against: Completions | None
    ) -> str | None:
        """Scores once more what failed: a judge behind a network may answer now. Returns what ends the stage, if so."""
        if failures and (not file.rows or len(failures) > set_aside.limit):
            return failures[0][1]
        for pool, _ in failures:
            still_failing: list[_Failure] = []
            self._score_into(file, [pool], still_failing, against)
            for _, reason in still_failing:
                try:
                    set_aside.add(pool.prompt, reason)
                except LarPOError as error:
                    return str(error)
        return None

    def score_now(self, pools: list[CandidatePool], against: Completions | None = None) -> list[CandidatePool]:
        """As `score`, without saving anything."""
        if self.options.strip_thinking == "all":
            pools = [_without_thoughts(pool) for pool in pools]
        asked = [pool.with_candidates([c for c in pool.candidates if c.scored_by != self.id]) for pool in pools]
        judged = asked
        if self.options.strip_thinking == "rewards":
            judged = [_without_thoughts(pool) for pool in asked]
        if against is not None and self.options.strip_thinking != "none":
            against = {name: [without_thoughts(each) for each in of_prompt] for name, of_prompt in against.items()}
        scored = score_pools(self.rewards, judged, self.options.normalize_rewards, self.id, against)
        return [
            pool.with_candidates(_in_place_of_unscored(pool.candidates, _scored_as(mine, new), self.id))
            for pool, mine, new in zip(pools, asked, scored, strict=True)
        ]


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


def _scores(pool: CandidatePool) -> Row:
    """What is saved of a pool as it is scored: its texts are in a file already."""
    scores = [{"reward": c.reward, "reward_parts": c.reward_parts} for c in pool.candidates]
    return {"prompt_id": pool.prompt.id, "scores": scores}


def _with_scores(pool: CandidatePool, row: Row, reward_id: str) -> CandidatePool:
    pairs = zip(pool.candidates, row["scores"], strict=True)
    return pool.with_candidates([replace(candidate, **score, scored_by=reward_id) for candidate, score in pairs])


def _with_all_columns(pools: list[CandidatePool]) -> list[CandidatePool]:
    """Prompts that all have the same columns, so that every call of a reward gets the same arguments."""
    names = dict.fromkeys(name for pool in pools for name in pool.prompt.columns)
    return [replace(pool, prompt=replace(pool.prompt, columns=names | pool.prompt.columns)) for pool in pools]
