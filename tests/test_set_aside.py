"""A reward that fails on some prompts: it is tried again, they are set aside and named, and too many of them end it."""

import pytest
from small_run import rows_of

from trl_larpo import ConfigError, DataError
from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.rewards.functions import Reward
from trl_larpo.rewards.options import RewardOptions
from trl_larpo.rewards.scorer import RewardScorer
from trl_larpo.set_aside import SetAside, set_aside_files, set_aside_in, set_aside_path

NUM_PROMPTS = 200


@pytest.fixture
def score(tmp_path, monkeypatch):
    """Rewards 200 prompts of two candidates with a function of the prompt's number and the number of its calls."""
    calls = {}

    def run(reward, output="rewarded.jsonl", **options):
        def function(prompts, completions, finished, **columns):
            for prompt in dict.fromkeys(prompts):
                calls[prompt] = calls.get(prompt, 0) + 1
            return [reward(int(prompt.split()[1]), calls[prompt]) for prompt in prompts]

        scorer = RewardScorer(RewardOptions(reward_funcs=["mine"], **options), use_cpu=True)
        monkeypatch.setattr(scorer, "_rewards", [Reward("mine", function, 1.0)])
        pools = [
            CandidatePool(Prompt.of(f"prompt {number}"), [Candidate("yes"), Candidate("no")])
            for number in range(NUM_PROMPTS)
        ]
        return scorer.score(pools, tmp_path / output)

    run.calls, run.folder = calls, tmp_path
    return run


def failing(*numbers, until=None):
    def reward(number, call):
        if number in numbers and (until is None or call < until):
            raise ValueError(f"no reward for {number}")
        return float(number)

    return reward


def test_what_fails_twice_is_set_aside_and_named(score):
    scored = score(failing(3, 77))
    assert [pool.prompt.text for pool in scored] == [f"prompt {i}" for i in range(NUM_PROMPTS) if i not in (3, 77)]
    assert all(candidate.reward == int(pool.prompt.text.split()[1]) for pool in scored for candidate in pool.candidates)
    [(name, rows)] = set_aside_in(score.folder).items()
    assert name == "rewarded" and [row["prompt"] for row in rows] == ["prompt 3", "prompt 77"]
    assert rows[0]["reason"] == "The reward mine failed: ValueError: no reward for 3"


def test_a_name_that_ends_in_a_number_is_no_number_of_a_process(score):
    assert len(score(failing(3), output="rewarded-1.jsonl")) == NUM_PROMPTS - 1
    assert list(set_aside_in(score.folder)) == ["rewarded-1"]


def test_what_fails_once_is_not(score):
    scored = score(failing(3, 77, until=3))  # in the chunk, and alone
    assert len(scored) == NUM_PROMPTS and not set_aside_in(score.folder)


def test_a_rerun_tries_it_once_more(score):
    score(failing(3))
    score.calls.clear()
    assert len(score(failing())) == NUM_PROMPTS and not set_aside_in(score.folder)
    assert list(score.calls) == ["prompt 3"]


def test_a_function_that_exits_is_a_function_that_fails(score):
    def reward(number, call):
        if number == 5:
            raise SystemExit(0)
        return 1.0

    assert len(score(reward)) == NUM_PROMPTS - 1


def test_a_reward_that_never_works_ends_it_at_once(score):
    with pytest.raises(DataError, match=r"no reward for 0.* Rewards of 0 of 200 prompts are kept. Fix the reward"):
        score(failing(*range(NUM_PROMPTS)))
    assert len(score.calls) <= 128  # one call for many, and then a few one by one
    assert sum(score.calls.values()) <= 128 + 5


@pytest.mark.parametrize("share, num_failing", [(0.05, 11), (0.1, 21), (0.0, 1)])
def test_too_many_end_it_and_the_others_are_kept(score, share, num_failing):
    with pytest.raises(DataError, match=r"Rewards of 1\d\d of 200 prompts are kept. Fix the reward and run the same"):
        score(failing(*range(100, 100 + num_failing)), max_failed_share=share)
    kept = rows_of(score.folder / "rewarded.jsonl.partial-0")
    assert len({row["prompt_id"] for row in kept}) == len(kept) >= 100


@pytest.mark.parametrize("num_failing, is_too_many", [(2, False), (3, True)])
def test_the_share_is_that_of_all_processes_together(score, num_failing, is_too_many):
    of_another_process = iter([8])  # of the 10 that may fail

    def reward(number, call):
        for count in of_another_process:
            aside = SetAside(score.folder / "rewarded.jsonl", NUM_PROMPTS, 0.05, "rewarded", process=1)
            for other in range(100, 100 + count):
                aside.add(Prompt.of(f"prompt {other}"), "no reward")
        return failing(*range(num_failing))(number, call)

    if not is_too_many:
        assert len(score(reward)) == NUM_PROMPTS - num_failing
        return
    message = r"11 of 200 prompts could not be rewarded, .*/rewarded\.\*set_aside\.jsonl names them"
    with pytest.raises(DataError, match=message):
        score(reward)


def test_files_are_named_that_are_there(tmp_path):
    output = tmp_path / "samples.jsonl"
    SetAside(tmp_path / "samples.old.jsonl", 100, 0.5, "sampled").add(Prompt.of("of another output"), "why")
    for process, name in ((2, "samples.process_2.set_aside.jsonl"), (0, "samples.*set_aside.jsonl")):
        set_aside_path(output, process).write_text("")
        assert set_aside_files(output).name == name
        assert set(tmp_path.glob(name)) >= {path for path in tmp_path.iterdir() if "old" not in path.name}


def test_each_prompt_is_added_to_the_file_and_a_kill_leaves_the_others(tmp_path):
    aside = SetAside(tmp_path / "samples.jsonl", 100, 0.5, "sampled")
    aside.add(Prompt.of("first"), "why")
    before = aside.path.stat().st_ino
    aside.add(Prompt.of("second"), "why")
    assert aside.path.stat().st_ino == before  # written on, and not again
    with open(aside.path, "a") as file:
        file.write('{"prompt_id": "x", "pro')
    [(name, rows)] = set_aside_in(tmp_path).items()
    assert name == "samples" and [row["prompt"] for row in rows] == ["first", "second"]


def test_a_share_is_a_share(tmp_path):
    with pytest.raises(ConfigError, match=r"`max_failed_share` is 1\.5; it must be from 0 to below 1"):
        RewardOptions(reward_funcs=["mine"], max_failed_share=1.5).check_rewards()
