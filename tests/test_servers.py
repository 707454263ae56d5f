"""Sampling from OpenAI-compatible servers: what comes back is checked, and servers may fail."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import fake_server
import lanes
import psutil
import pytest
from fake_server import BAD_ANSWERS, FakeServer

from trl_larpo import ConfigError, LarPOError
from trl_larpo.generation import server_client as servers
from trl_larpo.generation.server_client import Sampler, request_seed
from trl_larpo.generation.server_endpoint import Endpoint, Request
from trl_larpo.generation.server_process import check_url, running_servers, server_command, stop_leftovers
from trl_larpo.generation.server_queue import RequestQueue
from trl_larpo.lifetime import Stopped

pytest.importorskip("openai")

SCRIPT = Path(__file__).with_name("fake_server.py")
COMMAND = f"{sys.executable} {SCRIPT} --port {{port}} {{model}}"


@pytest.fixture
def fake():
    """Starts servers that end with the test."""
    started = []

    def start(fault=None, **options):
        started.append(FakeServer(fault=fault, **options).start())
        return started[-1]

    yield start
    for server in started:
        server.close()


def hurry(monkeypatch):
    """Servers that failed are asked again soon."""
    monkeypatch.setattr(servers, "_FIRST_WAIT", 0.01)


def sample(urls, num_requests=6, temperatures=(1.0,) * 4, chat=True, poison=(), failures=None, prompts=None, **options):
    """Samples by the key of their request. Those in `poison` say so; `failures` takes what is set aside."""
    settings = {"max_new_tokens": 20, "top_p": 0.9, "end_ids": [2], "count_tokens": lambda text: len(text.split())}
    settings |= {"model_path": "fake", "must_offer": False, "requests_in_flight": 3}
    known = Request("known", "prompt 0", list(temperatures), [1, 2, 3], 7) if options.pop("known", False) else None
    num_tolerated = options.pop("num_tolerated", 0)
    sampler = Sampler([server.url for server in urls], None, **(settings | options))
    results = {}
    requests = [
        Request(
            key=str(i),
            prompt=[{"role": "user", "content": text}] if chat else text,
            temperatures=list(temperatures),
            prompt_ids=[1, 2, 3],
            seed=100 * i,
        )
        for i in range(num_requests)
        for text in [prompts[i] if prompts else f"poison {i}" if i in poison else f"prompt {i}"]
    ]
    failures = {} if failures is None else failures
    try:
        sampler.sample(
            requests,
            lambda request, samples: results.setdefault(request.key, samples),
            lambda request, reason: failures.setdefault(request.key, reason),
            known=known,
            num_tolerated=num_tolerated,
        )
    except LarPOError as error:
        error.results = results
        raise
    return results


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_every_request_is_answered_with_distinct_samples(fake, chat):
    server = fake()
    results = sample([server], chat=chat, temperatures=(1.0, 1.0, 1.0, 0.5, 0.5))
    assert sorted(results) == [str(i) for i in range(6)]
    assert all(len(samples) == 5 and len({x.text for x in samples}) > 1 for samples in results.values())
    assert {x.finished for samples in results.values() for x in samples} == {True, False}  # "length" is cut off
    assert all(x.num_tokens == 6 + x.finished for samples in results.values() for x in samples)
    assert {(x["temperature"], x["n"]) for x in server.requests} == {(1.0, 3), (0.5, 2)}
    assert {(x["model"], x["top_p"], x["max_tokens"]) for x in server.requests} == {("fake", 0.9, 20)}
    assert results == sample([server], chat=chat, temperatures=(1.0, 1.0, 1.0, 0.5, 0.5))  # seeds are sent


def test_what_a_model_may_set_is_sent(fake):
    """vLLM draws with the model's top_k and the like unless told otherwise: the next model's may differ."""
    server = fake()
    sample([server])
    names = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    assert {tuple(asked[name] for name in names) for asked in server.requests} == {(-1, 0.0, 1.0, 0.0, 0.0)}


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_a_server_that_knows_no_such_settings_is_asked_without_and_named(fake, caplog, chat):
    server = fake("strict")
    with caplog.at_level(logging.WARNING, logger="trl_larpo.generation"):
        assert len(sample([server], num_requests=30, chat=chat)) == 30
    assert len(server.requests) <= 30 + 3  # those in flight when it was not known yet
    assert caplog.text.count("The servers refuse top_k, min_p, repetition_penalty, return_token_ids: they draw") == 1


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_tokens_of_servers_are_kept(fake, chat):
    results = sample([fake(token_ids=lambda text: [len(word) for word in text.split()])], chat=chat)
    for each in (x for samples in results.values() for x in samples):
        assert each.token_ids == [len(word) for word in each.text.split()] and each.num_tokens == len(each.token_ids)
    assert all(x.token_ids is None for samples in sample([fake()], chat=chat).values() for x in samples)


def test_no_sample_of_a_prompt_has_the_seed_of_another():
    """Servers draw sample i with seed + i: neighbouring seeds in two iterations would give the same samples."""
    keys = ("1", "2", "12", "21", "held out")
    starts = sorted(request_seed(seed, key, "a prompt") for seed in (1, 2) for key in keys)
    assert min(b - a for a, b in pairwise(starts)) > 10_000
    assert starts[0] >= 0 and starts[-1] < 2**30


def test_missing_choices_are_asked_for_one_by_one(fake):
    results = sample([fake("ignores_n")])
    assert all(len({x.text for x in samples}) == 4 for samples in results.values())


def test_a_server_that_decodes_greedily_is_told_to_sample(fake):
    server = fake("greedy")
    results = sample([server])
    assert all(len({x.text for x in samples}) == 4 for samples in results.values())
    told = [json.loads(x["generation_config"]) for x in server.requests if "generation_config" in x]
    assert told[0] == {
        "do_sample": True, "top_k": 0, "eos_token_id": [2], "temperature": 1.0, "max_new_tokens": 20, "top_p": 0.9
    }  # fmt: skip


def test_identical_samples_are_reported_once(fake, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_larpo.generation"):
        results = sample([fake("always_greedy")])
    assert all(len({x.text for x in samples}) == 1 for samples in results.values())
    warnings = [record.message for record in caplog.records if "Identical samples" in record.message]
    assert len(warnings) == 1 and "at temperature 1.0 a server returned the same completion 4 times" in warnings[0]


def test_a_server_that_is_known_to_sample_is_not_asked_to_when_it_is_certain(fake, caplog):
    server = fake("certain")
    prompts = ["same 1", "a", "b", "same 2", "c", "same 3", "d", "same 4"]
    with caplog.at_level(logging.INFO, logger="trl_larpo.generation"):
        results = sample([server], num_requests=8, prompts=prompts, requests_in_flight=1)
    assert [len({x.text for x in results[str(i)]}) == 1 for i in range(8)] == ["same" in x for x in prompts]
    counts = Counter(asked["messages"][0]["content"] for asked in server.requests)
    assert counts == dict.fromkeys(prompts, 1) | {"same 1": 4, "same 2": 4}
    assert caplog.text.count("asking it to sample") == 1


def test_that_a_server_is_asked_to_sample_is_told_once(fake, caplog):
    servers = [fake("greedy"), fake("greedy")]
    with caplog.at_level(logging.INFO, logger="trl_larpo.generation"):
        sample(servers, num_requests=40, requests_in_flight=8)
    assert [caplog.text.count(f"{server.url} returns the same completion") for server in servers] == [1, 1]


def test_another_prompt_than_in_training_is_reported(fake, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_larpo.generation"):
        sample([fake(prompt_tokens=3)])
        assert not caplog.records
        sample([fake(prompt_tokens=4)])
    assert "The servers see another prompt than training: 4 tokens instead of 3." in caplog.text


def test_busy_servers_are_asked_again(fake, monkeypatch):
    hurry(monkeypatch)
    assert len(sample([fake("busy")], num_requests=8)) == 8


@pytest.mark.slow
def test_servers_that_answer_nothing_are_no_fault_of_the_prompts(fake, monkeypatch):
    hurry(monkeypatch)
    with pytest.raises(LarPOError, match=r"answered none of the first 6 .* refuses it \(status 400\): .*max_tokens is"):
        sample([fake("refuses")])
    with pytest.raises(LarPOError, match=r"answered none of the first 20 .* returned no completion"):
        sample([fake("empty")], num_requests=200)
    with pytest.raises(LarPOError, match=r"No server answers any more .* it offers no model"):
        sample([fake("no_model")], patience=0.1)


@pytest.mark.slow
def test_a_server_that_turns_bad_is_given_up_before_it_is_asked_everything(fake, monkeypatch):
    hurry(monkeypatch)
    server, failures = fake("turns_bad"), {}
    with pytest.raises(LarPOError, match=r"No server answers any more .* it returned no completion"):
        sample([server], num_requests=500, patience=0.1, failures=failures)
    assert not failures and len(server.requests) < 100


@pytest.mark.parametrize("chat", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["chat", "text"])
@pytest.mark.parametrize("fault", lanes.some_are_fast(BAD_ANSWERS, {"error 500", "half an answer", "error with 200"}))
def test_one_bad_prompt_is_set_aside_and_named(fake, monkeypatch, fault, chat):
    hurry(monkeypatch)
    failures, urls = {}, [fake(fault), fake(fault)]
    results = sample(urls, num_requests=20, poison=(3, 11), failures=failures, chat=chat)
    assert sorted(results) == sorted(str(i) for i in range(20) if i not in (3, 11)) and sorted(failures) == ["11", "3"]
    status = BAD_ANSWERS[fault][0]
    expected = "refuses it (status 400)" if status == 400 else "fails on it" + f" (status {status})" * (status != 200)
    assert all(reason.startswith("The server http://") and expected in reason for reason in failures.values()), failures
    tries = [sum("poison 3" in str(asked) for asked in server.requests) for server in urls]
    # One more, without some settings, where it is among the first: the server may refuse these
    assert sum(tries) in ((2, 3, 4) if status == 400 else (8,))


def test_bad_prompts_that_come_first_or_are_left_do_not_look_like_bad_servers(fake):
    server, failures = fake("refusal"), {}
    results = sample([server], num_requests=30, poison=range(25), failures=failures, num_tolerated=26)
    assert len(results) == 5 and len(failures) == 25
    again: dict[str, str] = {}
    assert sample([server], 25, poison=range(25), failures=again, known=True) == {}
    assert again.keys() == failures.keys()
    with pytest.raises(LarPOError, match="The servers answered none of the first 20 requests"):
        sample([server], num_requests=30, poison=range(30))


def test_many_prompts_that_take_too_long_are_set_aside(fake, monkeypatch):
    hurry(monkeypatch)
    server, failures = fake("time-out"), {}
    assert len(sample([server], 30, poison=range(25), failures=failures, known=True)) == 5
    assert len(failures) == 25


@pytest.mark.parametrize("num_requests", [13, 25, 60])
@pytest.mark.parametrize("num_servers", [1, 2])
def test_a_server_that_turns_bad_near_the_end_sets_nothing_aside(fake, monkeypatch, num_requests, num_servers):
    hurry(monkeypatch)
    failures, servers = {}, [fake("turns_bad") for _ in range(num_servers)]
    with pytest.raises(LarPOError, match="No server answers any more") as caught:
        sample(servers, num_servers * num_requests, failures=failures, num_tolerated=100, patience=0.1)
    assert not failures and 0 < len(caught.value.results) <= 10 * num_servers


def test_a_server_that_fails_beside_one_that_takes_its_time_is_given_up(fake, monkeypatch):
    hurry(monkeypatch)
    failures, good, complete = {}, fake(), Endpoint.complete

    async def slowly(self, *arguments, **named):
        if self.url == good.url:
            await asyncio.sleep(0.2)
        return await complete(self, *arguments, **named)

    monkeypatch.setattr(Endpoint, "complete", slowly)
    assert len(sample([fake("refuses"), good], 60, failures=failures, requests_in_flight=30, patience=0.1)) == 60
    assert not failures


def test_a_server_that_hangs_is_asked_once_whether_it_answers_others(fake, monkeypatch):
    hurry(monkeypatch)
    asked, complete = [], Endpoint.complete

    async def hangs(self, request, *arguments, **named):
        asked.append(request.key)
        if len(asked) > 40:
            await asyncio.sleep(0.3)
            raise TimeoutError("no answer")
        return await complete(self, request, *arguments, **named)

    monkeypatch.setattr(Endpoint, "complete", hangs)
    with pytest.raises(LarPOError, match="No server answers any more"):
        sample([fake()], 300, requests_in_flight=32, patience=0.2)
    assert sum(key in asked[:40] for key in asked[40:]) == 1 and len(asked) < 200


def test_a_server_that_refuses_words_of_others_is_not_asked_with_them_again(fake, caplog):
    server = fake("strict")
    results = sample([server], num_requests=4, prompts=["same", "same", "a", "b"], requests_in_flight=1)
    texts = {key: len({x.text for x in samples}) for key, samples in results.items()}
    assert texts["0"] == texts["1"] == 1 < min(texts["2"], texts["3"]) and "Identical samples" in caplog.text
    assert sample([server], num_requests=1, prompts=["same"]).keys() == {"0"}


def test_what_one_server_refuses_another_one_answers(fake, monkeypatch):
    hurry(monkeypatch)
    failures, urls = {}, [fake("refusal"), fake()]
    results = sample(urls, num_requests=40, poison=tuple(range(1, 40, 2)), failures=failures)
    assert len(results) == 40 and not failures


def fails_on_poison(fail):
    """What a fake server does first: fail in some way on each prompt with the word "poison"."""

    def first(handler, prompt):
        if "poison" in prompt:
            fail(handler)
        return "poison" in prompt

    return first


def hang_up(handler):
    handler.close_connection = True


def send_half(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", "cho')
    handler.close_connection = True


def send_broken_gzip(handler):
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", "5")
    handler.end_headers()
    handler.wfile.write(b"abcde")


def refuse(handler, status=400):
    handler.send_text(status, "application/json", '{"error": {"message": "not this one"}}')


@pytest.mark.parametrize("fail", [hang_up, send_half, send_broken_gzip])
def test_a_prompt_at_which_the_connection_breaks_is_set_aside(fake, monkeypatch, fail):
    hurry(monkeypatch)
    failures = {}
    assert len(sample([fake(first=fails_on_poison(fail))], 20, poison=[3], failures=failures, patience=0.1)) == 19
    assert failures.keys() == {"3"} and "Connection error (" in failures["3"]


def choices(**fields):
    """A body with two such choices, for conversations."""
    message = {"role": "assistant", "content": fields.pop("content", "a")} | fields.pop("message", {})
    return json.dumps({"id": "1", "choices": [{"finish_reason": "stop", "message": message} | fields] * 2})


@pytest.mark.parametrize(
    "body",
    [
        *(choices(content=content) for content in (3, ["a"], [{"type": "text", "text": "a"}], "half \ud800")),
        *(choices(token_ids=ids) for ids in (7, "7", ["7"])),
        *(choices(prompt_token_ids=ids) for ids in (7, ["7"])),
        choices(finish_reason="abort"),
        choices(message={"content": None}, finish_reason="error"),
        *('[]', '"a"', "3", "null", "", '{"choices": [null]}', '{"choices": ["a"]}'),
    ],
)  # fmt: skip
def test_an_answer_of_another_form_is_no_sample(fake, monkeypatch, body):
    hurry(monkeypatch)
    failures = {}
    first = fails_on_poison(lambda handler: handler.send_text(200, "application/json", body))
    assert len(sample([fake(first=first)], 10, poison=[3], failures=failures)) == 9
    assert failures.keys() == {"3"}


@pytest.mark.parametrize("usage", ["none", {"completion_tokens": "many", "prompt_tokens": []}])
def test_numbers_of_tokens_that_are_none_are_counted(fake, usage):
    body = json.dumps(json.loads(choices()) | {"usage": usage})
    first = fails_on_poison(lambda handler: handler.send_text(200, "application/json", body))
    found = sample([fake(first=first)], 1, poison=[0], temperatures=(0.0, 0.0))
    assert [x.num_tokens for x in found["0"]] == [2, 2]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_server_that_takes_thoughts_away_is_named(fake, field):
    body = choices(message={"content": None, field: "the user wants ..."})
    with pytest.raises(LarPOError, match="reasoning parser"):
        sample([fake(first=lambda handler, prompt: handler.send_text(200, "application/json", body) is None)])


@pytest.mark.parametrize("offers", [None, [3], [{"name": "a"}], "a"])
def test_a_server_that_lists_no_models_is_named(fake, monkeypatch, offers):
    hurry(monkeypatch)
    page = "<html>Welcome</html>" if offers is None else json.dumps({"object": "list", "data": offers})
    server = fake()
    server.lists = ("text/html" if offers is None else "application/json", page)
    with pytest.raises(LarPOError, match=r"No server answers any more .* it offers no model"):
        sample([server], patience=0.05)


def test_a_list_of_models_that_drips_has_a_limit(fake, monkeypatch):
    hurry(monkeypatch)
    server = fake()
    server.lists = None
    with pytest.raises(LarPOError, match=r"No server answers any more .* no answer in 0.2 s \(`server_timeout`\)"):
        sample([server], timeout=0.2, patience=0.05)


def test_keys_are_checked_and_not_shown(fake, monkeypatch):
    def refuse_key(handler, prompt):
        status = 401 if "poison" in prompt else 500
        text = json.dumps(
            {"error": {"message": f"{handler.headers['Authorization'].split()[1]} is no key, token=abcdef"}}
        )
        handler.send_text(status, "application/json", text)
        return True

    hurry(monkeypatch)
    monkeypatch.setenv("MY_KEY", " my-own-key-of-the-servers\n")
    server, failures = fake(), {}
    sample([server], api_key_variable="MY_KEY")
    assert {x["key"] for x in server.requests} == {"Bearer my-own-key-of-the-servers"}
    check_url(server.url, "MY_KEY")
    for poison in ([0, 1, 2, 3, 4, 5], []):
        with pytest.raises(LarPOError, match=r"<hidden> is no key, token=<hidden>") as caught:
            sample([fake(first=refuse_key)], api_key_variable="MY_KEY", poison=poison, patience=0.1)
        assert "my-own" not in str(caught.value)
    first = lambda handler, prompt: "poison" in prompt and refuse_key(handler, prompt)  # noqa: E731
    sample([fake(first=first)], poison=[5], failures=failures, api_key_variable="MY_KEY")
    assert "<hidden> is no key, token=<hidden>" in failures["5"]
    for key in ("my-kéy", "my\nkey"):
        monkeypatch.setenv("MY_KEY", key)
        with pytest.raises(ConfigError, match="The environment variable MY_KEY holds a line break or") as caught:
            check_url(server.url, "MY_KEY")
        assert key not in str(caught.value)


@pytest.mark.parametrize("poison", [[0], range(10, 20)], ids=["first", "last"])
@pytest.mark.parametrize("status", [401, 403, 404])
def test_prompts_that_are_forbidden_do_not_end_a_server(fake, monkeypatch, status, poison):
    hurry(monkeypatch)
    failures, server = {}, fake(first=fails_on_poison(lambda handler: refuse(handler, status)))
    found = sample([server], 20, poison=poison, failures=failures, requests_in_flight=1, patience=0.1)
    assert len(found) == 20 - len(poison) and failures.keys() == {str(i) for i in poison}
    assert all(f"refuses it (status {status}): " in reason for reason in failures.values())


@pytest.mark.parametrize("status", [500, 503])
def test_servers_may_fail_before_their_first_answer(fake, monkeypatch, status):
    """For as long as `patience`: they may be loading, or have too much to do."""
    hurry(monkeypatch)
    left = list(range(60))

    def first(handler, prompt):
        if is_early := bool(left):
            left.pop()
            refuse(handler, status)
        return is_early

    failures = {}
    assert len(sample([fake(first=first)], 30, failures=failures, requests_in_flight=8)) == 30 and not failures


def test_a_prompt_is_not_at_fault_if_the_server_is_busy(fake, monkeypatch):
    monkeypatch.setattr(servers, "_FIRST_WAIT", 0.001)
    left, failures = list(range(12)), {}

    def first(handler, prompt):
        if is_busy := "poison" in prompt and bool(left):
            left.pop()
            refuse(handler, 503)
        return is_busy

    assert len(sample([fake(first=first)], 20, poison=[1], failures=failures)) == 20 and not failures


def test_a_server_that_is_busy_for_too_long_is_given_up(fake, monkeypatch):
    hurry(monkeypatch)
    failures = {}
    with pytest.raises(LarPOError, match=r"No server answers any more .*not this one"):
        sample([fake(first=lambda handler, prompt: refuse(handler, 503) is None)], failures=failures, patience=0.2)
    assert not failures


def test_a_prompt_is_set_aside_after_all_servers_were_asked(fake, monkeypatch):
    hurry(monkeypatch)
    failures, poison = {}, range(0, 60, 2)
    assert len(sample([fake("refusal"), fake("refusal"), fake()], 60, poison=poison, failures=failures)) == 60
    assert not failures


def test_whether_a_server_answers_others_is_seen_by_one_completion(fake, monkeypatch):
    """Less often, while it refuses prompts and answers others each time."""
    hurry(monkeypatch)
    server, failures = fake("refusal"), {}
    sample([server], 60, poison=range(60), failures=failures, known=True, requests_in_flight=1)
    checks = [asked.get("n", 1) for asked in server.requests if "prompt 0" in str(asked)]
    assert len(failures) == 60 and set(checks) == {1} and len(checks) <= 4


def test_an_answer_to_an_earlier_request_does_not_show_that_a_prompt_is_at_fault(fake, monkeypatch):
    """It may have been worked out before the server turned bad."""
    hurry(monkeypatch)
    refused, asked = threading.Semaphore(0), []

    def first(handler, prompt):
        is_early = "chat" in handler.path and "prompt 0" in prompt and not asked
        if is_early:
            asked.append(prompt)
            for _ in range(4):  # two tries, each with settings beyond OpenAI's and without
                refused.acquire(timeout=1)
            time.sleep(0.1)  # until the client has read the refusals
        else:
            time.sleep(0 if "prompt 1" in prompt else 0.3)  # what was answered before is refused after the early answer
            refuse(handler)
            refused.release()
        return not is_early

    failures = {}
    with pytest.raises(LarPOError, match="No server answers any more") as caught:
        sample([fake(first=first)], 2, failures=failures, requests_in_flight=2, known=True, patience=0.1)
    assert caught.value.results.keys() == {"0"} and not failures


def test_a_server_that_is_given_up_meanwhile_leaves_no_request_in_doubt(fake, monkeypatch):
    hurry(monkeypatch)
    failures, second, check = {}, fake("refusal"), servers._Run._is_at_fault

    async def given_up_meanwhile(self, endpoint, *arguments):
        found = await check(self, endpoint, *arguments)
        if endpoint.url == second.url:  # the other one has refused it before
            self._give_up(endpoint)  # as another worker may
        return found

    monkeypatch.setattr(servers._Run, "_is_at_fault", given_up_meanwhile)
    assert len(sample([fake("refusal"), second], 20, poison=[0], failures=failures)) == 19
    assert failures.keys() == {"0"}


def test_a_server_that_was_given_up_is_used_again(fake, monkeypatch, caplog):
    hurry(monkeypatch)
    monkeypatch.setattr(servers, "_TIME_TO_REVIVE", 0.05)
    is_down, slow = [True], fake()

    def first(handler, prompt):
        if is_down:
            hang_up(handler)
        return bool(is_down)

    def on_slow(handler, prompt):
        if "is given up" in caplog.text:
            is_down.clear()
        time.sleep(0.02)

    slow.first, returning = on_slow, fake(first=first)
    assert len(sample([returning, slow], 100, patience=0.1)) == 100
    assert f"{returning.url} answers again." in caplog.text
    answered = [asked for asked in returning.requests if "prompt" in str(asked)]
    assert len(answered) > 40


def test_the_end_does_not_wait_for_servers_that_rest(fake, monkeypatch):
    async def rest(*_):
        await asyncio.sleep(5)
        raise AssertionError("it was waited for")

    monkeypatch.setattr(servers._Run, "_rest", rest)
    closed = fake()
    closed.close()
    assert len(sample([closed, fake()])) == 6


def test_servers_that_have_nothing_to_do_do_not_search_again_and_again(fake):
    class Watched(set):
        count = 0

        def __contains__(self, url):
            Watched.count += 1
            return super().__contains__(url)

    settings = SimpleNamespace(api_key_variable="NONE", model=None, timeout=1.0)
    endpoints = [Endpoint(settings, f"http://127.0.0.1:{port}/v1") for port in (1, 2)]
    waiting = [Request(str(i), "a", [1.0], [1], 0, failed_on=Watched([endpoints[0].url])) for i in range(100)]
    queue = RequestQueue(waiting, 8)
    assert [queue.next_for(endpoints[0], endpoints) for _ in range(50)] == [None] * 50 and Watched.count == 100
    queue.put(Request("new", "a", [1.0], [1], 0))
    assert queue.next_for(endpoints[0], endpoints).key == "new"
    endpoints[1].dead = True
    queue.changed()
    assert queue.next_for(endpoints[0], endpoints) is waiting[0]


@pytest.mark.slow
def test_bad_answers_at_random_lose_nothing(fake, monkeypatch):
    hurry(monkeypatch)
    failures = {}
    results = sample([fake("wild") for _ in range(3)], num_requests=100, failures=failures)
    assert len(results) == 100 and not failures


def test_a_wrong_key_ends_a_server_at_once(fake, monkeypatch):
    monkeypatch.setitem(BAD_ANSWERS, "no entry", (401, "application/json", '{"error": {"message": "wrong key"}}'))
    started = time.monotonic()
    with pytest.raises(LarPOError, match=r"No server answers any more .* wrong key"):
        sample([fake("no entry")], poison=range(6))
    assert len(sample([fake("no entry"), fake()], poison=range(6))) == 6
    assert time.monotonic() - started < 10


def test_servers_that_do_not_say_how_completions_end_are_reported(fake, caplog, monkeypatch):
    monkeypatch.setattr(fake_server, "_answer", lambda prompt, number: (f"{number} bees", None))
    with caplog.at_level(logging.WARNING, logger="trl_larpo.generation"):
        assert not any(x.finished for samples in sample([fake()]).values() for x in samples)
    assert caplog.text.count("`finish_reason` is missing") == 1


def test_a_server_that_dies_hands_its_requests_to_the_others(fake, monkeypatch):
    hurry(monkeypatch)
    dying, healthy = fake("dies"), fake()
    results = sample([dying, healthy], num_requests=20, patience=0.1)
    assert len(results) == 20 and len(dying.requests) > 3 and len(healthy.requests) >= 14


@pytest.mark.parametrize("in_group", [False, True], ids=["alone", "in a group"])
def test_a_signal_while_requests_are_in_flight_is_no_error_of_theirs(fake, caplog, monkeypatch, in_group):
    signals: list[BaseException] = [Stopped(signal.SIGTERM)]
    if in_group:  # of tasks, by which a library connects to a server
        signals = [BaseExceptionGroup("", [OSError(), BaseExceptionGroup("", signals)])]

    def stop(*_):
        if signals:
            raise signals.pop()

    monkeypatch.setattr(servers.Endpoint, "check_prompt", stop)
    with pytest.raises(Stopped):
        sample([fake()])
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_error_ends_the_sampling_although_answers_come(fake, monkeypatch):
    answered = []

    async def answer(self, request):
        with contextlib.suppress(asyncio.CancelledError):  # as libraries do whose answer is there already
            await asyncio.sleep(0.01)
        answered.append(request.key)
        if len(answered) == 5:
            raise RuntimeError("no power")
        return []

    monkeypatch.setattr(Endpoint, "all_samples", answer)
    with pytest.raises(RuntimeError, match="no power"):
        sample([fake()], num_requests=300, requests_in_flight=4)
    assert len(answered) < 50


def test_what_was_sampled_before_all_servers_died_is_kept(fake, monkeypatch):
    hurry(monkeypatch)
    with pytest.raises(LarPOError, match=r"No server answers any more .* prompts are left. Start the servers") as error:
        sample([fake("dies")], num_requests=20, patience=0.1)
    assert 1 <= len(error.value.results) <= 3


def test_the_key_goes_to_the_server_and_nowhere_else(fake, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server = fake()
    sample([server], api_key_variable="MY_KEY")
    assert {x["key"] for x in server.requests} == {"Bearer sk-secret"}


def test_servers_are_started_and_stopped_with_all_they_started(tmp_path):
    with running_servers(f"MARK={{index}} {COMMAND}", "the-model", 2, tmp_path) as started:
        assert len({server.url for server in started}) == 2
        for server in started:
            check_url(server.url, "NONE")
        pids = [pid for pid, _ in json.loads((tmp_path / "servers.json").read_text())]
        assert [psutil.Process(pid).environ()["MARK"] for pid in pids] == ["0", "1"]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not (tmp_path / "servers.json").exists()
    assert (tmp_path / "server_0.log").read_text() == "model the-model\n"  # kept


def test_what_a_server_that_has_ended_left_behind_is_stopped(tmp_path):
    """A worker of vLLM that outlives the server it belongs to holds the GPU."""
    script = tmp_path / "server.py"
    script.write_text(
        "import subprocess, sys\n"
        f"worker = subprocess.Popen([sys.executable, {str(SCRIPT)!r}, '--port', sys.argv[2]])\n"
        "print(worker.pid, flush=True)\n"
        "worker.wait()\n"
    )
    with running_servers(f"{sys.executable} {script} {{model}} {{port}}", "m", 1, tmp_path) as [server]:
        worker = int((tmp_path / "server_0.log").read_text().split()[0])
        server.process.kill()
        server.process.wait()
        assert psutil.pid_exists(worker)
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie"


def test_servers_that_a_killed_run_left_are_stopped_and_no_others(tmp_path):
    record = tmp_path / "servers.json"
    with running_servers(COMMAND, "m", 1, tmp_path):
        [[pid, start_time]] = json.loads(record.read_text())
        # The same process id, but of a process that began at another time: somebody else's
        other = tmp_path / "other.json"
        other.write_text(json.dumps([[pid, start_time - 1], [os.getpid(), 0.0]]))
        stop_leftovers(other)
        assert psutil.pid_exists(pid) and not other.exists()
        copy = tmp_path / "copy.json"
        copy.write_text(record.read_text())
        stop_leftovers(copy)
        deadline = time.monotonic() + 10
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


@pytest.mark.parametrize(
    "command, timeout, message",
    [
        (f"{COMMAND} --exit 3", 60.0, r"The server ended with status 3 before it was ready; see .*server_0.log"),
        (f"{COMMAND} --fault slow_start", 1.0, r"The server was not ready after 1 s"),
        ("./no-such-program {model} {port}", 1.0, "`server_command` cannot be started: "),
    ],
)
def test_servers_that_do_not_get_ready_are_named(tmp_path, command, timeout, message):
    with pytest.raises(LarPOError, match=message), running_servers(command, "m", 1, tmp_path, start_timeout=timeout):
        pass
    assert not (tmp_path / "servers.json").exists()


def test_commands_are_read_as_a_shell_would(monkeypatch):
    monkeypatch.setenv("PLACE", "/models")
    words, environment = server_command(
        "CUDA_VISIBLE_DEVICES={index} vllm serve $PLACE/{model} --port {port} --name 'a b'", model="m", port=80, index=1
    )
    assert words == ["vllm", "serve", "/models/m", "--port", "80", "--name", "a b"]
    assert environment == {"CUDA_VISIBLE_DEVICES": "1"}
    for command, message in (("vllm {model}", r"has no \{port\}"), ("x {model} {port} {y}", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            server_command(command, model="m", port=1, index=0)


def test_a_silent_address_is_named():
    with pytest.raises(ConfigError, match=r"`server_urls`: http://127.0.0.1:9/v1 does not answer"):
        check_url("http://127.0.0.1:9/v1", "NONE")
    with pytest.raises(ConfigError, match=r"`server_urls`: localhost does not answer \(unknown url type"):
        check_url("localhost", "NONE")


def test_an_address_that_drips_is_named():
    closing = threading.Event()

    def drip(listening):
        connection, _ = listening.accept()
        with contextlib.suppress(OSError), connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nDate: ")
            while not closing.wait(0.1):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
        stack.callback(closing.set)
        threading.Thread(target=drip, args=[listening], daemon=True).start()
        with pytest.raises(ConfigError, match=r"does not answer \(no answer in 0.5 s\)"):
            check_url(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "NONE", timeout=0.5)


@pytest.mark.slow
def test_a_server_that_drips_does_not_outlive_the_time_of_a_request(fake):
    server = fake("drips")
    results = sample([server], num_requests=2, timeout=1.0)
    assert len(results) == 2 and len(server.requests) == 3, "the first request was asked again"
    assert not server.dripped_to_the_end


def test_samples_from_this_machine_go_past_a_proxy(fake, monkeypatch):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert len(sample([fake()], num_requests=2, patience=0.1)) == 2
