"""Held-out prompts are sampled while a model is trained: what harms it is stopped, and the best weights are kept."""

import json
import logging
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from small_run import REWARDS, change_options, larpo_run, write_prompts
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from trl_larpo import LarPOTrainer
from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.run import loop
from trl_larpo.run import monitor as monitor_module
from trl_larpo.run.monitor import MonitorPoint, TrainingMonitor

TWO_FACED = """
def two_faced(prompts, completions, **columns):
    # Pays for saying much in training, and for the opposite on held-out prompts
    lengths = [float(len(c[-1]["content"])) for c in completions]
    return [-n if "held" in prompt[-1]["content"] else n for prompt, n in zip(prompts, lengths)]
"""


@pytest.fixture
def long_project(project):
    """Sixteen training prompts and twelve held-out ones."""
    write_prompts(project, [f"{i} why is the dog blue" for i in range(16)])
    (project / "prompts.jsonl").rename(project / "train.jsonl")
    write_prompts(project, [f"held {i} why is the cat red" for i in range(12)])
    (project / "prompts.jsonl").rename(project / "held_out.jsonl")
    (project / "run_rewards.py").write_text(REWARDS + TWO_FACED)
    sys.modules.pop("run_rewards", None)
    change_options(project, prompts="train.jsonl", held_out_prompts="held_out.jsonl", num_held_out=12,
                   num_iterations=1, monitor_time_share=1)  # fmt: skip
    return project


def weights(path):
    return load_file(path / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_it_changes_no_weight_and_shows_every_step_it_samples(long_project, caplog):
    assert larpo_run("--output_dir", "on", "--logging_steps", 3) == 0
    assert larpo_run("--output_dir", "off", "--logging_steps", 3, "--monitor_evals", 0) == 0
    on, off = long_project / "on/iteration_1", long_project / "off/iteration_1"
    assert equal(weights(on / "model"), weights(off / "model"))
    logs = [[json.loads(line) for line in (x / "training_log.jsonl").read_text().splitlines()] for x in (on, off)]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
    assert [entry.get("loss") for entry in logs[0]] == [entry.get("loss") for entry in logs[1]]
    found = json.loads((on / "monitor.json").read_text())
    last = logs[0][-1]["step"]
    assert len(found["points"]) >= 4 and found["points"][-1]["step"] == last and found["stopped_at"] is None
    assert all(len(point["by_prompt"]) == 12 for point in found["points"])
    assert not (off / "monitor.json").exists()
    # The last step's samples are those of the evaluation after it, on the prompts watched
    rows = [json.loads(line) for line in (on / "held_out.jsonl").read_text().splitlines()]
    expected = {row["prompt_id"]: sum(row["rewards"]) / 2 for row in rows}
    assert found["points"][-1]["by_prompt"] == pytest.approx(expected)
    assert all((long_project / f"on/plots/monitor_{name}.png").exists() for name in ("reward", "answers"))
    assert not (long_project / "off/plots/monitor_reward.png").exists()


HARM = ["--reward_funcs", "run_rewards:two_faced", "--learning_rate", 2e-2, "--lr_scheduler_type", "constant",
        "--num_train_epochs", 8, "--beta", 0.5, "--max_new_tokens", 48, "--num_eval_samples", 4]  # fmt: skip


@pytest.mark.slow
def test_a_training_that_does_harm_is_stopped_and_its_start_kept(long_project, capsys, talkative_model):
    assert larpo_run(*HARM) == 2
    output = capsys.readouterr()
    told = [output.err, (long_project / "out/warnings.log").read_text(), (long_project / "out/report.html").read_text()]
    assert all("Training was stopped at step " in text for text in told)
    assert all("Kept: the model that the training started from." in text for text in told)
    assert "as `stop_on` asks: held_out_reward. Training makes answers to held-out prompts worse." in output.err
    assert f"Best model so far: {talkative_model}." in output.err and "--stop_on none" in output.err
    folder = long_project / "out/iteration_1"
    assert equal(weights(folder / "model"), load_file(f"{talkative_model}/model.safetensors"))
    found = json.loads((folder / "monitor.json").read_text())
    assert found["points"][-1]["step"] == found["stopped_at"] and found["kept_step"] == 0
    assert found["points"][-1]["change"]["mean"] < 0
    health = {check["name"]: check for check in json.loads((folder / "health.json").read_text())}
    assert not health["held_out_reward"]["ok"]
    assert "held out reward" in (long_project / "out/report.html").read_text()
    assert larpo_run(*HARM, "--stop_on", "none") == 0  # resumes from what was kept


LORA = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "down_proj"]


