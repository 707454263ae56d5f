"""`larpo run` with servers: started for each iteration's model, stopped by their own ids, and one of them may die."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fake_server import FakeServer
from small_run import change_options, larpo_run, rows_of, write_prompts

from trl_larpo import LarPOError
from trl_larpo.generation import model_servers, server_client
from trl_larpo.generation.options import GenerationOptions
from trl_larpo.generation.sampler import PolicySampler
from trl_larpo.generation.sampling_task import SampleKind, SamplingTask
from trl_larpo.prompts import Prompt
from trl_larpo.run.stages import STAGES

pytest.importorskip("openai")

pytestmark = pytest.mark.slow

FAKE = f"{sys.executable} {Path(__file__).with_name('fake_server.py')} --port {{port}} {{model}}"

OFFERS = ("fake", "out/iteration_1/model", "out/iteration_2/model")


def test_servers_of_each_iterations_model(project, talkative_model, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    change_options(project, server_command=FAKE, num_servers=2)
    assert larpo_run() == 0
    logs = [(project / f"out/servers/server_{i}.log").read_text().splitlines() for i in (0, 1)]
    # Held-out prompts and those of the next iteration are sampled with the same servers
    models = [talkative_model, "out/iteration_1/model", "out/iteration_2/model"]
    assert logs == [[f"model {model}" for model in models]] * 2
    rows = rows_of(project / "out/iteration_2/samples.jsonl")
    assert all(len(row["completions"]) == 4 for row in rows)
    assert not (project / "out/servers/servers.json").exists()
    assert not any("fake_server.py" in " ".join(process.cmdline()) for process in psutil.Process().children())
    for path in (project / "out").rglob("*"):
        assert not path.is_file() or b"very-secret" not in path.read_bytes(), path


STATES = {"": set(), "--vllm gpu_that_sleeps": {"asleep"}}


@pytest.mark.parametrize("kind", STATES)
def test_no_server_has_the_devices_when_a_reward_or_a_training_begins(project, monkeypatch, kind):
    found, num_iterations = {}, 2 if kind else 1

    def state(process):
        told = (project / "out/servers/server_0.log").read_text().splitlines()[-1]
        return "asleep" if told.startswith("/sleep") else "awake"

    def watched(stage):
        def function(context, iteration, path):
            servers = [x for x in psutil.Process().children() if "fake_server.py" in " ".join(x.cmdline())]
            found.setdefault((stage.name, iteration), {state(process) for process in servers})
            stage.function(context, iteration, path)

        return function

    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, replace(stage, function=watched(stage)))
    options = {"num_iterations": num_iterations, "monitor_evals": 0}
    change_options(project, server_command=f"{FAKE} {kind}", num_servers=2 if kind == "" else 1, **options)
    assert larpo_run() == 0
    assert found.pop(("held_out_samples", 0)) == set()
    for iteration in range(1, num_iterations + 1):
        assert found.pop(("generate", iteration)) == {"awake"}  # those that have sampled held-out prompts
        assert found.pop(("held_out_samples", iteration)) == STATES[kind]
    ended = [(name, num_iterations) for name in ("held_out", "evaluate")]
    assert [found.pop(key) for key in ended] == [set()] * 2, "nothing is sampled any more"
    assert len(found) == 2 + 4 * num_iterations + 2 * (num_iterations - 1)
    assert all(states == STATES[kind] for states in found.values()), found
    num_starts = (project / "out/servers/server_0.log").read_text().count("model ")
    assert num_starts == (1 if kind else 2)


def test_adapters_of_iterations_are_sampled_on_servers(project, talkative_model):
    pytest.importorskip("peft")
    flags = ["--use_peft", "--lora_r", 4, "--lora_target_modules", "q_proj", "v_proj", "--monitor_evals", 0]
    change_options(project, server_command=f"{FAKE} --vllm cpu")
    assert larpo_run(*flags) == 0
    told = (project / "out/servers/server_0.log").read_text().splitlines()
    adapters = [f"/v1/load_lora_adapter out/iteration_{i}/model" for i in (1, 2)]
    assert [line for line in told if "/load" in line] == adapters
    assert told.count(f"model {talkative_model}") == 1
    assert all(len(row["completions"]) == 4 for row in rows_of(project / "out/iteration_2/samples.jsonl"))


def test_a_run_whose_servers_are_gone_goes_on_with_others(project, capsys):
    dying = FakeServer(fault="dies").start()
    change_options(project, server_urls=[dying.url], server_patience=0.2, server_requests_in_flight=1)
    assert larpo_run() == 2
    assert "Start the servers and run the same command again; what was sampled so far is kept." in (
        capsys.readouterr().err
    )
    kept = rows_of(project / "out/iteration_0/held_out_samples.jsonl.partial-0")
    assert kept
    dying.close()
    healthy = FakeServer(offers=OFFERS).start()
    assert larpo_run("--server_urls", healthy.url) == 0
    samples = {row["prompt_id"]: row for row in rows_of(project / "out/iteration_0/held_out.jsonl")}
    assert all(samples[row["prompt_id"]]["completions"] == row["completions"] for row in kept)
    healthy.close()


def test_running_servers_are_given_each_model_by_hand(project, caplog, capsys):
    server = FakeServer().start()
    change_options(project, server_urls=[server.url], num_iterations=1, monitor_evals=0)
    assert larpo_run("--dry_run") == 0
    assert "is not given new weights" in capsys.readouterr().out
    assert larpo_run() == 2
    assert "The servers offer another name: fake is taken to be " in caplog.text
    assert f"{server.url} offers fake and not out/iteration_1/model" in capsys.readouterr().err
    assert (project / "out/iteration_1/model").exists() and not (project / "out/iteration_1/held_out.jsonl").exists()
    server.offers = ("fake", str(project / "out/iteration_1/model"))
    assert larpo_run() == 0
    assert {asked["model"] for asked in server.requests} == set(server.offers)
    assert larpo_run("--try", "4") == 0  # of which the new model is not sampled
    server.close()


@pytest.fixture
def sample_on_servers(project, talkative_model):
    """Samples prompts on servers that are started with a fault, into `samples.jsonl`."""

    def sample(texts, fault, **options):
        options = {"server_command": f"{FAKE} --fault {fault}", "server_patience": 0.2, "max_new_tokens": 8} | options
        task = SamplingTask([SampleKind("policy", 1.0)] * 2, talkative_model, 1, key="1")
        sampler = PolicySampler(GenerationOptions(**options), seed=0, log_folder=project / "servers", use_cpu=True)
        try:
            pools = sampler.sample([Prompt.of(text) for text in texts], task, project / "samples.jsonl")
            return [pool.prompt.text for pool in pools]
        finally:
            sampler.close()

    return sample


def test_what_servers_have_refused_is_no_longer_set_aside_once_it_is_sampled(sample_on_servers, project):
    aside = project / "samples.set_aside.jsonl"
    aside.write_text('{"prompt_id": "x", "prompt": "why is 1", "reason": "too long"}\n')
    assert sample_on_servers(["why is 0", "why is 1"], "", server_command=None) == ["why is 0", "why is 1"]
    assert not aside.exists()


def test_servers_that_end_while_they_sample_are_started_again(sample_on_servers, caplog):
    texts = [f"why is {i}" for i in range(12)]
    assert sample_on_servers(texts, "exits", server_requests_in_flight=1) == texts
    assert caplog.text.count("Servers have ended, and are started again") == 2


@pytest.mark.parametrize("failing", [2, 1])
def test_a_start_that_fails_is_tried_again_once_servers_have_started(
    sample_on_servers, project, monkeypatch, caplog, failing
):
    """As where the memory of a GPU is not free yet. If the first start fails, the command is probably wrong."""
    monkeypatch.setattr(model_servers, "_PAUSES", (0.1, 0.1))
    (project / "flaky.py").write_text(
        "import os, pathlib, sys\n"
        "count = pathlib.Path('count')\n"
        "count.write_text(count.read_text() + '.' if count.exists() else '.')\n"
        f"if len(count.read_text()) == {failing}: sys.exit(1)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = f"{sys.executable} flaky.py {FAKE.removeprefix(sys.executable)} --fault exits"
    texts = [f"why is {i}" for i in range(8)]
    if failing == 1:
        with pytest.raises(LarPOError, match="ended with status 1 before it was ready"):
            sample_on_servers(texts, "", server_command=command)
        return
    assert sample_on_servers(texts, "", server_command=command, server_requests_in_flight=1) == texts
    assert caplog.text.count("Servers have started before: trying again in 0.1 s") == 1


def test_servers_that_do_not_answer_any_more_are_started_again(sample_on_servers, project, monkeypatch, caplog):
    """Each answers three prompts. None of the others is at fault: they were asked for later."""
    monkeypatch.setattr(server_client, "_FIRST_WAIT", 0.01)
    texts = [f"why is {i}" for i in range(12)]
    assert sample_on_servers(texts, "dies", server_requests_in_flight=1) == texts
    assert caplog.text.count("Servers do not answer, and are started again") >= 3
    assert not (project / "samples.set_aside.jsonl").exists()


@pytest.mark.parametrize("num_servers", [1, 2])
def test_prompts_that_end_servers_are_set_aside(sample_on_servers, project, caplog, num_servers):
    """Each restart brings few of the others. It is not in vain, because it shows which prompts end servers."""
    texts, bad = [f"why is {i}" for i in range(40)], [f"poison {i}" for i in range(3)]
    found = sample_on_servers(
        [bad[0], *texts, *bad[1:]], "crashes", num_servers=num_servers, server_requests_in_flight=16
    )
    assert found == texts
    rows = rows_of(project / "samples.set_aside.jsonl")
    assert sorted(row["prompt"] for row in rows) == bad
    assert all("stopped answering each of the 3 times that it was asked for it" in row["reason"] for row in rows)
    assert caplog.text.count("Servers have ended") <= 3 * len(bad)


def test_servers_that_end_at_once_are_given_up(sample_on_servers, project, caplog):
    with pytest.raises(LarPOError, match="No server answers any more"):
        sample_on_servers([f"poison {i}" for i in range(60)], "crashes", server_requests_in_flight=4)
    assert caplog.text.count("Servers have ended") == 2 and not (project / "samples.set_aside.jsonl").exists()


def test_a_prompt_that_no_server_answers_is_set_aside_and_named(project, capsys):
    texts = [f"{i} why is the dog blue" for i in range(11)]
    write_prompts(project, [*texts, "poison <b>here</b>"])
    server = FakeServer(fault="refusal", offers=OFFERS).start()
    change_options(project, server_urls=[server.url], num_iterations=1)
    assert larpo_run() == 0
    printed = capsys.readouterr().out
    [path] = (project / "out/iteration_1").glob("*.set_aside.jsonl")
    [row] = rows_of(path)
    assert row["prompt"] == "poison <b>here</b>" and "the prompt is longer than the context" in row["reason"]
    name = path.name.removesuffix(".set_aside.jsonl")
    assert (
        f"Set aside in iteration 1 ({name}): 1 prompts, e.g. 'poison <b>here</b>': The server {server.url}" in printed
    )
    page = (project / "out/report.html").read_text()
    assert "<h2>Set aside</h2>" in page and "poison &lt;b&gt;here" in page
    assert larpo_run("--max_failed_share", 0, "--output_dir", "strict") == 2
    error = capsys.readouterr().err
    assert "1 of" in error and "prompts could not be sampled, more than `max_failed_share` allows" in error
    server.close()


def test_an_iteration_with_transformers_serve_of_which_one_dies(project):
    if shutil.which("transformers") is None or importlib.util.find_spec("fastapi") is None:
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    options = {
        "server_command": "OMP_NUM_THREADS=1 transformers serve {model} --port {port} --device cpu",
        "num_servers": 2,
        "server_patience": 2.0,
        "server_requests_in_flight": 1,
        "num_iterations": 1,
        "num_samples": 6,
        "max_new_tokens": 10,
    }
    change_options(project, **options)
    command = [sys.executable, "-m", "trl_larpo", "run", "--config", "it.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    half_way = project / "out/iteration_1/samples.jsonl.partial-0"
    deadline = time.monotonic() + 240
    while not half_way.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert half_way.exists(), process.communicate()[0]
    [[first, _], _] = json.loads((project / "out/servers/servers.json").read_text())
    for server in [*psutil.Process(first).children(recursive=True), psutil.Process(first)]:
        server.kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    rows = rows_of(project / "out/iteration_1/samples.jsonl")
    assert len(rows) == 6 and all(len(row["completions"]) == 6 for row in rows)
    texts = [[completion[0]["content"] for completion in row["completions"]] for row in rows]
    assert all(len(set(of_prompt)) > 3 for of_prompt in texts)  # it samples, though it must be told to
    assert {x["finished"] for row in rows for x in row["candidates"]} == {True, False}
    assert all(json.loads(line) for line in (project / "out/iteration_1/lists.jsonl").read_text().splitlines())
