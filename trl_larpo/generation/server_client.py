"""
Samples completions from servers that speak OpenAI's protocol: vLLM, SGLang, `transformers serve`, llama.cpp.

Several servers are used side by side with many requests in flight. What comes back is checked, because servers differ:
some return one completion however many are asked for, some sample greedily whatever the temperature, some render the
prompt in another way. A server that fails hands its requests to the others. A request that a server cannot answer while
it answers others is tried again later, elsewhere, and set aside after a few tries.
"""

import asyncio
import hashlib
import json
import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import LarPOError
from ..prompts import Content
from .in_process import Sample
from .urls import is_loopback

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two tries

_MAX_TRIES = 8  # of a request to servers that are well
_TRIES_OF = {"refused": 4, "timeout": 3}  # such a failure counts as so many tries

_BAD_SERVER = 20  # so many requests in a row that fail at their first try are no fault of the prompts

_MORE_SETTINGS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
"""
Beyond OpenAI's protocol. What is not said a server takes from the model's `generation_config.json`, so that samples of
one model would be drawn in another way than those of the next.
"""

_UNKNOWN_SETTING = (400, 422)  # what a server says to a setting that it does not know

_NEVER_AGAIN = (401, 403, 404)  # what a server says to a wrong key, model or address
_LATER = (408, 409, 425, 429)


@dataclass
class Request:
    """
    Completions asked for.

    Attributes:
        key: Name of the prompt.
        prompt: String or conversation.
        temperatures: One for each completion.
        prompt_ids: Tokens of the prompt as training sees them.
        seed: Of the first completion; the others' follow.
        tries: How often servers that are well could not answer it.
        failed_on: Addresses of these servers.
    """

    key: str
    prompt: Content
    temperatures: list[float]
    prompt_ids: list[int]
    seed: int
    tries: int = 0
    failed_on: set[str] = field(default_factory=set)


