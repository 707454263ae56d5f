"""
Rewards: one number per completion, larger is better.

A reward is a callable in TRL's convention, `reward(prompts, completions, **columns) -> list[float | None]`: flat lists
with one entry per completion, and the user's other columns in the same order; `None` says that it does not apply. If it
applies to some completions of a prompt only, the others have no reward: sums of different rewards cannot be compared. A
pairwise ranker is a callable `ranker(prompt, completions) -> matrix` of preferences, as probabilities or as logits, of
which the mean over the other completions is the reward. [`load_rewards`] finds them by
name, [`score_pools`] calls them, checks what comes back and adds it up. They get copies: what a reward does to its
arguments changes neither candidates nor prompts. Both may be asynchronous (`async def`).
"""

import asyncio
import copy
import hashlib
import importlib
import inspect
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from ..candidates import CandidatePool
from ..errors import ConfigError, DataError, LarPOError
from ..prompts import Content, Prompt
from .asynchronous import awaited, is_asynchronous, result_of, start_call
from .verifiers import gsm8k_reward, math_reward, verifiable_instruction_reward, verifiable_instructions_reward

RewardFunction = Callable[..., Sequence[float | None]]

Completions = dict[str, list[Content]]
"""Completions by the name of their prompt."""


PAIRWISE = "pairwise:"
"""In front of the name of a ranker that compares the completions of a prompt with each other."""

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_LARGEST = 3.4e38
"""Largest reward: the trainer keeps them in float32."""

OWN_ARGUMENTS = ("prompts", "completions", "finished")
"""Arguments of every reward function. The user's columns of these names are not passed on."""

BUILT_IN: dict[str, RewardFunction] = {
    "verifiable_instruction": verifiable_instruction_reward,
    "verifiable_instructions": verifiable_instructions_reward,
    "gsm8k": gsm8k_reward,
    "math": math_reward,
}
"""Rewards that go by a short name."""


@dataclass
class Reward:
    """
    One of the rewards of a run.

    Attributes:
        name: As it was asked for.
        function: A reward function, or a pairwise ranker.
        weight: Its factor in the sum.
        pairwise: Whether it compares the completions of a prompt with each other.
    """

    name: str
    function: Callable
    weight: float = 1.0
    pairwise: bool = False


def load_rewards(
    names: list[str], weights: list[float] | None = None, load_model: Callable[[str, bool], Callable] | None = None
) -> list[Reward]:
    """
    Finds rewards by their names.

    Args:
        names: Each is one of [`BUILT_IN`], `package.module:function`, or the folder or hub id of a sequence
            classification model; after `"pairwise:"` a function that ranks, or the folder or hub id of PairRM.
        weights: Factor of each in the sum. By default 1.
        load_model: Makes a reward function (or a ranker, where its second argument is true) of a model's folder or hub
            id. `None` leaves models out: what is returned then is for checking only.

    Raises:
        ConfigError: If a reward cannot be found or there is another number of weights.
    """
    if not names:
        raise ConfigError("`reward_funcs` is empty; name at least one reward.")
    if weights is not None and len(weights) != len(names):
        raise ConfigError(f"`reward_weights` has {len(weights)} numbers for {len(names)} rewards; give one for each.")
    rewards = []
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        pairwise, path = name.startswith(PAIRWISE), name.removeprefix(PAIRWISE)
        if path in BUILT_IN and not pairwise:
            function = BUILT_IN[path]
        elif ":" in path:
            function = import_function(path, "reward_funcs")
        elif path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(path)):
            raise ConfigError(f"`reward_funcs` names the folder {path!r}, and there is no such folder.")
        elif "/" not in path and not os.path.isdir(path):
            known = ", ".join(BUILT_IN)
            raise ConfigError(
                f"`reward_funcs` names {path!r}, which is neither one of {known} nor a folder; a function is written "
                "'package.module:function', a model as its folder or hub id 'owner/name', a ranker with 'pairwise:' "
                "in front."
            )
        elif load_model is None:
            continue
        else:
            function = load_model(os.path.expanduser(path) if path.startswith("~") else path, pairwise)
        rewards.append(Reward(name, function, weight, pairwise))
    return rewards


