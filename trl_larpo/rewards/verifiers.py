"""
Rewards that check an answer by a rule: verifiable instructions, GSM8K, MATH.

Each is a reward function in the convention of [`trl_larpo.rewards.functions`].
"""

import math
import re
import textwrap
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from trl.import_utils import is_math_verify_available

from ..errors import ConfigError, DataError
from ..prompts import completion_text

MIN_WORDS = 5
"""Shorter answers earn nothing: an instruction such as "at most 20 words" must not be met by saying nothing."""

_NUMBER = (
    r"(?:(?<![\w)}])-)?"  # a sign, unless it stands between two numbers
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:/0*[1-9]\d*(?![.,]?\d))?"  # of a fraction
)

INSTRUCTIONS: dict[str, Callable[[str, Any], bool]] = {
    "no_commas": lambda text, _: "," not in text,
    "lowercase": lambda text, _: text == text.lower(),
    "max_words": lambda text, limit: len(words(text)) <= int(limit),
    "min_words": lambda text, limit: len(words(text)) >= int(limit),
    "includes": lambda text, phrase: contains(text, phrase),
    "excludes": lambda text, phrase: not contains(text, phrase),
    "starts_with": lambda text, start: text.strip().lower().startswith(start.lower()),
    "ends_with": lambda text, end: text.strip().endswith(end),
    "num_sentences": lambda text, count: len(sentences(text)) == int(count),
}
"""Instructions that can be verified: name → function of the answer and the instruction's value."""


def follows(text: str, instruction: str, value: Any) -> bool:
    """
    Whether a text follows an instruction.

    Raises:
        DataError: If the instruction is unknown, or takes another kind of value.
    """
    if instruction not in INSTRUCTIONS:
        raise DataError(f"Unknown instruction {instruction!r}; known are {', '.join(sorted(INSTRUCTIONS))}.")
    try:
        return INSTRUCTIONS[instruction](text, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"The instruction {instruction!r} cannot have the value {value!r}: {error}.") from None


def words(text: str) -> list[str]:
    """Words of a text, without punctuation."""
    return re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text)


def contains(text: str, phrase: str) -> bool:
    """
    Whether one or more words occur in a text as whole words, capital or not: "bee" neither in "bees" nor in "bee-like".

    Raises:
        ValueError: If the phrase is empty.
    """
    if not phrase.split():
        raise ValueError("it is empty")
    inside = r"\s+".join(map(re.escape, phrase.lower().split()))
    # Where the phrase starts or ends with another sign, as "C++" does, anything may stand beside it
    start = r"(?:(?![^\W_])|(?<![^\W_])(?<![^\W_]['\u2019-]))"
    end = r"(?:(?<![^\W_])|(?![^\W_])(?!['\u2019-][^\W_]))"
    return re.search(start + inside + end, text.lower()) is not None


