"""Options that pass through several hands on their way: each changes what it is there to change."""

import itertools
import json
import signal
import statistics
import sys
from pathlib import Path

import psutil
import pytest
import torch
from fake_server import FakeServer
from small_run import change_options, larpo_run, rows_of, without_kernels_of_bfloat16
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
)

from trl_larpo import cli, commands
from trl_larpo.generation.sampler import PolicySampler, device_of, generation_dtype
from trl_larpo.run.small import save_small_reward_model
from trl_larpo.storage import read_json

FAKE_SERVER = f"{sys.executable} {Path(__file__).with_name('fake_server.py')} --port {{port}} {{model}}"


@pytest.fixture
def server():
    """Starts a server that ends with the test."""
    pytest.importorskip("openai")
    started = []

    def start(fault=None):
        started.append(FakeServer(fault=fault).start())
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def at_most_a_minute():
    """The options under test are there to end a wait; the defaults would make a failing test last long."""

    def fail(*_):
        pytest.fail("waited for more than a minute")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def calls(monkeypatch):
    """Number of sequences and dtype of the weights in each call of a model."""
    seen = []
    forward = LlamaModel.forward

    def spy(self, input_ids=None, **kwargs):
        seen.append((len(input_ids), self.embed_tokens.weight.dtype))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", spy)
    return seen


# Sampling


@pytest.mark.slow
def test_weights_are_quantized_where_they_are_sampled(generate, talkative_model, monkeypatch):
    without_kernels_of_bfloat16(monkeypatch)
    assert generate("--max_new_tokens", 24, "--load_in_4bit") == 0
    found = [row["completions"] for row in rows_of("samples.jsonl")]
    assert generate("--max_new_tokens", 24, "--output", "whole.jsonl") == 0
    assert found != [row["completions"] for row in rows_of("whole.jsonl")]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(talkative_model, dtype="float32", quantization_config=settings)
    model.dequantize().save_pretrained("dequantized")
    AutoTokenizer.from_pretrained(talkative_model).save_pretrained("dequantized")
    assert generate("--max_new_tokens", 24, "--output", "like.jsonl", "--model_name_or_path", "dequantized") == 0
    assert found == [row["completions"] for row in rows_of("like.jsonl")]


def test_servers_are_not_told_to_quantize(generate, server, capsys):
    assert generate("--load_in_4bit", "--server_urls", server().url) == 2
    assert "servers have options of their own" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_dtype(generate, calls, dtype):
    assert generate("--generation_dtype", dtype) == 0
    assert {kind for _, kind in calls} == {getattr(torch, dtype)}


def test_a_cpu_samples_in_what_it_has_whatever_the_gpu_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert generation_dtype("auto", device_of(use_cpu=True)) == torch.float32


@pytest.mark.parametrize("flags, said", [(["--dtype", "float32"], "generation_dtype"), (["--use_peft"], "its folder")])
def test_options_of_a_training_are_not_taken_where_nothing_is_trained(generate, capsys, flags, said):
    assert generate(*flags) == 2
    error = capsys.readouterr().err
    assert flags[0].removeprefix("--") in error and said in error
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help-all"])
    listed = capsys.readouterr().out
    assert "--generation_dtype" in listed and "--dtype" not in listed and "lora" not in listed


def test_bfloat16_that_a_gpu_only_emulates_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert generation_dtype("auto", torch.device("cuda")) == torch.float16