def check_columns(rewards: list[Reward], prompts: Iterable[Prompt], where: str) -> None:
    """
    Checks that the prompts have what reward functions take, before any completion is sampled.

    Args:
        rewards: The rewards.
        prompts: All prompts of a stage, which they will be called for.
        where: What messages call these prompts.

    Raises:
        ConfigError: Names the reward and the column that is missing, or that it does not take.
    """
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in OWN_ARGUMENTS)
    for reward in rewards:
        if reward.pairwise or hasattr(reward.function, "__signature__"):  # which a decorator may have copied
            continue
        try:
            parameters = inspect.signature(reward.function, follow_wrapped=False).parameters
        except Exception:  # some callables have none, and some are proxies of others
            continue
        kinds = {parameter.kind for parameter in parameters.values()}
        if inspect.Parameter.POSITIONAL_ONLY in kinds:
            continue
        needed = [name for name, x in parameters.items() if x.default is x.empty and x.kind not in _VARIABLE]
        if missing := [name for name in needed if name not in (*OWN_ARGUMENTS, *columns)]:
            raise ConfigError(
                f"`reward_funcs`: {reward.name} needs the column `{missing[0]}`, and the {where} have "
                f"{', '.join(columns) or 'no columns beside the prompt'}. Add or rename it."
            )
        refused = [name for name in (*OWN_ARGUMENTS, *columns) if name not in parameters]
        if refused and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ConfigError(
                f"`reward_funcs`: {reward.name} takes no argument `{refused[0]}`. Let it end in `**columns`, which "
                "takes all that it does not use."
            )