def request_seed(seed: int, key: str, prompt_id: str) -> int:
    """
    Seed of a request, from 0 to 2³⁰ - 1.

    A hash: servers draw sample i of a request with seed + i, so seeds of the same prompt in two iterations must not be
    neighbours.

    Args:
        seed: Seed of the run.
        key: Name of the random numbers, e.g. the iteration.
        prompt_id: Name of the prompt.
    """
    digest = hashlib.sha256(f"{seed}/{key}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 2


@dataclass
class Sampler:
    """
    How to sample, for all requests alike.

    Attributes:
        urls: Base addresses, e.g. `http://127.0.0.1:8000/v1`.
        model: Name of the model on the servers. `None`: the first that a server offers.
        max_new_tokens: Longest completion, in tokens.
        top_p: Nucleus sampling threshold.
        end_ids: Tokens that end a completion, for servers that must be told.
        count_tokens: Number of tokens of a text, for answers that do not say.
        api_key_variable: Environment variable that holds the key of the servers.
        chat_template_kwargs: Arguments of the chat template.
        requests_in_flight: On each server.
        timeout: Seconds that one request may take.
        patience: Seconds for which a server may fail before it is given up.
    """

    urls: list[str]
    model: str | None
    max_new_tokens: int
    top_p: float
    end_ids: list[int]
    count_tokens: Callable[[str], int]
    api_key_variable: str = "OPENAI_API_KEY"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    requests_in_flight: int = 32
    timeout: float = 600.0
    patience: float = 120.0
    warnings: list[str] = field(default_factory=list)

    def sample(
        self,
        requests: list[Request],
        on_samples: Callable[[Request, list[Sample]], None],
        on_failure: Callable[[Request, str], None],
    ) -> None:
        """
        Samples for all requests.

        Args:
            requests: What to sample.
            on_samples: Called with the samples of each request as they come, in any order.
            on_failure: Called with a request that is set aside, and why; what it raises ends the sampling.

        Raises:
            LarPOError: If no server answers any more, or none answers any request. What was handed to `on_samples`
                before stays there.
        """
        asyncio.run(_Run(self, requests, on_samples, on_failure).run())


class UnusableAnswerError(Exception):
    """A server answered, but with something else than completions."""


class _Endpoint:
    def __init__(self, sampler: Sampler, url: str):
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        key = os.environ.get(sampler.api_key_variable) or "EMPTY"
        self.url, self.sampler, self.model = url, sampler, sampler.model
        self.extra: dict[str, Any] = {}
        self.client = AsyncOpenAI(
            base_url=url,
            api_key=key,
            timeout=sampler.timeout,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(trust_env=False) if is_loopback(url) else None,  # no proxy
        )
        self.takes_more: bool | None = None  # whether it knows the settings beyond OpenAI's; `None`: not known yet
        self.failing_since: float | None = None
        self.first_failures = 0  # requests in a row that failed at their first try
        self.wait = _FIRST_WAIT
        self.dead = False

    async def complete(self, request: Request, temperature: float, count: int, seed: int) -> list[Sample]:
        """Up to `count` samples: what the server returns."""
        if self.model is None:
            self.model = await self.first_model()
        template: dict[str, Any] = {}
        if self.sampler.chat_template_kwargs and not isinstance(request.prompt, str):
            template = {"chat_template_kwargs": self.sampler.chat_template_kwargs}
        options = {
            "model": self.model,
            "temperature": temperature,
            "top_p": self.sampler.top_p,
            "max_tokens": self.sampler.max_new_tokens,
            "seed": seed,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        } | ({"n": count} if count > 1 else {})
        answer = await self.ask(request.prompt, options, self.extra_body(temperature) | template)
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list):
            raise UnusableAnswerError(f"it answered without choices: {' '.join(str(answer).split())[:150]}")
        try:
            # A message without any text is an empty answer; a choice without a text is none
            texts = [
                choice.text if isinstance(request.prompt, str) else choice.message.content or "" for choice in choices
            ]
        except AttributeError:
            texts = [None]
        if None in texts:
            raise UnusableAnswerError(f"its choices hold no text: {' '.join(str(choices).split())[:150]}")
        self.check_prompt(request, answer)
        samples = []
        for text, choice in zip(texts, choices, strict=True):
            if choice.finish_reason is None:
                self.warn(
                    "The servers do not say why completions end (`finish_reason` is missing): all of them count as cut "
                    "off. Take a server that says it."
                )
            finished = choice.finish_reason == "stop"
            ids = getattr(choice, "token_ids", None) or None
            known = answer.usage.completion_tokens if answer.usage and len(texts) == 1 else None
            num_tokens = len(ids) if ids else known or self.sampler.count_tokens(text) + finished
            samples.append(Sample(text=text, num_tokens=num_tokens, finished=finished, token_ids=ids))
        return samples[:count]

    async def ask(self, prompt: Content, options: dict[str, Any], extra_body: dict[str, Any]) -> Any:
        """The answer to a request, with the settings that OpenAI's protocol lacks where the server knows them."""
        import openai

        if self.takes_more is False:
            return await self.send(prompt, options, extra_body)
        try:
            answer = await self.send(prompt, options, _MORE_SETTINGS | extra_body)
        except openai.APIStatusError as error:
            if self.takes_more or error.status_code not in _UNKNOWN_SETTING:
                raise
            answer = await self.send(prompt, options, extra_body)  # raises the error again if the prompt is the cause
            self.takes_more = False
            self.warn(
                f"The servers refuse {', '.join(_MORE_SETTINGS)}: they draw with what they or the model's "
                "`generation_config.json` hold for these, and completions that end are trained on as their texts are "
                "tokenised."
            )
        else:
            self.takes_more = True
        return answer

    async def send(self, prompt: Content, options: dict[str, Any], extra_body: dict[str, Any]) -> Any:
        asked: Any
        if isinstance(prompt, str):
            asked = self.client.completions.create(prompt=prompt, extra_body=extra_body, **options)
        else:
            asked = self.client.chat.completions.create(messages=prompt, extra_body=extra_body, **options)
        # The client's own limit begins again with each byte that comes
        async with asyncio.timeout(self.sampler.timeout):  # in Python 3.11, `wait_for` may swallow a cancel
            return await asked

    async def first_model(self) -> str:
        models = (await self.client.models.list()).data
        if not models:
            raise UnusableAnswerError("it offers no model")
        return models[0].id

    async def is_well(self) -> bool:
        """Whether it answers a question that has nothing to do with a prompt."""
        try:
            async with asyncio.timeout(10):
                await self.first_model()
        except Exception:  # whatever it is
            return False
        return True

    def extra_body(self, temperature: float) -> dict:
        if not self.extra or temperature == 0:
            return {}
        settings = self.extra | {"temperature": temperature, "max_new_tokens": self.sampler.max_new_tokens}
        return {"generation_config": json.dumps(settings | {"top_p": self.sampler.top_p})}

    def check_prompt(self, request: Request, answer: Any) -> None:
        """Compares the prompt's tokens, or their number where the server does not give them."""
        of_choice = getattr(answer.choices[0], "prompt_token_ids", None) if answer.choices else None
        ids = getattr(answer, "prompt_token_ids", None) or of_choice
        prompt_tokens = len(ids) if ids else getattr(answer.usage, "prompt_tokens", None)
        if prompt_tokens and (prompt_tokens != len(request.prompt_ids) or (ids and ids != request.prompt_ids)):
            what = "other" if prompt_tokens == len(request.prompt_ids) else f"{prompt_tokens}"
            self.warn(
                f"The servers see another prompt than training: {what} tokens instead of "
                f"{len(request.prompt_ids)}. Serve the model with the chat template of its folder."
            )

    def warn(self, text: str) -> None:
        kind = text.split(":")[0]
        if not any(known.startswith(kind) for known in self.sampler.warnings):
            self.sampler.warnings.append(text)
            logger.warning(text)


