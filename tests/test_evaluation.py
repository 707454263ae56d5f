"""Numbers of an evaluation, against visible arithmetic and enumeration."""

import itertools
import random
import statistics
from types import SimpleNamespace

import pytest

from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.run import evaluation_stages, training_stages
from trl_larpo.run.evaluation import best_of_n, evaluate, fell, mean_and_error, student_quantile


def row(name, rewards, tokens=5):
    candidates = [Candidate(f"{name} {i}", reward, num_tokens=tokens) for i, reward in enumerate(rewards)]
    return CandidatePool(Prompt.of(name), candidates)


def test_best_of_n_is_the_average_over_all_choices():
    rng = random.Random(0)
    rows = [row(str(i), [rng.choice([0.0, 0.5, 1.0, 2.5]) for _ in range(rng.randint(4, 7))]) for i in range(5)]
    for n, value in enumerate(best_of_n(rows), start=1):
        rewards = [[c.reward for c in pool.candidates] for pool in rows]
        by_prompt = [statistics.fmean(max(c) for c in itertools.combinations(r, n)) for r in rewards]
        assert value == pytest.approx(statistics.fmean(by_prompt), abs=1e-12)
    assert len(best_of_n(rows)) == min(len(pool.candidates) for pool in rows)
    assert best_of_n([row("p", [None])]) == []


def test_gain_is_by_prompt():
    start = [row("a", [0.0, 1.0]), row("b", [0.0, 0.0]), row("c", [None, None])]
    now = [row("a", [1.0, 1.0], tokens=7), row("b", [0.0, 1.0], tokens=7), row("c", [1.0, None], tokens=7)]
    found = evaluate(now, start)
    assert found["gain"] == {"mean": 0.5, "standard_error": 0.0}  # a and b; c was not rewarded before
    assert found["reward"]["mean"] == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    assert (found["tokens"], found["finished"], found["distinct"], found["unrewarded"]) == (7.0, 1.0, 1.0, 1)


def test_too_few_values_have_no_error():
    assert mean_and_error([]) == {"mean": None, "standard_error": None}
    assert mean_and_error([2.0]) == {"mean": 2.0, "standard_error": None}


@pytest.mark.parametrize(
    "level, freedom, table",
    [(0.999, 7, 4.785), (0.999, 15, 3.733), (0.999, 63, 3.225), (0.975, 15, 2.131), (0.5, 9, 0.0)],
)
def test_student_quantile_is_that_of_the_tables(level, freedom, table):
    assert student_quantile(level, freedom) == pytest.approx(table, rel=0.01, abs=1e-9)


def test_a_fall_must_be_clearer_on_few_prompts():
    change = {"mean": -0.35, "standard_error": 0.1}
    assert fell(change, 64) and not fell(change, 16) and fell(change, 16, num_errors=2)


def test_the_divergence_takes_two_completions_of_each_prompt(monkeypatch):
    said = {"a": ["", "x", "x", "y"], "b": ["y", "x"], "c": ["", " "], "d": ["z"]}
    pools = [CandidatePool(Prompt.of(name), [Candidate(text) for text in texts]) for name, texts in said.items()]
    asked = []

    def log_probabilities(context, lists, model_of, folder):
        value = {"x": 2.0, "y": 7.0, "z": 1.0} if model_of else {"x": 1.0, "y": 2.0, "z": 1.0}
        asked.append([[candidate.text for candidate in made.selected] for made in lists()])
        return {made.prompt.id: [value[candidate.text] for candidate in made.selected] for made in lists()}

    monkeypatch.setattr(training_stages, "log_probabilities", log_probabilities)
    context = SimpleNamespace(folder=SimpleNamespace(iteration=lambda number: None))
    found = evaluation_stages.kl_from_initial(context, pools, 1)
    assert asked == 2 * [[["x"], ["y", "x"], ["z"]]]  # equal ones are computed once
    assert found["prompts"] == 3 and found["mean"] == pytest.approx((1 + 3 + 0) / 3)
    monkeypatch.setattr(evaluation_stages, "MAX_KL_PROMPTS", 2)
    assert evaluation_stages.kl_from_initial(context, pools, 1)["prompts"] == 2