def sentences(text: str) -> list[str]:
    """Sentences of a text: stretches of words that end in `.`, `!` or `?` before a space, or with the text."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if words(part)]


def verifiable_instruction_reward(
    prompts: list[Any],
    completions: list[Any],
    *,
    instruction: list[str],
    value: list[Any],
    finished: list[bool],
    **columns: list[Any],
) -> list[float]:
    """
    1 for an answer that follows its prompt's instruction, ends on its own and has at least five words, else 0.

    Args:
        prompts: Prompt of each completion (not used).
        completions: Text of each completion, or its list of messages.
        instruction: Name of each completion's instruction, one of [`INSTRUCTIONS`].
        value: The instruction's value, e.g. the number of words; `None` where it takes none.
        finished: Whether each completion ended on its own.
        **columns: Not used.

    Returns:
        0.0 or 1.0 for each completion.

    Raises:
        DataError: If an instruction is unknown, or takes another kind of value.
    """
    rewards = []
    for completion, name, setting, ended in zip(completions, instruction, value, finished, strict=True):
        text = completion_text(completion)
        followed = follows(text, name, setting)
        rewards.append(float(ended and len(words(text)) >= MIN_WORDS and followed))
    return rewards


def is_repetitive(text: str) -> bool:
    """
    Whether a text repeats itself: more than a fifth of its pairs of neighbouring words occur earlier in it, or one word
    of four letters or more is a quarter of all and occurs at least three times.
    """
    found = [word.lower() for word in words(text)]
    pairs = list(pairwise(found))
    most_common = max((found.count(word) for word in set(found) if len(word) >= 4), default=0)
    return len(set(pairs)) < 0.8 * len(pairs) or most_common >= max(3, len(found) / 4)


def verifiable_instructions_reward(
    prompts: list[Any],
    completions: list[Any],
    *,
    instructions: list[list[str]],
    values: list[list[Any]],
    finished: list[bool],
    about: list[str | None] | None = None,
    **columns: list[Any],
) -> list[float]:
    """
    The share of its prompt's instructions that an answer follows; 0 if it is cut off, shorter than five words,
    repetitive ([`is_repetitive`]) or about something else.

    Args:
        prompts: Prompt of each completion (not used).
        completions: Text of each completion, or its list of messages.
        instructions: Names of each completion's instructions, of [`INSTRUCTIONS`].
        values: The value of each instruction, e.g. a number of words; anything where it takes none.
        finished: Whether each completion ended on its own.
        about: Text that each answer has to contain, capital or not, e.g. its topic; `None`: no such text.
        **columns: Not used.

    Returns:
        A number from 0 to 1 for each completion.

    Raises:
        DataError: If an instruction is unknown or takes another kind of value, or there is not one value for each.
    """
    rewards = []
    about = [None] * len(completions) if about is None else about
    for completion, names, of_names, ended, topic in zip(
        completions, instructions, values, finished, about, strict=True
    ):
        are_lists = isinstance(names, list | tuple) and isinstance(of_names, list | tuple)
        if not are_lists or not names or len(names) != len(of_names):
            raise DataError(
                f"The instructions {names!r} have the values {of_names!r}; give lists, with one value for each "
                "instruction, and at least one."
            )
        text = completion_text(completion)
        on_topic = topic is None or topic.lower() in text.lower()
        usable = ended and on_topic and len(words(text)) >= MIN_WORDS and not is_repetitive(text)
        met = [follows(text, name, value) for name, value in zip(names, of_names, strict=True)]
        rewards.append(sum(met) / len(met) if usable else 0.0)
    return rewards


def gsm8k_reward(prompts: list[Any], completions: list[Any], *, answer: list[str], **columns: list[Any]) -> list[float]:
    """
    1 where the completion ends in the same number as the answer ([`final_number`]), else 0.

    Args:
        prompts: Not used.
        completions: Text of each completion, or its list of messages. A number after `####` that ends its line counts
            first, then one in the last `\\boxed{}`, then the last number.
        answer: The right answer in GSM8K's form, a number or a text that ends in `#### number`.
        **columns: Not used.

    Raises:
        DataError: If an answer has no number.
    """
    rewards = []
    for completion, solution in zip(completions, answer, strict=True):
        expected = final_number(str(solution))
        if expected is None:
            raise DataError(f"The answer {textwrap.shorten(str(solution), 60)!r} has no number to compare with.")
        found = final_number(completion_text(completion))
        rewards.append(float(found is not None and math.isclose(found, expected, rel_tol=1e-9)))
    return rewards


def final_number(text: str) -> float | None:
    r"""
    The number a solution ends in: after `####` at the end of a line, else in the last `\boxed{}`, else the last in the
    text. Fractions count as one number; signs of currencies and LaTeX's spaces do not matter.

    Returns:
        `None` if there is no number, or it is too large for a float.
    """
    text = re.sub(r"\\?[$€£]|\\[,!]", "", text.replace("{,}", ",").replace("\u2212", "-"))
    text = re.sub(r"(?<!\d)\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    found = re.findall(rf"####\s*({_NUMBER})[^\S\n]*$", text, re.MULTILINE)[-1:]
    # Of "x = 3 \times 6 = 18 \text{ cm}^2" in a box, what comes after the last sign, without its unit
    found = found or re.findall(_NUMBER, (boxed_answer(text) or "").rpartition("=")[2])[:1]
    found = found or re.findall(_NUMBER, text)[-1:]
    if not found:
        return None
    numerator, _, denominator = found[0].replace(",", "").partition("/")
    number = float(numerator) / float(denominator or 1)
    return number if math.isfinite(number) else None


def math_reward(
    prompts: list[Any], completions: list[Any], *, solution: list[str], **columns: list[Any]
) -> list[float | None]:
    r"""
    1 where the completion ends in the answer of the solution, as math-verify compares them (TRL's `accuracy_reward`).

    Args:
        prompts: Not used.
        completions: Text of each completion, or its list of messages; the answer stands in `\boxed{}` or in LaTeX.
        solution: The right answer in LaTeX, e.g. MATH's column `solution`, which ends in `\boxed{}`; also a number.
        **columns: Not used.

    Returns:
        0.0 or 1.0 for each completion; `None` where the solution has no answer that can be read.

    Raises:
        ConfigError: If the package math-verify is missing.
    """
    if not is_math_verify_available():
        raise ConfigError("The reward 'math' needs the package math-verify: pip install 'trl-larpo[eval]'.")
    from trl.rewards import accuracy_reward

    texts = [[{"role": "assistant", "content": completion_text(completion)}] for completion in completions]
    return accuracy_reward(texts, [str(each) for each in solution])


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` of a text, braces inside it included, without spaces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return re.sub(r"\s", "", text[begin + 1 : place])
    return None
