"""Each sign of a run that goes wrong is seen, and a run that goes well raises none."""

import pytest

from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.report.statistics import SampleCounts
from trl_larpo.run.health import CHECKS, check_iteration


def evaluation(tokens=40.0, finished=0.95, change=0.1, kl=5.0):
    return {
        "prompts": 64, "tokens": tokens, "finished": finished, "change": {"mean": change, "standard_error": 0.02},
        "kl_from_initial": {"mean": kl},
    }  # fmt: skip


def samples(tokens=40, finished=True, texts=("a", "b", "c", "d")):
    candidates = [Candidate(text, num_tokens=tokens, finished=finished) for text in texts]
    counts = SampleCounts()
    list(counts.counted([CandidatePool(Prompt.of("p"), candidates)]))
    return counts.statistics()


SELECTION = {"lists": 10, "prompts_too_few": 0, "prompts_tied": 0, "prompts_small_gap": 0}
LOG = [{"rewards/margins": 1.0, "rewards/chosen": 0.5}, {"train_loss": 0.1}]
WELL = {
    "samples": samples(),
    "first_samples": samples(),
    "selection": SELECTION,
    "training_log": LOG,
    "start": evaluation(),
    "evaluations": [evaluation()],
}


def failing(**changes):
    return {check.name for check in check_iteration(**(WELL | changes)) if not check.ok}


def test_a_good_run_raises_nothing():
    assert failing() == set()
    assert tuple(check.name for check in check_iteration(**WELL)) == CHECKS


@pytest.mark.parametrize(
    "name, changes",
    [
        ("length", {"evaluations": [evaluation(tokens=19.0)]}),  # falls by half
        ("length", {"evaluations": [evaluation(tokens=61.0)]}),  # rises by half
        ("length", {"samples": samples(tokens=1)}),  # already in what the training started from
        ("duplicates", {"samples": samples(texts=("a", "a", "a", "a", "b"))}),
        ("tied_lists", {"selection": SELECTION | {"prompts_tied": 11}}),
        ("truncated", {"samples": samples(finished=False)}),
        ("truncated", {"evaluations": [evaluation(finished=0.6)]}),
        ("held_out_reward", {"evaluations": [evaluation(change=-0.07)]}),
        ("held_out_reward", {"evaluations": [evaluation(), evaluation(change=-0.07)]}),
        ("held_out_reward", {"monitor": {"stopped_at": 5, "points": [{"change": {"mean": -0.2}}]}}),
        ("margins", {"training_log": [{"rewards/margins": 21.0}]}),
        ("kl", {"evaluations": [evaluation(kl=51.0)]}),
    ],
)
def test_each_sign_is_seen_alone(name, changes):
    assert failing(**changes) == {name}


def test_a_fall_that_may_be_chance_is_no_alarm():
    assert failing(evaluations=[evaluation(change=-0.063)]) == set()  # 3.15 standard errors
    assert failing(evaluations=[evaluation(change=-0.07) | {"prompts": 16}]) == set()  # 3.5
    assert failing(evaluations=[evaluation(change=-0.5) | {"prompts": 7}]) == set()


def test_training_prompts_may_have_other_lengths_than_held_out_ones():
    # Samples for training were compared with the initial model's answers to held-out prompts
    assert failing(samples=samples(tokens=100), first_samples=samples(tokens=90)) == set()


def test_margins_without_a_reference_are_not_checked():
    assert failing(training_log=[{"rewards/margins": 21.0}], reference_free=True) == set()


def test_what_is_unknown_is_no_alarm():
    unknown = evaluation(tokens=None) | {"kl_from_initial": None, "change": {"mean": None, "standard_error": None}}
    assert failing(evaluations=[unknown], training_log=[], start=unknown) == set()