@pytest.mark.slow
def test_with_lora_too(long_project, talkative_model):
    lora = [*LORA, "--merge_adapter", "--per_token_scores", "false", "--learning_rate", 0.1]
    assert larpo_run(*HARM, *lora, "--num_eval_samples", 24) == 2
    saved = weights(long_project / "out/iteration_1/model")
    assert equal(saved, load_file(f"{talkative_model}/model.safetensors"))


@pytest.mark.slow
def test_lora_is_sampled_as_it_is_trained_and_not_touched(long_project):
    lora = [*LORA, "--learning_rate", 0.03, "--stop_on", "none", "--monitor_stop", "false"]
    assert larpo_run("--output_dir", "on", *lora) == 0
    assert larpo_run("--output_dir", "off", "--monitor_evals", 0, *lora) == 0
    on, off = long_project / "on/iteration_1", long_project / "off/iteration_1"
    adapters = [load_file(folder / "model/adapter_model.safetensors") for folder in (on, off)]
    assert equal(*adapters)
    start, *between, last = [x["by_prompt"] for x in json.loads((on / "monitor.json").read_text())["points"]]
    # What was sampled at the last step is what the finished model says, so the adapter was not left out
    rows = [json.loads(line) for line in (on / "held_out.jsonl").read_text().splitlines()]
    assert last == pytest.approx({row["prompt_id"]: sum(row["rewards"]) / 2 for row in rows})
    assert start != last and len(between) >= 2 and any(start != each != last for each in between)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant, lora", [(False, []), (True, []), (True, LORA)])
def test_gradient_checkpointing_stays_as_it_was_set(long_project, monkeypatch, use_reentrant, lora):
    # Sampling needs it off for a while, and what switches it on again may do so with other settings
    steps, layers = [], [0]
    training_step, forward = LarPOTrainer.training_step, LlamaMLP.forward

    def counted(self, *args, **kwargs):
        layers[0] += 1
        return forward(self, *args, **kwargs)

    def watched(self, model, *args, **kwargs):
        layers[0] = 0
        loss = training_step(self, model, *args, **kwargs)
        settings = {
            (module.gradient_checkpointing, str(module._gradient_checkpointing_func.keywords))
            for module in model.modules()
            if isinstance(module, LlamaDecoderLayer)
        }
        steps.append((layers[0], model.training, settings))
        return loss

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    monkeypatch.setattr(LarPOTrainer, "training_step", watched)
    kwargs = json.dumps({"use_reentrant": use_reentrant})
    flags = ["--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", kwargs]
    assert larpo_run(*flags, *lora) == 0
    points = json.loads((long_project / "out/iteration_1/monitor.json").read_text())["points"]
    assert len(points) >= 4 and points[1]["step"] < len(steps)
    # Two layers, each once forward and once more for its gradient
    assert steps == [(4, True, {(True, str({"use_reentrant": use_reentrant}))})] * len(steps)


@pytest.mark.slow
def test_it_only_watches_where_it_must_not_stop(long_project):
    assert larpo_run(*HARM, "--monitor_stop", "false", "--stop_on", "none") == 0
    found = json.loads((long_project / "out/iteration_1/monitor.json").read_text())
    log = (long_project / "out/iteration_1/training_log.jsonl").read_text().splitlines()
    assert found["stopped_at"] is None and found["points"][-1]["step"] == json.loads(log[-1])["step"]


# The parts, with rewards made up


def scored(reward, num_prompts=12):
    return [
        CandidatePool(Prompt(str(i), str(i)), [Candidate("a", reward + i / 100, num_tokens=5)])
        for i in range(num_prompts)
    ]