def reward_id(names: list[str], weights: list[float] | None, **settings: Any) -> str:
    """A name for rewards and their settings: where it differs, rewards are not to be compared."""
    described = json.dumps([names, weights or [1.0] * len(names), settings], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def score_pools(
    rewards: list[Reward],
    pools: list[CandidatePool],
    normalize: bool = False,
    scored_by: str | None = None,
    against: Completions | None = None,
    calls: dict[str, Future] | None = None,
    calls_in_flight: int = 1,
) -> list[CandidatePool]:
    """
    Rewards all candidates of some prompts.

    Args:
        rewards: From [`load_rewards`].
        pools: Prompts and their candidates.
        normalize: Whether each reward is brought to mean 0 and standard deviation 1 over the completions of a prompt
            before it is weighted. Of use where several rewards have different scales.
        scored_by: Name of these rewards and settings, e.g. from [`reward_id`].
        against: Completions of the same prompts, with which rankers compare the candidates instead of with each other.
            So the rewards of different models can be compared. Nothing is normalized then.
        calls: Calls of asynchronous rewards that [`start_calls`] has begun for these pools.
        calls_in_flight: How many calls of an asynchronous ranker run at the same time, where none has begun.

    Returns:
        The pools, each candidate with `reward_parts` and its `reward`, the sum: `None` where no reward applies, or one
        does not that applies to other candidates of the prompt.

    Raises:
        DataError: If a reward fails, returns another number of values, or one that is neither `None` nor a finite
            number; names the reward, the prompt and the completion.
    """
    by_reward = [
        _rank_pools(reward, pools, against, (calls or {}).get(reward.name), calls_in_flight)
        if reward.pairwise
        else _score_flat(reward, pools, (calls or {}).get(reward.name))
        for reward in rewards
    ]
    normalize = normalize and against is None
    scored = []
    for pool, *of_pool in zip(pools, *by_reward, strict=True):
        weighted = [
            [None if value is None else reward.weight * value for value in _normalized(values, normalize)]
            for reward, values in zip(rewards, of_pool, strict=True)
        ]
        candidates = []
        for place, candidate in enumerate(pool.candidates):
            known = [value for values in weighted if (value := values[place]) is not None]
            parts = {reward.name: values[place] for reward, values in zip(rewards, of_pool, strict=True)}
            total = math.fsum(known) if known else None
            candidates.append(replace(candidate, reward=total, reward_parts=parts, scored_by=scored_by))
        scored.append(pool.with_candidates(candidates).with_comparable_rewards())
    return scored


def mean_preferences(preferences: list[list[float]]) -> list[float | None]:
    """
    Rewards from preferences: how much each completion is preferred to the others, on average.

    Args:
        preferences: `preferences[i][j]` says how much completion i is better than j: a probability, for win rates, or a
            logit. The diagonal does not count.

    Returns:
        One reward for each completion; `None` for a single one, which has no other to be preferred to.
    """
    count = len(preferences)
    if count == 1:
        return [None]
    return [math.fsum(row[j] for j in range(count) if j != i) / (count - 1) for i, row in enumerate(preferences)]


def start_calls(
    rewards: list[Reward], pools: list[CandidatePool], against: Completions | None = None
) -> dict[str, Future]:
    """Starts the calls of the asynchronous rewards for some pools, for [`score_pools`]. Returns them by reward."""
    if not any(pool.candidates for pool in pools):
        return {}
    arguments, calls = _arguments(pools), {}
    for reward in rewards:
        if is_asynchronous(reward.function):
            if reward.pairwise:
                calls[reward.name] = start_call(_ask_ranker, reward.function, _comparisons(pools, against), len(pools))
            else:
                calls[reward.name] = start_call(reward.function, **copy.deepcopy(arguments))
    return calls


Comparison = tuple[Content, list[Content]]
"""What a ranker is called with: a prompt and completions."""


def _comparisons(pools: list[CandidatePool], against: Completions | None) -> list[Comparison | None]:
    """One for each pool; `None` where all candidates are scored already, or there is nothing to compare them with."""
    found: list[Comparison | None] = []
    for pool in pools:
        others = [] if against is None else against.get(pool.prompt.id, [])
        if pool.candidates and (against is None or others):
            completions = [*(candidate.completion for candidate in pool.candidates), *others]
            found.append((copy.deepcopy(pool.prompt.content), copy.deepcopy(completions)))
        else:
            found.append(None)
    return found


async def _ask_ranker(function: Callable, comparisons: list[Comparison | None], in_flight: int) -> list[Any]:
    """What an asynchronous ranker says to each comparison, so many at the same time, or the error that it raises."""
    places = asyncio.Semaphore(in_flight)

    async def ask(comparison: Comparison | None) -> Any:
        if comparison is None:
            return None
        async with places:
            return await awaited(function, *comparison)

    return await asyncio.gather(*map(ask, comparisons), return_exceptions=True)


def _arguments(pools: list[CandidatePool]) -> dict[str, list[Any]]:
    """Of a reward function, for all candidates of some pools."""
    each = [(pool.prompt, candidate) for pool in pools for candidate in pool.candidates]
    names = dict.fromkeys(name for pool in pools for name in pool.prompt.columns)  # in the order of the file
    columns = [name for name in names if name not in OWN_ARGUMENTS]
    return {
        "prompts": [copy.deepcopy(prompt.content) for prompt, _ in each],
        "completions": [copy.deepcopy(candidate.completion) for _, candidate in each],
        "finished": [candidate.finished for _, candidate in each],
        **{name: [copy.deepcopy(prompt.columns.get(name)) for prompt, _ in each] for name in columns},
    }


def _score_flat(reward: Reward, pools: list[CandidatePool], call: Future | None = None) -> list[list[float | None]]:
    """One call for all candidates of all prompts, or one that has begun."""
    count = sum(len(pool.candidates) for pool in pools)
    if not count:
        return [[] for _ in pools]
    try:
        values = result_of(reward.function, **_arguments(pools)) if call is None else call.result()
    except LarPOError:
        raise
    except (Exception, SystemExit) as error:  # whatever a function of the user's raises
        columns = [name for name in _arguments(pools) if name not in OWN_ARGUMENTS]
        raise DataError(
            f"The reward {reward.name} failed: {_describe(error)}{_missing_column(error, columns)}"
        ) from error
    values = as_list(values)
    if not isinstance(values, list | tuple) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, list | tuple) else type(values).__name__
        raise DataError(f"The reward {reward.name} returned {got} for {count} completions; return one for each.")
    remaining, result = iter(values), []
    for pool in pools:
        where = f"of the prompt {_shorten(pool.prompt)!r}"
        result.append(
            [
                _checked(next(remaining), reward.name, f"for completion {place} {where}")
                for place in range(len(pool.candidates))
            ]
        )
    return result