class _Run:
    def __init__(self, sampler: Sampler, requests: list[Request], on_samples, on_failure):
        self.sampler, self.on_samples, self.on_failure = sampler, on_samples, on_failure
        self.waiting, self.num_unanswered = deque(requests), len(requests)
        self.endpoints: list[_Endpoint] = []
        self.set_aside: list[tuple[Request, str]] = []
        self.num_answered = 0
        self.last_error = ""
        self.is_ending = False

    async def run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(_log_unless_stopped)
        self.endpoints = [_Endpoint(self.sampler, url) for url in self.sampler.urls]
        workers = [self._work(x) for x in self.endpoints for _ in range(self.sampler.requests_in_flight)]
        tasks = [asyncio.create_task(worker) for worker in workers]
        try:
            await asyncio.gather(*tasks)
        finally:
            self.is_ending = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # a signal ends the loop with this coroutine
            for endpoint in self.endpoints:
                await endpoint.client.close()
        if self.num_unanswered:
            raise LarPOError(
                f"No server answers any more ({', '.join(self.sampler.urls)}): {self.last_error} "
                f"{self.num_unanswered} prompts are left. Start the servers and run the same command again; what was "
                "sampled so far is kept."
            )
        self._hand_over_set_aside()

    async def _work(self, endpoint: _Endpoint) -> None:
        while self.num_unanswered and not endpoint.dead and not self.is_ending:
            request = self._next_for(endpoint)
            if request is None:  # others may still fail and give their requests back
                await asyncio.sleep(0.05)
                continue
            try:
                samples = await self._all_samples(endpoint, request)
            except Exception as error:
                kind = _kind_of(error)
                if kind is None:
                    raise
                await self._failed(endpoint, request, kind, error)
            else:
                endpoint.failing_since, endpoint.wait, endpoint.first_failures = None, _FIRST_WAIT, 0
                self.num_answered += 1
                self.num_unanswered -= 1
                self.on_samples(request, samples)

    def _next_for(self, endpoint: _Endpoint) -> Request | None:
        """A request that has not failed on the server yet; one that has only where it has failed on all others too."""
        others = {other.url for other in self.endpoints if not other.dead and other is not endpoint}
        for _ in range(len(self.waiting)):
            request = self.waiting.popleft()
            if endpoint.url not in request.failed_on or others <= request.failed_on:
                return request
            self.waiting.append(request)
        return None

    async def _failed(self, endpoint: _Endpoint, request: Request, kind: str, error: Exception) -> None:
        """Whose fault is it? The server's, if it is not well; else the prompt's."""
        self.last_error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if kind == "hopeless":
            self.waiting.appendleft(request)
            endpoint.dead = True
            logger.warning(f"{endpoint.url} is given up: {self.last_error}")
        elif kind == "unreachable" or endpoint.first_failures >= _BAD_SERVER or not await endpoint.is_well():
            self.waiting.appendleft(request)
            await self._rest(endpoint)
        else:
            endpoint.first_failures += request.tries == 0
            if endpoint.first_failures >= _BAD_SERVER and not self.num_answered:
                reason = self._reason(endpoint, kind, error)
                raise LarPOError(f"The servers answered none of the first {_BAD_SERVER} requests. {reason}")
            request.tries += _TRIES_OF.get(kind, 1)
            request.failed_on.add(endpoint.url)
            if request.tries < _MAX_TRIES:
                self.waiting.append(request)  # behind all others, and on another server
                await asyncio.sleep(_FIRST_WAIT * random.uniform(0.5, 1.0) if kind != "refused" else 0)
            else:
                self.set_aside.append((request, self._reason(endpoint, kind, error)))
                self.num_unanswered -= 1
                if self.num_answered:
                    self._hand_over_set_aside()

    def _reason(self, endpoint: _Endpoint, kind: str, error: Exception) -> str:
        how = {"refused": "refuses it", "timeout": "does not answer in time"}.get(kind, "fails on it")
        status = getattr(error, "status_code", None)
        status = "" if status is None else f" (status {status})"
        return f"The server {endpoint.url} {how}{status}: {' '.join(str(error).split())[:300]}"

    def _hand_over_set_aside(self) -> None:
        if self.set_aside and not self.num_answered:  # then it is not the prompts
            count = len(self.set_aside)
            raise LarPOError(f"The servers answered none of the first {count} requests. {self.set_aside[0][1]}")
        while self.set_aside:
            self.on_failure(*self.set_aside.pop(0))

    async def _rest(self, endpoint: _Endpoint) -> None:
        now = time.monotonic()
        endpoint.failing_since = endpoint.failing_since or now
        if now - endpoint.failing_since > self.sampler.patience and not endpoint.dead:
            endpoint.dead = True
            logger.warning(f"{endpoint.url} is given up: {self.last_error}")
        wait, endpoint.wait = endpoint.wait, min(2 * endpoint.wait, _LONGEST_WAIT)
        await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    async def _all_samples(self, endpoint: _Endpoint, request: Request) -> list[Sample]:
        samples: dict[int, Sample] = {}
        for temperature in dict.fromkeys(request.temperatures):
            places = [i for i, value in enumerate(request.temperatures) if value == temperature]
            seed = request.seed + places[0]
            found = await endpoint.complete(request, temperature, len(places), seed)
            while len(found) < len(places):  # servers that know no `n`
                more = await endpoint.complete(request, temperature, 1, request.seed + places[len(found)])
                if not more:
                    raise UnusableAnswerError("it returned no completion")
                found += more
            if len(places) > 1 and temperature > 0 and len({sample.text for sample in found}) == 1:
                found = await self._ask_to_sample(endpoint, request, temperature, places, found)
            for place, sample in zip(places, found, strict=True):
                samples[place] = sample
        return [samples[place] for place in range(len(request.temperatures))]

    async def _ask_to_sample(
        self, endpoint: _Endpoint, request: Request, temperature: float, places: list[int], found: list[Sample]
    ) -> list[Sample]:
        """All samples are the same: perhaps the server decodes greedily unless told otherwise in its own words."""
        if not endpoint.extra:
            endpoint.extra = {"do_sample": True, "top_k": 0, "eos_token_id": self.sampler.end_ids}
            logger.info(f"{endpoint.url} returns the same completion again and again; asking it to sample.")
        again = [found[0]]
        for place in places[1:]:
            again += (await endpoint.complete(request, temperature, 1, request.seed + place))[:1]
        if len(again) < len(places):
            return found
        if len({sample.text for sample in again}) == 1:
            endpoint.warn(
                f"Identical samples: at temperature {temperature} a server returned the same completion "
                f"{len(places)} times for a prompt. If that continues, the server ignores the temperature."
            )
        return again


def _log_unless_stopped(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A signal is raised in whatever task is at work, which is no error of that task."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


def _kind_of(error: Exception) -> str | None:
    """What an error of a request says of the server or the prompt; `None` for errors of another origin."""
    import openai

    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "unreachable"
    if isinstance(error, openai.APIStatusError):
        if error.status_code in _NEVER_AGAIN:
            return "hopeless"
        return "refused" if 400 <= error.status_code < 500 and error.status_code not in _LATER else "failed"
    # Half an answer, or one in another form
    if isinstance(error, UnusableAnswerError | openai.APIResponseValidationError | json.JSONDecodeError):
        return "failed"
    return None