@pytest.fixture
def templates(monkeypatch):
    """Arguments of each call of a chat template."""
    seen = []
    render = PreTrainedTokenizerBase.apply_chat_template

    def spy(self, conversation, **kwargs):
        seen.append(kwargs)
        return render(self, conversation, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", spy)
    return seen


@pytest.mark.slow
def test_eval_temperature_and_chat_template_kwargs(project, templates):
    # So low that all samples of a prompt are the most likely one. Training prompts are sampled at 1
    options = {"chat_template_kwargs": {"shout": True}}
    change_options(project, eval_temperature=0.001, num_iterations=1, monitor_evals=0, **options)
    assert larpo_run() == 0
    assert {kwargs.get("shout") for kwargs in templates} == {True}, "in sampling, training and evaluation"
    assert any(kwargs.get("add_generation_prompt") for kwargs in templates) and len(templates) > 30
    for path in ("iteration_0/held_out.jsonl", "iteration_1/held_out.jsonl"):
        rows = rows_of(project / "out" / path)
        assert all(row["completions"][0] == row["completions"][1] for row in rows)
        assert {about["temperature"] for row in rows for about in row["candidates"]} == {0.001}
    rows = rows_of(project / "out/iteration_1/samples.jsonl")
    assert all(len({str(completion) for completion in row["completions"]}) > 1 for row in rows)
    assert {about["temperature"] for row in rows for about in row["candidates"]} == {1.0}


# Servers


def test_servers_are_told_the_arguments_of_the_chat_template(generate, server):
    fake = server()
    assert generate("--server_urls", fake.url, "--chat_template_kwargs", '{"shout": true}') == 0
    assert {str(asked["chat_template_kwargs"]) for asked in fake.requests} == {"{'shout': True}"}
    assert generate("--output", "other.jsonl", "--server_urls", fake.url) == 0
    assert "chat_template_kwargs" not in fake.requests[-1]


def test_arguments_of_the_chat_template_are_json_in_a_flag(generate, capsys):
    assert generate("--chat_template_kwargs", "shout=true") == 2
    assert "`chat_template_kwargs` is 'shout=true'; as a flag it is written in JSON" in capsys.readouterr().err


@pytest.mark.parametrize("flags, name", [([], "fake"), (["--server_model", "my-name"], "my-name")])
def test_server_model(generate, server, flags, name):
    running = server()
    assert generate("--server_urls", running.url, *flags) == 0
    assert {asked["model"] for asked in running.requests} == {name}


def test_server_api_key_variable(generate, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    running = server()
    assert generate("--server_urls", running.url, "--server_api_key_variable", "MY_KEY") == 0
    assert {asked["key"] for asked in running.requests} == {"Bearer sk-mine"}


@pytest.mark.slow
def test_server_timeout(generate, server):
    running = server("stalls")
    assert generate("--server_urls", running.url, "--server_timeout", 0.5) == 0
    assert len(running.requests) == 4 + 1  # the first one was given up and asked again
    assert len(rows_of("samples.jsonl")) == 4


@pytest.mark.slow
def test_server_health_route(generate, at_most_a_minute):
    pytest.importorskip("openai")
    command = ["--server_command", f"{FAKE_SERVER} --fault slow_start", "--server_start_timeout", 30]
    assert generate(*command, "--server_health_route", "/v1/models") == 0  # /health is never ready


@pytest.mark.slow
def test_samples_of_two_files_in_a_folder_do_not_take_their_servers_from_each_other(generate, monkeypatch):
    pytest.importorskip("openai")
    statuses = []

    class Sampler(PolicySampler):
        def close(self):  # while its servers are there
            if self.log_folder.name.startswith("samples"):
                [[pid, _]] = read_json(self.log_folder / "servers.json")
                assert generate("--server_command", FAKE_SERVER, "--output", "other.jsonl") == 0
                statuses.append(psutil.Process(pid).status())
            super().close()

    monkeypatch.setattr(commands, "PolicySampler", Sampler)
    assert generate("--server_command", FAKE_SERVER) == 0
    [status] = statuses
    assert status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    assert len(rows_of("samples.jsonl")) == len(rows_of("other.jsonl")) == 4


@pytest.mark.slow
def test_server_start_timeout(generate, capsys, at_most_a_minute):
    pytest.importorskip("openai")
    assert generate("--server_command", f"{FAKE_SERVER} --fault slow_start", "--server_start_timeout", 2) == 2
    assert "The server was not ready after 2 s" in capsys.readouterr().err


# Rewards


def reward(folder, completions, *flags, prompt="why", name="samples"):
    """Rewards of the completions of one prompt, from `larpo reward`."""
    row = {"prompt": prompt, "responses": completions, "rewards": [0.0] * len(completions)}
    (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = ["--samples", f"{name}.jsonl", "--output", f"{name}-rewarded.jsonl"]
    assert cli.main(["reward", *files, "--use_cpu", *map(str, flags)]) == 0
    [row] = rows_of(folder / f"{name}-rewarded.jsonl")
    assert row["completions"] == completions
    return row["rewards"]


def test_normalize_rewards(project):
    with open(project / "run_rewards.py", "a") as file:
        file.write("def length(prompts, completions, **columns):\n    return [100.0 * len(x) for x in completions]\n")
    texts = ["aeiou", "bcd fgh jk", "a", "xyz oo"]
    flags = ["--reward_funcs", "run_rewards:length", "run_rewards:vowels", "--reward_weights", 1, -2]
    lengths = [100.0 * len(text) for text in texts]
    vowels = [sum(letter in "aeiou" for letter in text) / 10 for text in texts]
    assert reward(project, texts, *flags) == pytest.approx([a - 2 * b for a, b in zip(lengths, vowels, strict=True)])

    def normalized(values):
        return [(value - statistics.fmean(values)) / statistics.pstdev(values) for value in values]

    expected = [a - 2 * b for a, b in zip(normalized(lengths), normalized(vowels), strict=True)]
    found = reward(project, texts, *flags, "--normalize_rewards", "true", name="normalized")
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def reward_model(tmp_path):
    return save_small_reward_model(tmp_path / "reward-model")


def test_reward_batch_size(project, reward_model, calls):
    texts = [f"{'long ' * i}text {i}" for i in range(7)]
    flags = ["--reward_funcs", reward_model]
    whole = reward(project, texts, *flags, "--reward_batch_size", 7)
    assert [size for size, _ in calls][-1] == 7
    parts = reward(project, texts, *flags, "--reward_batch_size", 3, name="parts")
    assert [size for size, _ in calls][-3:] == [3, 3, 1]
    assert parts == pytest.approx(whole, abs=1e-5)


def test_reward_max_length(project, reward_model):
    # The start is cut off: what is left of every completion is the same six letters
    texts = [f"{start}x" for start in ("a", "bcd", "efghijk", "lmnopqrstuv")]
    endings = [text + "  six" for text in texts]
    flags = ["--reward_funcs", reward_model]
    free = reward(project, endings, *flags)
    cut = reward(project, endings, *flags, "--reward_max_length", 3, name="cut")
    assert all(a != pytest.approx(b, abs=1e-4) for a, b in itertools.pairwise(free))
    assert cut == pytest.approx([cut[0]] * 4, abs=1e-5)
    assert reward(project, endings, *flags, "--reward_max_length", 500, name="enough") == pytest.approx(free, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_reward_dtype(project, reward_model, calls, dtype):
    reward(project, ["yes", "no, never"], "--reward_funcs", reward_model, "--reward_dtype", dtype)
    assert {kind for _, kind in calls} == {torch.float32 if dtype == "auto" else getattr(torch, dtype)}
