"""Rewards that are `async def` functions: many calls in flight, and otherwise as all rewards are."""

import asyncio
import threading

import pytest
from small_run import rows_of

from trl_larpo import ConfigError, DataError
from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.rewards.functions import Reward, score_pools, start_calls
from trl_larpo.rewards.options import RewardOptions
from trl_larpo.rewards.scorer import RewardScorer
from trl_larpo.rewards.trl_convention import as_function
from trl_larpo.set_aside import set_aside_in

POOLS = [
    CandidatePool(Prompt.of(f"prompt {i}", {"bonus": i}), [Candidate("a" * i), Candidate("b"), Candidate("cc")])
    for i in range(1, 13)
]


def length(prompts, completions, bonus, **columns):
    return [len(completion) + number for completion, number in zip(completions, bonus, strict=True)]


async def slow_length(prompts, completions, **columns):
    await asyncio.sleep(0.001 * (hash(prompts[0]) % 5))  # answers come in another order
    return length(prompts, completions, **columns)


@pytest.fixture
def score(tmp_path, monkeypatch):
    """Rewards the pools with functions, into a file of that name."""

    def run(output, *functions, **options):
        names = [f"judge{i}" for i in range(len(functions))]
        scorer = RewardScorer(RewardOptions(reward_funcs=names, **options), use_cpu=True)
        monkeypatch.setattr(scorer, "_rewards", [Reward(*each) for each in zip(names, functions, strict=True)])
        return [pool.to_row() for pool in scorer.score(POOLS, tmp_path / f"{output}.jsonl")]

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("also", [(), (length,), (slow_length,)], ids=["alone", "with a function", "two"])
def test_results_are_those_of_a_function(score, also):
    assert score("async", slow_length, *also) == score("sync", length, *(length for _ in also))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_columns_may_have_any_name(asynchronous):
    columns = {"function": "def f", "self": 1, "arguments": 2, "named": 3}

    def judge(prompts, completions, **columns):
        return [float(len(columns["function"][0]))] * len(completions)

    async def remote_judge(**arguments):
        return judge(**arguments)

    pool = CandidatePool(Prompt.of("p", columns), [Candidate("a"), Candidate("b")])
    rewards = [Reward("judge", remote_judge if asynchronous else judge)]
    for calls in ({}, start_calls(rewards, [pool])):
        [scored] = score_pools(rewards, [pool], calls=calls)
        assert [candidate.reward for candidate in scored.candidates] == [5.0, 5.0]


def test_many_calls_are_in_flight_and_no_more_than_asked_for(score):
    barrier, running, most = asyncio.Barrier(4), 0, 0

    async def judge(prompts, completions, **columns):
        nonlocal running, most
        assert len(set(prompts)) == 1 and len(completions) == 3  # one prompt for each call
        running += 1
        most = max(most, running)
        await asyncio.wait_for(barrier.wait(), timeout=60)  # up to when four are there
        running -= 1
        return length(prompts, completions, **columns)

    assert score("async", judge, reward_calls_in_flight=4) == score("sync", length)
    assert most == 4


def test_a_client_keeps_its_event_loop_and_functions_their_thread(score):
    loops, threads = set(), set()

    class Client:
        async def __call__(self, prompts, completions, **columns):
            loops.add(asyncio.get_running_loop())
            return length(prompts, completions, **columns)

    def function(prompts, completions, **columns):  # which may set alarms, as only the main thread can
        threads.add(threading.current_thread())
        return length(prompts, completions, **columns)

    score("first", Client(), function)
    score("second", Client(), function)
    score_pools([Reward("now", Client())], POOLS)
    assert len(loops) == 1 and threads == {threading.current_thread()}


def test_what_fails_is_tried_again_and_set_aside(score):
    calls = []

    async def judge(prompts, completions, **columns):
        calls.append(prompts[0])
        if prompts[0] == "prompt 7" or (prompts[0] == "prompt 3" and calls.count("prompt 3") == 1):
            raise TimeoutError("no answer")
        return length(prompts, completions, **columns)

    rows = score("async", judge)
    assert rows == [row for row in score("sync", length) if row["prompt"] != "prompt 7"]
    [[row]] = set_aside_in(score.folder).values()
    assert row["prompt"] == "prompt 7" and row["reason"].endswith("TimeoutError: no answer")


def test_a_judge_that_never_works_is_not_asked_for_all(score):
    calls = []

    async def judge(prompts, completions, **columns):
        calls.append(prompts[0])
        raise PermissionError("no key")

    with pytest.raises(DataError, match="no key"):
        score("async", judge, reward_calls_in_flight=2)
    assert len(calls) <= 7


