"""
Rewards: one number per completion, larger is better.

A reward is a callable in TRL's convention, `reward(prompts, completions, **columns) -> list[float]`: flat lists with
one entry per completion, and the data set's other columns in the same order. [`score_completions`] calls one and checks
what comes back. [`verifiable_instruction_reward`] is a rule-based reward for instructions a program can verify.
"""

import math
import re
from collections.abc import Callable
from numbers import Real
from typing import Any

from .errors import DataError
from .generation import Prompt, Sample

RewardFunction = Callable[..., list[float]]

MIN_WORDS = 5
"""Shorter answers earn nothing: an instruction such as "at most 20 words" must not be met by saying nothing."""

INSTRUCTIONS: dict[str, Callable[[str, Any], bool]] = {
    "no_commas": lambda text, _: "," not in text,
    "lowercase": lambda text, _: text == text.lower(),
    "max_words": lambda text, limit: len(words(text)) <= limit,
    "min_words": lambda text, limit: len(words(text)) >= limit,
    "includes": lambda text, word: word.lower() in [w.lower() for w in words(text)],
    "excludes": lambda text, word: word.lower() not in [w.lower() for w in words(text)],
    "starts_with": lambda text, start: text.strip().lower().startswith(start.lower()),
    "ends_with": lambda text, end: text.strip().endswith(end),
    "num_sentences": lambda text, count: len(sentences(text)) == count,
}
"""Instructions that can be verified: name → function of the answer and the instruction's value."""


def words(text: str) -> list[str]:
    """Words of a text, without punctuation."""
    return re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text)


def sentences(text: str) -> list[str]:
    """Sentences of a text: stretches of words that end in `.`, `!` or `?` before a space, or with the text."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if words(part)]


def verifiable_instruction_reward(
    prompts: list[Prompt],
    completions: list[Any],
    *,
    instruction: list[str],
    value: list[Any],
    finished: list[bool],
    **columns: list[Any],
) -> list[float]:
    """
    1 for an answer that follows its prompt's instruction, ends by itself and has at least five words, else 0.

    Args:
        prompts: Prompt of each completion (not looked at).
        completions: Text of each completion, or its list of messages.
        instruction: Name of each completion's instruction, one of [`INSTRUCTIONS`].
        value: The instruction's value, e.g. the number of words; `None` where it takes none.
        finished: Whether each completion ended by itself.
        **columns: Not looked at.

    Returns:
        0.0 or 1.0 for each completion.

    Raises:
        DataError: If an instruction is unknown.
    """
    rewards = []
    for completion, name, setting, ended in zip(completions, instruction, value, finished, strict=True):
        if name not in INSTRUCTIONS:
            raise DataError(f"Unknown instruction {name!r}; known are {', '.join(sorted(INSTRUCTIONS))}.")
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        rewards.append(float(ended and len(words(text)) >= MIN_WORDS and INSTRUCTIONS[name](text, setting)))
    return rewards


def score_completions(
    reward: RewardFunction,
    prompts: list[Prompt],
    samples: list[list[Sample]],
    columns: dict[str, list[Any]] | None = None,
) -> list[list[float]]:
    """
    Rewards every sample of every prompt in one call of a reward function.

    Args:
        reward: Reward in TRL's convention. It also receives `finished`, whether each completion ended by itself.
        prompts: Strings or conversations.
        samples: Samples of each prompt.
        columns: Further columns of the prompts, handed on to the reward.

    Returns:
        For each prompt the rewards of its samples.

    Raises:
        DataError: If the reward returns another number of values, or one that is no finite number; names the prompt.
    """
    owners = [i for i, of_prompt in enumerate(samples) for _ in of_prompt]
    flat = [sample for of_prompt in samples for sample in of_prompt]
    values = reward(
        prompts=[prompts[i] for i in owners],
        completions=[as_completion(prompts[i], sample.text) for i, sample in zip(owners, flat, strict=True)],
        finished=[sample.finished for sample in flat],
        **{name: [column[i] for i in owners] for name, column in (columns or {}).items()},
    )
    name = getattr(reward, "__name__", type(reward).__name__)
    if len(values) != len(flat):
        raise DataError(f"The reward {name} returned {len(values)} values for {len(flat)} completions.")
    rewards: list[list[float]] = [[] for _ in prompts]
    for owner, completion_reward in zip(owners, values, strict=True):
        if not isinstance(completion_reward, Real) or not math.isfinite(completion_reward):
            raise DataError(
                f"The reward {name} returned {completion_reward!r} for completion {len(rewards[owner])} of prompt "
                f"{owner} ({_shorten(prompts[owner])!r}); it must return a finite number."
            )
        rewards[owner].append(float(completion_reward))
    return rewards


def as_completion(prompt: Prompt, text: str) -> Any:
    """A completion in the form of its prompt: an assistant message for a conversation, else the text itself."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _shorten(prompt: Prompt, length: int = 60) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return text if len(text) <= length else text[: length - 1] + "…"
