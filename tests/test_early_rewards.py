"""Rewards while others are sampled: the same files as without, also after a stop in the middle."""

import threading

import pytest
from fake_server import FakeServer
from small_run import rows_of
from transformers import AutoTokenizer

from trl_larpo.generation.sampler import PolicySampler
from trl_larpo.rewards import early
from trl_larpo.rewards.early import can_reward_early
from trl_larpo.rewards.options import RewardOptions
from trl_larpo.rewards.scorer import RewardScorer
from trl_larpo.run.context import RunContext
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.options import RunConfig, RunModelConfig, RunTrainingConfig
from trl_larpo.run.stages import STAGES, run_stage
from trl_larpo.storage import read_jsonl, write_jsonl

REWARDS = """
import asyncio, pathlib, threading

calls = []  # iteration that is being sampled, if any; prompts; whether in the main thread
failing = set()

def judge(prompts, completions, finished, bonus, **columns):
    sampling = [path.parent.name for path in pathlib.Path("out").glob("*/samples.jsonl.partial-*")]
    calls.append((sampling, prompts, threading.current_thread() is threading.main_thread()))
    if failing & set(prompts):
        raise ValueError("not this one")
    return [len(text) + number for text, number in zip(completions, bonus)]

async def remote_judge(**arguments):
    await asyncio.sleep(0.001)
    return judge(**arguments)
"""


