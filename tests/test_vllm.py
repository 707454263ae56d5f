"""
The real vLLM, on a CPU: two iterations on servers of which one dies, and servers that take weights and adapters.

    .ci/vllm_environment FOLDER
    VLLM_ENVIRONMENT=FOLDER pytest -n 0 tests/test_vllm.py
"""

import contextlib
import json
import os
import string
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from small_run import larpo_run, rows_of, write_project, write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_larpo import LarPOError
from trl_larpo.generation.model_servers import ModelServers, has_tied_head
from trl_larpo.generation.options import GenerationOptions
from trl_larpo.generation.sampler import PolicySampler
from trl_larpo.generation.sampling_task import SampleKind, SamplingTask
from trl_larpo.prompts import Prompt
from trl_larpo.storage import read_json

pytestmark = pytest.mark.skipif("VLLM_ENVIRONMENT" not in os.environ, reason="needs the real vLLM")

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 "
    "VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 {vllm} serve {{model}} --port {{port}} --host 127.0.0.1 --dtype float32 "
    "--max-model-len 256 --max-num-seqs 8 --enforce-eager"
)
ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {} --enable-lora --max-lora-rank 8"

TOLERANCE = 1e-3
"""Nats by which log-probabilities of a token may differ between vLLM and transformers, in float32."""