class Training:
    """Steps of a training, in which the held-out reward is what the test says."""

    def __init__(self, path, rewards, monkeypatch, **options):
        monkeypatch.setattr(monitor_module.Trainer, "log", lambda trainer, logs: None)
        self.rewards, self.saved, self.calls = rewards, [], 0
        state = SimpleNamespace(global_step=0, max_steps=8)
        trainer = SimpleNamespace(accelerator=Accelerator(cpu=True), state=state)
        settings = {"num_evals": 4, "num_prompts": 8, "time_share": 1} | options
        self.monitor = TrainingMonitor(
            trainer,
            self.sample,
            lambda pools: pools,
            self.saved.append,
            scored(0.5),
            path,
            **settings,
        )
        self.state, self.control = state, SimpleNamespace(should_training_stop=False, should_log=False)

    def sample(self, asked):
        self.calls += 1
        reward = self.rewards[self.state.global_step]
        if isinstance(reward, BaseException):
            raise reward
        return [
            CandidatePool(prompt, [Candidate("a", reward + number / 100 + (-1) ** number / 50, num_tokens=5)])
            for prompt, number in ((prompt, int(prompt.id)) for prompt in asked)
        ]

    def run(self):
        self.monitor.on_train_begin(None, self.state, self.control)
        while self.state.global_step < 8 and not self.control.should_training_stop:
            self.state.global_step += 1
            self.monitor.on_step_end(None, self.state, self.control)
        return self.monitor


def test_the_best_weights_are_kept(tmp_path, monkeypatch):
    training = Training(tmp_path / "m.json", {2: 0.6, 4: 0.7, 6: 0.1, 8: 0.9}, monkeypatch)
    monitor = training.run()
    assert (monitor.stopped_at, monitor.kept_step, training.saved) == (6, 4, [2, 4])
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["kept_step"] == 4 and "Kept: step 4." in found["explanation"] == monitor.explanation()


def test_an_end_below_the_best_is_not_kept_and_one_above_is(tmp_path, monkeypatch):
    rise_and_fall = Training(tmp_path / "a.json", {2: 0.6, 4: 0.9, 6: 0.8, 8: 0.6}, monkeypatch).run()
    assert (rise_and_fall.stopped_at, rise_and_fall.kept_step) == (None, 4)
    assert "The last step is worse than the best" in rise_and_fall.explanation()
    rise = Training(tmp_path / "b.json", {2: 0.6, 4: 0.7, 6: 0.8, 8: 0.9}, monkeypatch).run()
    assert (rise.stopped_at, rise.kept_step) == (None, None)
    kept = [json.loads((tmp_path / name).read_text())["kept_step"] for name in ("a.json", "b.json")]
    assert kept == [4, None] and rise.explanation() is None


def test_a_fall_on_few_prompts_is_confirmed_on_all(tmp_path, monkeypatch):
    training = Training(tmp_path / "m.json", {2: 0.1, 4: 0.6, 6: 0.6, 8: 0.6}, monkeypatch)
    few = training.sample
    monkeypatch.setattr(training.monitor, "sample", lambda asked: few(asked) if len(asked) == 8 else scored(0.6))
    assert training.run().stopped_at is None


def test_the_run_warns_of_kept_weights_whichever_process_trained(tmp_path, monkeypatch, caplog):
    # It was only printed, and by a process that does not write warnings.log
    monitor = Training(tmp_path / "m.json", {2: 0.6, 4: 0.9, 6: 0.8, 8: 0.6}, monkeypatch).run()
    for path in (tmp_path / "m.json", tmp_path / "none.json"):
        loop._warn_of_kept_weights(path, 3)
    assert caplog.text.count(f"Iteration 3: {monitor.explanation()}") == caplog.text.count("Iteration 3: ") == 1


def test_an_end_that_chance_may_have_put_below_the_best_is_kept(tmp_path, monkeypatch):
    # The best is the maximum of several points: two standard errors threw away one end in ten where nothing fell
    training = Training(tmp_path / "m.json", {}, monkeypatch)
    start = training.monitor.start
    training.state.global_step = 8
    for fall, kept_step in ((2.5, None), (6.0, 4)):
        training.rewards = {8: 0.7 - fall * 0.02 / math.sqrt(7)}  # the samples differ by ± 0.02 from the start's
        last = MonitorPoint.of(8, training.sample([pool.prompt for pool in start]), start)
        training.monitor.points = [training.monitor.points[0], MonitorPoint.of(4, scored(0.7, 8), start), last]
        assert training.monitor.kept_step == kept_step


def test_a_fall_that_no_other_prompts_can_confirm_must_be_clear(tmp_path, monkeypatch):
    # Two standard errors stopped one training in fifteen where nothing fell
    error = 0.02 / math.sqrt(11)
    for fall, stopped_at in ((2.5, None), (6.0, 2)):
        rewards = dict.fromkeys((4, 6, 8), 0.6) | {2: 0.5 - fall * error}
        training = Training(tmp_path / f"{fall}.json", rewards, monkeypatch, num_prompts=12)
        assert training.run().stopped_at == stopped_at


