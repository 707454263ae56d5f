"""
The real vLLM, on a CPU: servers that stay, rest, and take weights and adapters.

    .ci/vllm_environment FOLDER
    VLLM_ENVIRONMENT=FOLDER pytest -n 0 tests/test_vllm.py
"""

import contextlib
import json
import os
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_larpo.generation.model_servers import ModelServers, has_tied_head
from trl_larpo.generation.options import GenerationOptions

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


PROMPTS = [[{"role": "user", "content": text}] for text in ("Name a colour.", "Write one sentence about bees.")]


def test_servers_that_take_weights_and_adapters_answer_as_those_that_start_with_them(command, tmp_path):
    peft = pytest.importorskip("peft")
    # vLLM has no attention for the heads of other tests' models
    first = tiny.save_tiny_model(tmp_path / "first", hidden_size=64, num_attention_heads=1)
    second, adapter = str(tmp_path / "second"), str(tmp_path / "adapter")
    tokenizer, model = AutoTokenizer.from_pretrained(first), AutoModelForCausalLM.from_pretrained(first)
    assert not has_tied_head(first)
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.3 * weights.std(correction=0) * torch.randn_like(weights))
    model.save_pretrained(second)
    tokenizer.save_pretrained(second)
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
            _compare(address, known, model, tokenizer, after)

        [url], name = stays.serve(adapter)
        starts.serve(adapter)
        adapted = _samples(url, name)
        assert adapted == _samples(started, adapter) and adapted != after
        _compare(url, name, with_adapter, tokenizer, adapted)
        stays.rest()
        assert stays.serve(adapter) == ([url], name) and _samples(url, name) == adapted


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
