"""
The tasks of the studies: generated prompts and rule-based rewards. Training and held-out prompts share no topics and no
sums; only `addition` may train on 3 + 5 and hold out 5 + 3.

    python examples/studies/tasks.py outputs/tasks      # writes the prompts of all tasks
"""

import itertools
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trl_larpo.prompts import completion_text
from trl_larpo.rewards.verifiers import final_number, verifiable_instructions_reward

TOPICS = (  # noqa: SIM905
    "bees, coffee, rivers, chess, snow, owls, bread, music, volcanoes, bicycles, tea, whales, mountains, "
    "clocks, rice, deserts, spiders, glass, trains, salt, butterflies, castles, lemons, wolves, paper, the "
    "moon, penguins, cotton, bridges, honey, foxes, lightning, cheese, turtles, maps, gold, rabbits, islands, "
    "kites, potatoes, horses, thunder, soap, forests, camels, pianos, ants, rain, cameras, olives, elephants, "
    "bamboo, lighthouses, frogs, sugar, comets, eagles, wool, tomatoes, dolphins, mirrors, ice, apples, "
    "robots, parrots, sand, kings, garlic"
).split(", ")
NUM_TRAIN_TOPICS = 40

RULES = [  # kind, sentence of the prompt, instruction, its value; rules of one kind exclude each other
    ("commas", "Do not use any commas.", "no_commas", ""),
    ("length", "Use at most 15 words.", "max_words", "15"),
    ("length", "Use at most 20 words.", "max_words", "20"),
    ("length", "Use at least 18 words.", "min_words", "18"),
    ("include", 'Include the word "people".', "includes", "people"),
    ("include", 'Include the word "many".', "includes", "many"),
    ("avoid", 'Do not use the word "is".', "excludes", "is"),
    ("avoid", 'Do not use the word "known".', "excludes", "known"),
    ("sentences", "Write exactly two sentences.", "num_sentences", "2"),
]


@dataclass(frozen=True)
class Task:
    """
    Prompts of a task and its settings other than the defaults.

    Attributes:
        train: Rows to train on: `prompt` (messages) and the columns of the reward.
        held_out: Rows to evaluate on.
        reward: Name of the reward.
        max_new_tokens: Maximum length of an answer, in tokens.
        tuning: Rows to choose learning rates on, apart from the others.
        tuning_train: Rows to train on for that, apart from the others.
    """

    train: list[dict]
    held_out: list[dict]
    reward: str
    max_new_tokens: int
    tuning: list[dict] = field(default_factory=list)
    tuning_train: list[dict] = field(default_factory=list)


def graded() -> Task:
    """A short fact with three rules: four levels of reward."""

    def of_topic(topic: str) -> list[dict]:
        rng, rows = random.Random(topic), []
        for _ in range(3):
            kinds = rng.sample(["commas", "length", "include", "avoid", "sentences"], 3)
            rules = [rng.choice([rule for rule in RULES if rule[0] == kind]) for kind in kinds]
            text = " ".join([f"Tell me a short fact about {topic}.", *(sentence for _, sentence, *_ in rules)])
            row = _row(text, instructions=[name for *_, name, _ in rules], values=[value for *_, value in rules])
            rows.append(row)
        return rows

    return _by_topic(of_topic, "verifiable_instructions", 80)


def one_rule() -> Task:
    """A short fact with one rule: a reward of 0 or 1."""

    def of_topic(topic: str) -> list[dict]:
        rules = random.Random(topic).sample([rule for rule in RULES if rule[0] != "avoid"], 3)
        return [
            _row(f"Tell me a short fact about {topic}. {sentence}", instruction=name, value=value)
            for _, sentence, name, value in rules
        ]

    return _by_topic(of_topic, "verifiable_instruction", 64)


def addition() -> Task:
    """The sum of two numbers from 2 to 12: a reward of 1 if it is correct, else 0."""
    pairs = [(a, b) for a in range(2, 13) for b in range(2, 13)]
    random.Random(0).shuffle(pairs)
    rows = [_row(f"What is {a} + {b}?", answer=str(a + b)) for a, b in pairs]
    return Task(rows[:60], rows[60:], "gsm8k", 48)