@pytest.fixture
def stages(tmp_path, talkative_model, monkeypatch):
    """Runs the stages up to `select` of two iterations; returns what is in the files of samples and rewards."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "early_judges.py").write_text(REWARDS)
    monkeypatch.delitem(sys.modules, "early_judges", raising=False)
    write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": f"{i} why is it", "bonus": i} for i in range(12)))

    def run(reward="judge", iterations=(1, 2), **options):
        folder = RunFolder(
            RunConfig(
                prompts=["prompts.jsonl"], num_held_out=4, num_samples=3, max_new_tokens=6, num_iterations=2,
                negatives=["high_temperature", "related_prompt"], memory="all", generation_batch_size=1,
                reward_funcs=[f"early_judges:{reward}"], prompt_schedule="drawn", prompts_per_iteration=5, **options,
            ),
            RunTrainingConfig("out", report_to="none", use_cpu=True),
            RunModelConfig(model_name_or_path=talkative_model),
        )  # fmt: skip
        monkeypatch.setattr(folder, "model_path", lambda iteration: talkative_model)  # nothing is trained
        folder.prepare_prompts(AutoTokenizer.from_pretrained(talkative_model))
        context = RunContext(folder)
        try:
            for number in iterations:
                for name in ("generate", "reward", "select"):
                    run_stage(context, STAGES[name], number)
        finally:
            context.close()
        assert not list(folder.path.rglob("*.partial*"))
        names = ("samples", "rewarded", "lists")
        return [rows_of(f"out/iteration_{number}/{name}.jsonl") for number in iterations for name in names]

    def again(*arguments, **options):
        import shutil

        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        module = sys.modules.get("early_judges")
        if module is not None:
            module.calls.clear()
        return run(*arguments, **options)

    run.again = again
    yield run
    sys.modules.pop("early_judges", None)


@pytest.fixture
def unhurried(monkeypatch):
    """Sampling waits until what it has handed over is rewarded, so that a test does not depend on speed."""
    add = early.EarlyRewards.add

    def add_and_wait(self, pools):
        add(self, pools)
        while self._num_done + self._num_failed < len(self.sampled) + len(pools):
            threading.Event().wait(0.005)
        self.sampled += pools

    monkeypatch.setattr(early.EarlyRewards, "sampled", [], raising=False)
    init = early.EarlyRewards.__init__

    def with_list(self, *arguments):
        init(self, *arguments)
        self.sampled = []

    monkeypatch.setattr(early.EarlyRewards, "__init__", with_list)
    monkeypatch.setattr(early.EarlyRewards, "add", add_and_wait)


def calls_while_sampling():
    import early_judges

    return [call for call in early_judges.calls if call[0]]


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["judge", "remote_judge"])
def test_files_are_the_same_and_most_is_rewarded_early(stages, unhurried, reward):
    found = stages(reward)
    early_calls = calls_while_sampling()
    assert len(early_calls) == 2 * 5 and all(len(prompts) == 4 for _, prompts, _ in early_calls)
    assert not any(in_main for *_, in_main in early_calls)
    import early_judges

    later = sum(len(prompts) for sampling, prompts, _ in early_judges.calls if not sampling)
    assert later == 2 * 5  # the responses to other prompts
    assert stages.again(reward, reward_while_sampling=False) == found
    assert not calls_while_sampling()


@pytest.mark.slow
def test_the_same_from_servers(stages, unhurried):
    pytest.importorskip("openai")
    server = FakeServer().start()
    try:
        options = {"iterations": [1], "server_urls": [server.url]}
        found = stages(**options)
        assert len(calls_while_sampling()) == 5
        assert stages.again(**options, reward_while_sampling=False) == found
    finally:
        server.close()


@pytest.mark.slow
def test_what_fails_or_is_not_reached_is_left_to_the_scorer(stages, unhurried):
    expected = stages(iterations=[1], reward_while_sampling=False)
    import early_judges

    failing = read_jsonl("out/iteration_1/samples.jsonl")[2]["prompt"]
    early_judges.failing.add(failing)
    found = stages.again(iterations=[1])
    early_judges.failing.clear()
    assert found[1] == [row for row in expected[1] if row["prompt"] != failing]  # set aside, as without
    assert rows_of("out/iteration_1/rewarded.set_aside.jsonl")[0]["prompt"] == failing


@pytest.mark.slow
@pytest.mark.parametrize("stops_at", ["generate", "reward"])
def test_stopped_in_the_middle_it_ends_with_the_same_files(stages, unhurried, monkeypatch, stops_at):
    expected = stages(iterations=[1], reward_while_sampling=False)
    add_early, finish = early.EarlyRewards.add, RewardScorer.score

    def stops(self, pools, *arguments, **named):
        if stops_at == "generate":
            add_early(self, pools)
            if len(self.sampled) < 3:
                return None
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*((early.EarlyRewards, "add") if stops_at == "generate" else (RewardScorer, "score")), stops)
        with pytest.raises(KeyboardInterrupt):
            stages.again(iterations=[1])
    assert list(early._path(early.Path("out/iteration_1/rewarded.jsonl")).parent.glob("early_rewarded.jsonl.partial-0"))
    import early_judges

    early_judges.calls.clear()
    assert RewardScorer.score is finish and stages(iterations=[1]) == expected
    # Nothing is asked for twice: 4 samples of each prompt and 1 response to another one, without those of the first 3
    asked = sum(len(prompts) for _, prompts, _ in early_judges.calls)
    assert asked == (2 * 4 + 5 if stops_at == "generate" else 5)


@pytest.mark.slow
def test_many_that_wait_are_left_to_the_scorer(stages, monkeypatch):
    expected = stages(iterations=[1], reward_while_sampling=False)
    monkeypatch.setattr(early, "_MAX_WAITING", 1)
    monkeypatch.setattr(early.EarlyRewards, "_work", lambda self: None)  # takes nothing: the queue is full at once
    monkeypatch.setattr(early.EarlyRewards, "__exit__", lambda self, *error: None)
    assert stages.again(iterations=[1]) == expected


def test_models_rankers_and_normalized_rewards_wait(project, tiny_model):
    def can(*names, **options):
        return can_reward_early(RewardScorer(RewardOptions(reward_funcs=list(names), **options), use_cpu=True))

    assert can("run_rewards:vowels", "gsm8k")
    assert not can("run_rewards:vowels", tiny_model)
    assert not can("pairwise:run_rewards:prefer_longer")
    assert not can("run_rewards:vowels", normalize_rewards=True)


def test_rewards_with_alarms_wait():
    """Outside the main thread math-verify has no time limit: some completions would keep the run busy forever."""

    def can(*names):
        return can_reward_early(RewardScorer(RewardOptions(reward_funcs=list(names)), use_cpu=True))

    assert can("gsm8k") and can("trl.rewards:think_format_reward")
    for name in ("math", "trl.rewards:accuracy_reward", "trl.rewards:reasoning_accuracy_reward"):
        assert not can(name) and not can("gsm8k", name)


def test_a_reward_may_change_the_working_directory_while_others_are_sampled(stages, unhurried, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    sample = PolicySampler.sample

    def sample_elsewhere(self, prompts, task, path, on_pools):
        def on_pools_elsewhere(pools):
            on_pools(pools)
            monkeypatch.chdir(tmp_path / "elsewhere")  # as a reward does in another thread

        try:
            return list(sample(self, prompts, task, path, on_pools_elsewhere))
        finally:
            monkeypatch.chdir(tmp_path)

    monkeypatch.setattr(PolicySampler, "sample", sample_elsewhere)
    samples, rewarded, _ = stages(iterations=[1])
    assert len(samples) == len(rewarded) == 5 and not list((tmp_path / "elsewhere").iterdir())


def test_a_sampler_hands_over_what_it_has_saved(tmp_path, talkative_model):
    from trl_larpo.generation.sampling_task import SampleKind, SamplingTask
    from trl_larpo.prompts import Prompt

    handed_over = []

    def on_pools(pools):
        saved = {row["prompt_id"] for row in rows_of(tmp_path / "samples.jsonl.partial-0")}
        assert saved >= {pool.prompt.id for pool in pools}
        handed_over.extend(pools)

    options = RunConfig(prompts=["p"], max_new_tokens=3, generation_batch_size=1)
    sampler = PolicySampler(options, seed=0, log_folder=tmp_path, use_cpu=True)
    task = SamplingTask([SampleKind("policy", 1.0)] * 2, talkative_model, 1, key="1")
    prompts = [Prompt.of(f"why is it {i}") for i in range(5)]
    sampler.sample(prompts[:2], task, tmp_path / "samples.jsonl")
    sampled = sampler.sample(prompts, task, tmp_path / "samples.jsonl", on_pools)
    assert sorted(pool.prompt.text for pool in handed_over) == ["why is it 2", "why is it 3", "why is it 4"]
    assert {pool.prompt.id: pool.candidates for pool in sampled}.items() >= {
        pool.prompt.id: pool.candidates for pool in handed_over
    }.items()