def _rank_pools(
    reward: Reward,
    pools: list[CandidatePool],
    against: Completions | None,
    call: Future | None = None,
    calls_in_flight: int = 1,
) -> list[list[float | None]]:
    """One call for each prompt; of an asynchronous ranker some at the same time, or those that have begun."""
    comparisons = _comparisons(pools, against)
    result: list[list[float | None]] = []
    answers: list[Any] | None = None
    if call is not None:
        answers = call.result()
    elif is_asynchronous(reward.function):
        answers = result_of(_ask_ranker, reward.function, comparisons, calls_in_flight)
    for place, (pool, comparison) in enumerate(zip(pools, comparisons, strict=True)):
        size = len(pool.candidates)
        if comparison is None:
            result.append([None] * size)
            continue
        count, where = len(comparison[1]), f"for the prompt {_shorten(pool.prompt)!r}"
        try:
            matrix = reward.function(*comparison) if answers is None else answers[place]
            if isinstance(matrix, BaseException):
                raise matrix
        except LarPOError:
            raise
        except (Exception, SystemExit) as error:  # whatever a function of the user's raises
            raise DataError(f"The ranker {reward.name} failed {where}: {_describe(error)}") from error
        matrix = as_list(matrix)
        lines = [as_list(line) for line in matrix] if isinstance(matrix, list | tuple) else []
        if len(lines) != count or not all(isinstance(line, list | tuple) and len(line) == count for line in lines):
            raise DataError(
                f"The ranker {reward.name} returned no matrix of {count} × {count} preferences {where}; entry [i][j] "
                "says how much completion i is better than j."
            )
        for i, line in enumerate(lines):
            for j, value in enumerate(line):
                if i != j and _checked(value, reward.name, f"as preference [{i}][{j}] {where}") is None:
                    raise DataError(f"The ranker {reward.name} returned None as preference [{i}][{j}] {where}.")
        if against is None:
            result.append(mean_preferences(lines))
        else:
            result.append([statistics.fmean(line[size:]) for line in lines[:size]])
    return result


def _checked(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # of an integer
        number = math.inf
    if not abs(number) <= _LARGEST:
        said = "a number too large" if isinstance(value, int) else repr(value)  # Python does not print all integers
        raise DataError(
            f"The reward {name} returned {said} {where}; it must return a finite number that float32 can hold, or None "
            "where it does not apply."
        )
    return number


def as_list(value: Any) -> Any:
    """What is in an array or a tensor; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _normalized(values: list[float | None], normalize: bool) -> list[float | None]:
    known = [value for value in values if value is not None]
    if not normalize or not known:
        return values
    mean, deviation = statistics.fmean(known), statistics.pstdev(known)
    return [None if value is None else (value - mean) / deviation if deviation > 0 else 0.0 for value in values]


def import_function(path: str, option: str) -> Callable:
    """
    The function `package.module:function`, also of a module in the current folder.

    Raises:
        ConfigError: Names the option if there is no such function.
    """
    module_name, _, function_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a file beside the YAML file is found
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module of the user's can raise anything
        raise ConfigError(f"`{option}`: the module of {path!r} cannot be imported: {_describe(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"`{option}`: the module {module_name} has no function {function_name!r}.")
    return function


def _missing_column(error: BaseException, columns: list[str]) -> str:
    if isinstance(error, TypeError) and "required keyword-only argument" in str(error):
        return f" (The prompts have the columns {', '.join(columns) or 'none'}.)"
    return ""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _shorten(prompt: Prompt, length: int = 60) -> str:
    text = prompt.text
    return text if len(text) <= length else text[: length - 1] + "…"