@pytest.fixture(scope="module")
def command():
    return COMMAND.format(vllm=Path(os.environ["VLLM_ENVIRONMENT"]).absolute() / "bin" / "vllm")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Writes letters, and ends one answer in two within 24 of them. vLLM has no attention for the heads of `tiny`."""
    folder = tiny.save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=64, num_attention_heads=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        # One direction of the residual stream that every token has
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight *= 0.2
        model.lm_head.weight[tokenizer.convert_tokens_to_ids([*string.ascii_lowercase]), 0] = 8.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 8.5
    model.save_pretrained(folder)
    return folder


# The loop


@pytest.fixture(scope="module")
def finished_run(command, model, tmp_path_factory):
    """Two iterations, with a prompt that is too long. One of two servers is killed in the first. The folder, and what
    was printed."""
    folder = tmp_path_factory.mktemp("run")
    write_project(
        folder, model, server_command=command, num_servers=2, server_requests_in_flight=1, server_patience=2.0,
        max_failed_share=0.3, monitor_evals=0, memory="none", learning_rate=3e-3,
    )  # fmt: skip
    write_prompts(folder, [*(f"Tell a story about {i} dogs." for i in range(17)), "too long " * 35])
    ended, killed = threading.Event(), []
    killer = threading.Thread(target=_kill_half_way, args=[folder / "out", ended, killed], daemon=True)
    try:
        with contextlib.chdir(folder), open("printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
            killer.start()
            assert larpo_run("--seed", 1) == 0
    finally:
        ended.set()
        text = (folder / "printed.txt").read_text()
        print(text)  # pytest shows it where a test fails
    assert killed, "no server was killed"
    return folder / "out", text


def _kill_half_way(out, ended, killed):
    """Kills one of the servers when the first samples of the first iteration are there."""
    while not list(out.glob("iteration_1/samples.jsonl.partial-*")):
        if ended.wait(0.01):
            return
    (first, _), *_ = read_json(out / "servers/servers.json")
    server = psutil.Process(first)
    for process in [server, *server.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.append(server)


def test_the_other_server_goes_on_and_both_start_again(finished_run):
    out, printed = finished_run
    assert printed.count("Starting 2 server(s)") == 2, "at first, and after one of them died"
    assert "iteration_2/model into 2 running server(s)" in printed
    for iteration in (1, 2):
        assert all(len(row["completions"]) == 4 for row in rows_of(out / f"iteration_{iteration}/samples.jsonl"))


def test_no_random_numbers_come_twice(finished_run):
    """With those of another sample, one in four would begin with the same four letters, although the model changed."""
    out, _ = finished_run
    beginnings = [
        (str(row["prompt"]), completion[0]["content"][:4])
        for iteration in (1, 2)
        for row in rows_of(out / f"iteration_{iteration}/samples.jsonl")
        for completion in row["completions"]
        if len(completion[0]["content"]) >= 4
    ]
    assert len(beginnings) > 60 and len(set(beginnings)) == len(beginnings)


def test_tokens_are_kept_of_answers_that_were_cut_off(finished_run):
    out, _ = finished_run
    tokenizer = AutoTokenizer.from_pretrained(out / "iteration_1/model")
    kept = 0
    for row in rows_of(out / "iteration_1/samples.jsonl"):
        for completion, about in zip(row["completions"], row["candidates"], strict=True):
            if (ids := about.get("token_ids")) is None:
                assert about["finished"]
            else:
                kept += 1
                assert len(ids) == about["num_tokens"]
                # vLLM leaves out of a text what is no whole character
                text = tokenizer.decode(ids, skip_special_tokens=True)
                assert text.replace("\ufffd", "") == completion[0]["content"].replace("\ufffd", "")
    assert kept


def test_what_the_server_refuses_is_named(finished_run):
    out, _ = finished_run
    refused = [row for path in out.rglob("*.set_aside.jsonl") for row in rows_of(path)]
    assert refused and all("too long" in row["prompt"] for row in refused)
    assert all("maximum context length is 256 tokens" in row["reason"] for row in refused)


# Weights and adapters

PROMPTS = [[{"role": "user", "content": text}] for text in ("Name a colour.", "Write one sentence about bees.")]


def test_servers_that_take_weights_and_adapters_answer_as_those_that_start_with_them(
    command, model, finished_run, tmp_path
):
    peft = pytest.importorskip("peft")
    first, second, adapter = model, str(finished_run[0] / "iteration_2/model"), str(tmp_path / "adapter")
    assert not has_tied_head(first)
    tokenizer, trained = AutoTokenizer.from_pretrained(second), AutoModelForCausalLM.from_pretrained(second)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with_adapter = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(second), config)
    with_adapter.save_pretrained(adapter)

    options = GenerationOptions(server_command=ADAPTERS.format(command))
    stays, starts = (
        ModelServers(options, tmp_path / name, reload="always", with_adapters=True) for name in ("stays", "starts")
    )
    with contextlib.closing(stays), contextlib.closing(starts):
        with ThreadPoolExecutor(2) as pool:
            [_, ([started], _)] = pool.map(lambda servers, path: servers.serve(path), (stays, starts), (first, second))
        [url], name = stays.serve(first)
        before = _samples(url, name)
        stays.rest()
        [url], name = stays.serve(second)
        after = _samples(url, name)
        assert after == _samples(started, second) and after != before
        for address, known in ((url, name), (started, second)):
            _compare(address, known, trained, tokenizer, after)
        _check_that_its_model_is_known(started, second, first, tmp_path)

        [url], name = stays.serve(adapter)
        starts.serve(adapter)
        adapted = _samples(url, name)
        assert adapted == _samples(started, adapter) and adapted != after
        _compare(url, name, with_adapter, tokenizer, adapted)
        stays.rest()
        assert stays.serve(adapter) == ([url], name) and _samples(url, name) == adapted


def _check_that_its_model_is_known(url, path, other, folder):
    """A server that runs already is sampled for the model that it has, and for no other one of a run."""
    options = GenerationOptions(server_urls=[url], max_new_tokens=8)
    sampler = PolicySampler(options, seed=0, log_folder=folder, use_cpu=True)
    task = SamplingTask([SampleKind("policy", 1.0)] * 2, path, 1, key="1", is_trained=True)
    prompts = [Prompt.of(prompt) for prompt in PROMPTS]
    assert len(sampler.sample(prompts, task, folder / "known.jsonl")) == len(prompts)
    with pytest.raises(LarPOError, match="which the run has trained"):
        sampler.sample(prompts, replace(task, model_path=other), folder / "other.jsonl")


def _samples(url, name):
    """Tokens of a greedy answer and of three drawn ones to each prompt."""
    tokens = []
    for prompt in PROMPTS:
        for settings in ({"temperature": 0.0}, {"temperature": 1.0, "n": 3, "seed": 7}):
            asked = {"model": name, "messages": prompt, "max_tokens": 16, "return_token_ids": True, "top_k": -1}
            tokens.append([choice["token_ids"] for choice in _ask(f"{url}/chat/completions", asked | settings)])
    return tokens


def _compare(url, name, model, tokenizer, samples):
    """Log-probabilities of sampled tokens on the server and of the model."""
    for place, sampled in enumerate(samples):
        prompt = tokenizer.apply_chat_template(PROMPTS[place // 2], add_generation_prompt=True, return_dict=True)
        for ids in sampled:
            whole, start = prompt["input_ids"] + ids, len(prompt["input_ids"])
            asked = {"model": name, "prompt": whole, "max_tokens": 1, "prompt_logprobs": 0}
            [choice] = _ask(f"{url}/completions", asked)
            with torch.no_grad():
                logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            for i in range(start, len(whole)):
                on_server = choice["prompt_logprobs"][i][str(whole[i])]["logprob"]
                assert on_server == pytest.approx(logps[i - 1, whole[i]].item(), abs=TOLERANCE)


def _ask(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)["choices"]