def four_rules() -> Task:
    """A short fact about a topic with four rules: five levels of reward; 0 for an answer without the topic."""

    def rows(topics: list[str]) -> list[dict]:
        found = []
        for topic in topics:
            rng = random.Random(topic)
            combinations = list(itertools.product(*_of_kinds().values()))
            for rules in rng.sample(combinations, 8):
                chosen = rng.sample(rules, 4)
                text = " ".join([f"Tell me a short fact about {topic}.", *(sentence for _, sentence, *_ in chosen)])
                names, values = ([rule[place] for rule in chosen] for place in (2, 3))
                found.append(_row(text, instructions=names, values=values, topic=topic))
        return found

    parts = (TOPICS[:32], TOPICS[44:60], TOPICS[60:], TOPICS[32:44])
    train, held_out, tuning, tuning_train = map(rows, parts)
    return Task(train, held_out, "tasks:rules_about_topic", 80, tuning, tuning_train)


def rules_about_topic(prompts, completions, *, topic, **columns) -> list[float]:
    """Reward: that of `verifiable_instructions`, the share of the rules that are met; 0 without the topic."""
    followed = verifiable_instructions_reward(prompts, completions, **columns)
    texts = map(completion_text, completions)
    return [reward * is_about(text, of) for text, of, reward in zip(texts, topic, followed, strict=True)]


def is_about(text: str, topic: str) -> bool:
    """Whether a text has the topic as a word, in singular or plural."""
    stem = re.sub("(?<=[ox])es$|ves$|ies$|(?<!s)s$", "", topic.removeprefix("the "))
    return re.search(rf"\b{stem}(s|es|f|ves?|y|ies)?\b", text, re.IGNORECASE) is not None


def close_sums() -> Task:
    """The sum of two numbers from 2 to 30: the reward falls with the distance from the right one."""
    rng = random.Random(1)
    pairs = [rng.sample(pair, 2) for pair in itertools.combinations(range(2, 31), 2)]  # each once, in either order
    rng.shuffle(pairs)
    rows = [_row(f"What is {a} + {b}?", answer=a + b) for a, b in pairs]
    return Task(rows[288:], rows[:128], "tasks:closeness", 48, rows[128:192], rows[192:288])


def closeness(prompts, completions, *, answer, finished, **columns) -> list[float]:
    """Reward: 1 / (1 + distance of the last number from the answer); 0 without a number, and for truncated answers."""
    rewards = []
    for completion, right, ended in zip(completions, answer, finished, strict=True):
        found = final_number(completion_text(completion))
        rewards.append(1 / (1 + abs(found - right)) if ended and found is not None else 0.0)
    return rewards


TASKS: dict[str, Callable[[], Task]] = {"graded": graded, "one_rule": one_rule, "addition": addition}
"""Tasks of the study of one pass."""

GRADED_TASKS: dict[str, Callable[[], Task]] = {"four_rules": four_rules, "close_sums": close_sums}
"""Tasks of the comparison of lists with pairs: rewards have many levels, so that a list holds more than a pair."""


def _of_kinds() -> dict[str, list[tuple[str, str, str, str]]]:
    kinds: dict[str, list] = {}
    for rule in RULES:
        kinds.setdefault(rule[0], []).append(rule)
    return kinds


def _row(text: str, **columns) -> dict:
    system = {"role": "system", "content": "Answer briefly."}
    return {"prompt": [system, {"role": "user", "content": text}]} | columns


def _by_topic(of_topic: Callable[[str], list[dict]], reward: str, max_new_tokens: int) -> Task:
    """Interleaves the topics, so that the first rows cover as many topics as possible."""

    def rows(topics: list[str]) -> list[dict]:
        return [row for turn in zip(*map(of_topic, topics), strict=True) for row in turn]

    return Task(rows(TOPICS[:NUM_TRAIN_TOPICS]), rows(TOPICS[NUM_TRAIN_TOPICS:]), reward, max_new_tokens)


if __name__ == "__main__":
    for name, task in (TASKS | GRADED_TASKS).items():
        for part in ("train", "held_out", "tuning", "tuning_train"):
            path = Path(sys.argv[1]) / f"{name}_{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in getattr(task(), part)))
            print(path)
