"""
Samples completions from servers that speak OpenAI's protocol: vLLM, SGLang, `transformers serve`, llama.cpp.

Several servers are used side by side with many requests in flight. What comes back is checked, because servers differ:
some return one completion however many are asked for, some sample greedily whatever the temperature, some render the
prompt in another way. A server that fails hands its requests to the others.
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

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two tries


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
    """

    key: str
    prompt: Content
    temperatures: list[float]
    prompt_ids: list[int]
    seed: int


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
    requests_in_flight: int = 32
    timeout: float = 600.0
    patience: float = 120.0
    warnings: list[str] = field(default_factory=list)

    def sample(self, requests: list[Request], on_samples: Callable[[Request, list[Sample]], None]) -> None:
        """
        Samples for all requests.

        Args:
            requests: What to sample.
            on_samples: Called with the samples of each request as they come, in any order.

        Raises:
            LarPOError: If no server answers any more, or one refuses a request. What was handed to `on_samples` before
                stays there.
        """
        asyncio.run(_Run(self, requests, on_samples).run())


class _Endpoint:
    def __init__(self, sampler: Sampler, url: str):
        from openai import AsyncOpenAI

        key = os.environ.get(sampler.api_key_variable) or "EMPTY"
        self.url, self.sampler, self.model = url, sampler, sampler.model
        self.extra: dict[str, Any] = {}
        self.client = AsyncOpenAI(base_url=url, api_key=key, timeout=sampler.timeout, max_retries=0)
        self.failing_since: float | None = None
        self.wait = _FIRST_WAIT
        self.dead = False

    async def complete(self, request: Request, temperature: float, count: int, seed: int) -> list[Sample]:
        """Up to `count` samples: what the server returns."""
        if self.model is None:
            self.model = (await self.client.models.list()).data[0].id
        options = {
            "model": self.model,
            "temperature": temperature,
            "top_p": self.sampler.top_p,
            "max_tokens": self.sampler.max_new_tokens,
            "seed": seed,
            "extra_body": self.extra_body(temperature),
        } | ({"n": count} if count > 1 else {})
        if isinstance(request.prompt, str):
            answer = await self.client.completions.create(prompt=request.prompt, **options)
            texts = [choice.text for choice in answer.choices]
        else:
            answer = await self.client.chat.completions.create(messages=request.prompt, **options)
            texts = [choice.message.content or "" for choice in answer.choices]
        self.check_prompt(request, answer.usage)
        samples = []
        for text, choice in zip(texts, answer.choices, strict=True):
            finished = choice.finish_reason == "stop"
            known = answer.usage.completion_tokens if answer.usage and len(texts) == 1 else None
            num_tokens = known or self.sampler.count_tokens(text) + finished
            samples.append(Sample(text=text, num_tokens=num_tokens, finished=finished))
        return samples[:count]

    def extra_body(self, temperature: float) -> dict:
        if not self.extra or temperature == 0:
            return {}
        settings = self.extra | {"temperature": temperature, "max_new_tokens": self.sampler.max_new_tokens}
        return {"generation_config": json.dumps(settings | {"top_p": self.sampler.top_p})}

    def check_prompt(self, request: Request, usage) -> None:
        prompt_tokens = getattr(usage, "prompt_tokens", None)
        if prompt_tokens and prompt_tokens != len(request.prompt_ids):
            self.warn(
                f"The servers see another prompt than training: {prompt_tokens} tokens instead of "
                f"{len(request.prompt_ids)}. Serve the model with the chat template of its folder."
            )

    def warn(self, text: str) -> None:
        kind = text.split(":")[0]
        if not any(known.startswith(kind) for known in self.sampler.warnings):
            self.sampler.warnings.append(text)
            logger.warning(text)


class _Run:
    def __init__(self, sampler: Sampler, requests: list[Request], on_samples):
        self.sampler, self.on_samples = sampler, on_samples
        self.waiting, self.num_unanswered = deque(requests), len(requests)
        self.endpoints: list[_Endpoint] = []
        self.last_error = ""

    async def run(self) -> None:
        self.endpoints = [_Endpoint(self.sampler, url) for url in self.sampler.urls]
        workers = [self._work(x) for x in self.endpoints for _ in range(self.sampler.requests_in_flight)]
        tasks = [asyncio.create_task(worker) for worker in workers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            for endpoint in self.endpoints:
                await endpoint.client.close()
        if self.num_unanswered:
            raise LarPOError(
                f"No server answers any more ({', '.join(self.sampler.urls)}): {self.last_error} "
                f"{self.num_unanswered} prompts are left. Start the servers and run the same command again; what was "
                "sampled so far is kept."
            )

    async def _work(self, endpoint: _Endpoint) -> None:
        import openai

        while self.num_unanswered and not endpoint.dead:
            if not self.waiting:  # others may still fail and give their requests back
                await asyncio.sleep(0.05)
                continue
            request = self.waiting.popleft()
            try:
                samples = await self._all_samples(endpoint, request)
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                self.waiting.appendleft(request)  # also time-outs: they are connection errors
                self.last_error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                await self._rest(endpoint)
            except openai.APIStatusError as error:
                raise LarPOError(
                    f"The server {endpoint.url} refuses a request (status {error.status_code}): "
                    f"{' '.join(str(error).split())[:300]}"
                ) from error
            else:
                endpoint.failing_since, endpoint.wait = None, _FIRST_WAIT
                self.num_unanswered -= 1
                self.on_samples(request, samples)

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
                    raise LarPOError(f"The server {endpoint.url} returned no completion.")
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