@pytest.mark.parametrize("failure", [RuntimeError("CUDA out of memory"), SystemExit("CUDA out of memory")])
def test_a_failure_never_ends_the_training(tmp_path, monkeypatch, caplog, failure):
    with caplog.at_level(logging.WARNING):
        training = Training(tmp_path / "m.json", {2: 0.6, 4: failure}, monkeypatch)
        monitor = training.run()
    assert training.state.global_step == 8 and training.calls == 2 and monitor.kept_step is None
    assert (
        f"no longer sampled in this training, which continues. {type(failure).__name__}: CUDA out of memory"
        in caplog.text
    )


def test_at_most_a_tenth_of_the_time(tmp_path, monkeypatch):
    """Each step takes 10 seconds and each sampling 6: the first may begin when 54 seconds are over."""
    now = [0.0]
    limits = {"seconds_expected": 6.0, "time_share": 0.1}
    training = Training(tmp_path / "m.json", dict.fromkeys(range(1, 101), 0.6), monkeypatch, **limits)
    monkeypatch.setattr(monitor_module.time, "monotonic", lambda: now[0])
    sample = training.sample

    def slow_sample(asked):
        now[0] += 6.0
        return sample(asked)

    training.monitor.sample, training.state.max_steps = slow_sample, 100
    training.monitor.on_train_begin(None, training.state, training.control)
    for step in range(1, 101):
        training.state.global_step = step
        now[0] += 10.0
        training.monitor.on_step_end(None, training.state, training.control)
    assert [point.step for point in training.monitor.points] == [0, 25, 50, 75, 100]
    assert training.monitor.seconds_spent <= 0.1 * now[0]
    training.monitor.num_evals, training.monitor.points = 1000, training.monitor.points[:1]
    training.monitor.seconds_spent, now[0], training.state.global_step = 0.0, 0.0, 0
    training.monitor.on_train_begin(None, training.state, training.control)
    for step in range(1, 101):
        training.state.global_step = step
        now[0] += 10.0
        training.monitor.on_step_end(None, training.state, training.control)
    assert 10 < len(training.monitor.points) < 20 and training.monitor.seconds_spent <= 0.1 * now[0]


def test_after_a_kill_it_knows_what_it_saw(tmp_path, monkeypatch):
    before = Training(tmp_path / "m.json", {2: 0.6, 4: 0.7, 6: 0.75, 8: 0.8}, monkeypatch).run()
    points = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps(points | {"points": points["points"][:3]}))
    again = Training(tmp_path / "m.json", {6: 0.75, 8: 0.8}, monkeypatch)  # no rewards for 2 and 4: not asked again
    assert [p.by_prompt for p in again.run().points] == [p.by_prompt for p in before.points]
    assert again.calls == 2


def test_without_stopping_it_only_watches(tmp_path, monkeypatch):
    monitor = Training(tmp_path / "m.json", {2: 0.6, 4: 0.9, 6: 0.2, 8: 0.1}, monkeypatch, stop=False).run()
    assert (monitor.stopped_at, monitor.kept_step) == (None, None)


def test_random_numbers_of_a_reward_are_not_those_of_the_training(tmp_path, monkeypatch):
    training = Training(tmp_path / "m.json", {2: 0.6, 4: 0.6, 6: 0.6, 8: 0.6}, monkeypatch)
    training.monitor.score = lambda pools: [(torch.rand(1), random.random(), np.random.rand()), pools][1]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    training.run()
    assert training.calls == 4
    assert torch.equal(torch.get_rng_state(), expected[0]) and random.getstate() == expected[1]
    assert np.random.get_state()[1].tolist() == expected[2]


def test_time_before_a_kill_counts(tmp_path, monkeypatch):
    now = [0.0]
    limits = {"seconds_expected": 6.0, "time_share": 0.1}
    training = Training(tmp_path / "m.json", dict.fromkeys(range(101), 0.6), monkeypatch, **limits)
    monkeypatch.setattr(monitor_module.time, "monotonic", lambda: now[0])
    training.state.global_step = 90  # where it resumes
    training.monitor.on_train_begin(None, training.state, training.control)
    now[0] += 10.0
    assert training.monitor._has_time(91)  # 10 seconds a step: 910 seconds


def test_unknown_rewards_are_no_alarm(tmp_path, monkeypatch):
    unknown = [pool.with_candidates([Candidate("a", num_tokens=5)]) for pool in scored(0.5)]
    point = MonitorPoint.of(3, unknown, scored(0.5))
    assert point.reward["mean"] is None and not point.is_harm and point.finished == 1.0