def test_stopped_in_the_middle_it_resumes_with_what_was_saved(score):
    expected, asked = score("sync", length), []

    async def judge(prompts, completions, **columns):
        asked.append(prompts[0])
        return length(prompts, completions, **columns)

    def stops(prompts, completions, **columns):
        if prompts[0] == "prompt 6":
            raise KeyboardInterrupt
        return length(prompts, completions, **columns)

    with pytest.raises(KeyboardInterrupt):
        score("async", judge, stops, reward_calls_in_flight=1)
    assert len(rows_of(score.folder / "async.jsonl.partial-0")) == 5
    asked.clear()
    rows = score("async", judge, length, reward_calls_in_flight=3)
    assert sorted(asked) == sorted(f"prompt {i}" for i in range(6, 13))
    assert [row["completions"] for row in rows] == [row["completions"] for row in expected]
    assert rows == score("both", length, length)


def test_a_ranker_may_be_asynchronous():
    async def ranker(prompt, completions):
        return [[float(len(a) > len(b)) for b in completions] for a in completions]

    [pool] = score_pools([Reward("ranker", ranker, pairwise=True)], POOLS[4:5])
    assert [candidate.reward for candidate in pool.candidates] == [1.0, 0.0, 0.5]


def longer(prompt, completions):
    return [[float(len(a) > len(b)) for b in completions] for a in completions]


@pytest.mark.parametrize("failure", [TimeoutError("no answer"), asyncio.CancelledError()])
@pytest.mark.parametrize("against", [None, {"elsewhere": ["x"], POOLS[2].prompt.id: ["bb", "<think>no</think>"]}])
def test_calls_of_rankers_are_in_flight_too(tmp_path, monkeypatch, against, failure):
    barrier, fails = asyncio.Barrier(4), True

    async def ranker(prompt, completions):
        if against is None and fails:
            await asyncio.wait_for(barrier.wait(), timeout=60)  # up to when four are there
        if prompt == "prompt 5" and fails:
            raise failure
        return longer(prompt, completions)

    def score(function, pools, output):
        options = RewardOptions(reward_funcs=["x"], reward_calls_in_flight=4, strip_thinking="rewards")
        scorer = RewardScorer(options, use_cpu=True)
        monkeypatch.setattr(scorer, "_rewards", [Reward("x", function, pairwise=True)])
        return [pool.to_row() for pool in scorer.score(pools, tmp_path / output, against=against)]

    good = [pool for pool in POOLS if pool.prompt.text != "prompt 5"]
    assert score(ranker, good[:8], "async.jsonl") == score(longer, good[:8], "sync.jsonl")
    if against is not None:
        assert len(score(ranker, POOLS, "some.jsonl")) == 12, "it is not asked about prompts without others"
        return
    barrier = asyncio.Barrier(1)
    assert score(ranker, POOLS, "aside.jsonl") == score(longer, good, "good.jsonl")
    [[row]] = set_aside_in(tmp_path).values()
    assert row["prompt"] == "prompt 5" and "failed for the prompt" in row["reason"]


def test_no_more_calls_of_a_ranker_than_asked_for_where_many_prompts_are_scored_at_once():
    running, most = 0, 0

    async def ranker(prompt, completions):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return longer(prompt, completions)

    scorer = RewardScorer(RewardOptions(reward_funcs=["x"], reward_calls_in_flight=3), use_cpu=True)
    scorer._rewards = [Reward("x", ranker, pairwise=True)]
    assert len(scorer.score_now(POOLS)) == 12 and most == 3


def test_a_ranker_that_fails_on_a_prompt_is_named_with_it():
    async def ranker(prompt, completions):
        if prompt == "prompt 3":
            raise SystemExit(2)
        return longer(prompt, completions)

    rewards = [Reward("mine", ranker, pairwise=True)]
    with pytest.raises(DataError, match=r"The ranker mine failed for the prompt 'prompt 3': .*SystemExit\(2\)"):
        score_pools(rewards, POOLS)
    assert len(score_pools(rewards, POOLS[4:])) == 8, "other calls are answered as before"


def test_trainers_that_sample_await_rankers_and_objects():
    class Client:
        async def __call__(self, prompts, completions, **columns):
            return [float(len(completion)) for completion in completions]

    async def ranker(prompt, completions):
        return longer(prompt, completions)

    asked = {"prompts": ["p", "p", "q"], "completions": ["a", "aaa", "aa"], "trainer_state": None}
    for function, pairwise, expected in ((Client(), False, [1.0, 3.0, 2.0]), (ranker, True, [0.0, 1.0, None])):
        made = as_function(Reward("mine", function, pairwise=pairwise))
        assert asyncio.iscoroutinefunction(made) and made.__name__ == "mine"
        assert asyncio.run(made(**asked)) == expected


def test_there_is_at_least_one_call():
    with pytest.raises(ConfigError, match="`reward_calls_in_flight` is 0; it must be at least 1"):
        RewardOptions(reward_funcs=["gsm8k"], reward_calls_in_flight=0).check_rewards()
