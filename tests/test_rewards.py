"""Rules for verifiable instructions, and what is done with a reward that goes wrong."""

import math

import pytest

from trl_larpo import DataError
from trl_larpo.generation import Sample
from trl_larpo.rewards import INSTRUCTIONS, score_completions, sentences, verifiable_instruction_reward, words

USER = [{"role": "user", "content": "Tell me about bees."}]


@pytest.mark.parametrize(
    "name, value, follows, breaks",
    [
        ("no_commas", None, "Bees make honey.", "Bees, too."),
        ("lowercase", None, "bees make honey.", "Bees make honey."),
        ("max_words", 3, "bees make honey", "bees make sweet honey"),
        ("min_words", 4, "bees make sweet honey", "bees make honey"),
        ("includes", "because", "Because of bees.", "The cause is bees."),
        ("excludes", "the", "There are other bees.", "The bees."),
        ("starts_with", "well", "Well, bees.", "Bees do well."),
        ("ends_with", "?", "Do bees sleep? ", "Bees sleep."),
        ("num_sentences", 2, "Bees fly. Do they sleep?", "Bees fly at 3.5 m/s."),
    ],
)
def test_instructions(name, value, follows, breaks):
    assert INSTRUCTIONS[name](follows, value)
    assert not INSTRUCTIONS[name](breaks, value)


def test_words_and_sentences():
    assert words("It's a well-known fact: 3 bees, 2 hives!") == [
        "It's",
        "a",
        "well-known",
        "fact",
        "3",
        "bees",
        "2",
        "hives",
    ]
    assert sentences("One. Two!  Three?\nFour") == ["One.", "Two!", "Three?", "Four"]
    assert sentences("...") == []


def reward_of(text, finished=True):
    [reward] = verifiable_instruction_reward(
        [USER], [[{"role": "assistant", "content": text}]], instruction=["no_commas"], value=[None], finished=[finished]
    )
    return reward


def test_an_answer_must_end_and_say_something():
    assert reward_of("Bees make honey all summer.") == 1.0
    assert reward_of("Bees, wasps and ants all fly.") == 0.0
    assert reward_of("Bees make honey all summer.", finished=False) == 0.0
    assert reward_of("") == 0.0
    assert reward_of("Bees make honey.") == 0.0  # trivial answers satisfy most rules


def test_unknown_instructions_are_named():
    with pytest.raises(DataError, match="Unknown instruction 'sing'; known are ends_with"):
        verifiable_instruction_reward([USER], ["la"], instruction=["sing"], value=[None], finished=[True])


SAMPLES = [[Sample("a", 1, True), Sample("b", 1, False)], [], [Sample("c", 1, True)]]


def test_rewards_come_back_by_prompt_and_columns_go_along():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [1, 2, 3]

    rewards = score_completions(reward, ["p", "q", USER], SAMPLES, {"kind": ["x", "y", "z"]})
    assert rewards == [[1.0, 2.0], [], [3.0]]
    assert seen["prompts"] == ["p", "p", USER]
    assert seen["completions"] == ["a", "b", [{"role": "assistant", "content": "c"}]]
    assert (seen["kind"], seen["finished"]) == (["x", "x", "z"], [True, False, True])


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0, 2.0], "returned 2 values for 3 completions"),
        ([1.0, math.nan, 2.0], r"returned nan for completion 1 of prompt 0 \('p'\)"),
        ([1.0, 2.0, None], r"returned None for completion 0 of prompt 2 \('Tell me about bees.'\)"),
    ],
)
def test_rewards_that_go_wrong_are_named(values, message):
    with pytest.raises(DataError, match=message):
        score_completions(lambda **_: values, ["p", "q", USER], SAMPLES)
