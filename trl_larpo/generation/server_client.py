"""
Samples completions from servers that speak OpenAI's protocol: vLLM, SGLang, `transformers serve`, llama.cpp.

Several servers are used side by side with many requests in flight. What comes back is checked, because servers differ:
some return one completion however many are asked for, some sample greedily whatever the temperature, some render the
prompt in another way. A server that fails hands its requests to the others. A request that a server cannot answer while
it answers others is tried again later, elsewhere, and set aside after a few tries: as soon as the server has answered
another one since, so that what a bad server does is not put down to prompts.
"""

import asyncio
import hashlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import LarPOError
from .in_process import Sample
from .server_endpoint import Endpoint, Request, SamplerSettings, UnusableAnswerError, kind_of, was_sent

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two tries

_MAX_TRIES = 8  # of a request to servers that are well
_TRIES_OF = {"refused": 4, "timeout": 3, "busy": 0.5}  # number of tries that such a failure counts as

_BAD_SERVER = 20  # failures in a row from which on the prompts may not be at fault

_MAX_CRASHES = 3  # of servers that were asked for the same request: among others, among a few, alone


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


class ServersGoneError(LarPOError):
    """
    No server answers any more.

    Attributes:
        reason: What the last of them said.
    """

    reason = ""


class Sampler(SamplerSettings):
    """Samples completions of many requests."""

    def sample(
        self,
        requests: list[Request],
        on_samples: Callable[[Request, list[Sample]], None],
        on_failure: Callable[[Request, str], None],
        known: Request | None = None,
        num_tolerated: int = 0,
    ) -> None:
        """
        Samples for all requests.

        Args:
            requests: What to sample.
            on_samples: Called with the samples of each request as they come, in any order.
            on_failure: Called with a request that is set aside, and why; what it raises ends the sampling.
            known: A request that was answered before. By such ones servers and prompts at fault are told apart.
            num_tolerated: Number of refusals, before any answer, from which on the servers are held to be at fault.

        Raises:
            ServersGoneError: If no server answers any more.
            LarPOError: If none answers any request, or one has another model. In each case what was handed to
                `on_samples` before stays there.
        """
        asyncio.run(_Run(self, requests, on_samples, on_failure, known, num_tolerated).run())


class _Run:
    def __init__(
        self,
        sampler: Sampler,
        requests: list[Request],
        on_samples,
        on_failure,
        known: Request | None,
        num_tolerated: int,
    ):
        self.sampler, self.on_samples, self.on_failure = sampler, on_samples, on_failure
        self.num_unanswered = len(requests)
        self.waiting, self.suspects = deque[Request](), deque[Request]()  # the latter may be what ends servers
        for request in requests:
            self._ask_again(request)
        self.endpoints: list[Endpoint] = []
        self.known, self.num_tolerated = known, num_tolerated
        self.last_error = ""
        self.is_ending = False

    async def run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(_log_unless_stopped)
        self.endpoints = [Endpoint(self.sampler, url) for url in self.sampler.urls]
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
            error = ServersGoneError(
                f"No server answers any more ({', '.join(self.sampler.urls)}): {self.last_error} "
                f"{self.num_unanswered} prompts are left. Start the servers and run the same command again; what was "
                "sampled so far is kept."
            )
            error.reason = self.last_error
            raise error

    async def _work(self, endpoint: Endpoint) -> None:
        while self.num_unanswered and not endpoint.dead and not self.is_ending:
            request = self._next_for(endpoint)
            if request is None:
                await self._without_work(endpoint)
                continue
            began, endpoint.in_flight[request.key] = time.monotonic(), request
            try:
                samples = await self._all_samples(endpoint, request)
            except Exception as error:
                del endpoint.in_flight[request.key]
                kind = kind_of(error)
                if kind is None:
                    raise
                since = endpoint.failing_since
                if kind != "busy" and was_sent(error) and (since is None or began < since):
                    endpoint.failed_last[request.key] = request
                await self._failed(endpoint, request, kind, error)
            else:
                del endpoint.in_flight[request.key]
                self.num_unanswered -= 1
                self.on_samples(request, samples)
                self.known = self.known or request
                endpoint.known = endpoint.known or request
                self._is_well(endpoint)

    def _is_well(self, endpoint: Endpoint) -> None:
        """Notes that a server answers. So what it has not answered before is at fault itself, and set aside."""
        endpoint.failing_since, endpoint.failures = None, 0
        endpoint.failed_last.clear()
        while endpoint.doubtful:
            self.num_unanswered -= 1
            self.on_failure(*endpoint.doubtful.pop(0))

    async def _without_work(self, endpoint: Endpoint) -> None:
        """Others may still fail and give their requests back. Meanwhile, what is in doubt is decided."""
        doubtful = [each for other in self.endpoints for each in other.doubtful]
        if self.known is None and len(doubtful) == self.num_unanswered:
            raise LarPOError(f"The servers answered none of the first {len(doubtful)} requests. {doubtful[0][1]}")
        if self.known is None or not endpoint.doubtful:
            await asyncio.sleep(0.05)
        elif not await self._answers_another(endpoint):
            await self._rest(endpoint)

    def _next_for(self, endpoint: Endpoint) -> Request | None:
        """A request that has not failed on the server yet; one that has only where it has failed on all others too."""
        others = {other.url for other in self.endpoints if not other.dead and other is not endpoint}
        room = min(map(self._most_with, endpoint.in_flight.values()), default=self.sampler.requests_in_flight)
        for queue in (self.waiting, self.suspects):
            for _ in range(len(queue) if len(endpoint.in_flight) < room else 0):
                request = queue.popleft()
                is_new = endpoint.url not in request.failed_on or others <= request.failed_on
                if is_new and len(endpoint.in_flight) < self._most_with(request):
                    return request
                queue.append(request)
        return None

    def _most_with(self, request: Request) -> int:
        """How many requests, with this one, a server is asked for at a time."""
        return max(1, self.sampler.requests_in_flight // 8**request.crashes)

    def _ask_again(self, request: Request, first: bool = False) -> None:
        queue = self.suspects if request.crashes else self.waiting
        queue.appendleft(request) if first else queue.append(request)

    async def _failed(self, endpoint: Endpoint, request: Request, kind: str, error: Exception) -> None:
        """Whose fault is it? The server's, if it is not well; else the prompt's."""
        self.last_error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        reason = self._reason(endpoint, kind, error)
        if kind == "hopeless":
            self._ask_again(request, first=True)
            self._give_up(endpoint)
        elif kind == "unreachable" or not await endpoint.is_well() or not await self._trusts(endpoint, kind, reason):
            self._ask_again(request, first=True)
            await self._rest(endpoint)
        else:
            request.tries += _TRIES_OF.get(kind, 1)
            request.failed_on.add(endpoint.url)
            if request.tries < _MAX_TRIES:
                self._ask_again(request)  # behind all others, and on another server
                wait = _FIRST_WAIT * (2 ** min(2 * request.tries, 6) if kind == "busy" else 1)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0) if kind != "refused" else 0)
            else:
                endpoint.doubtful.append((request, reason))

    async def _trusts(self, endpoint: Endpoint, kind: str, reason: str) -> bool:
        """Whether a failure may be the prompt's fault: not after too many in a row."""
        endpoint.failures += 1
        if self.known is not None:
            return endpoint.failures < _BAD_SERVER or await self._answers_another(endpoint)
        limit = max(_BAD_SERVER, self.num_tolerated) if kind == "refused" else _BAD_SERVER
        if all(other.dead or other.failures >= limit for other in self.endpoints):
            raise LarPOError(f"The servers answered none of the first {limit} requests. {reason}")
        return endpoint.failures < limit

    async def _answers_another(self, endpoint: Endpoint) -> bool:
        """Whether a server answers a request that it, or else another one, has answered before."""
        known = endpoint.known or self.known
        assert known is not None
        began = time.monotonic()
        async with endpoint.lock:  # one asks for all who wait
            if endpoint.dead or endpoint.last_refusal > began:
                return False
            if endpoint.failures < _BAD_SERVER and not endpoint.doubtful:  # it has answered meanwhile
                return True
            try:
                await self._all_samples(endpoint, known)
            except Exception as error:
                if kind_of(error) is None:
                    raise
                self.last_error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                endpoint.last_refusal = time.monotonic()
                endpoint.failing_since = endpoint.failing_since or began
                self._take_back(endpoint)
                return False
            self._is_well(endpoint)
            return True

    def _reason(self, endpoint: Endpoint, kind: str, error: Exception) -> str:
        how = {"refused": "refuses it", "timeout": "does not answer in time"}.get(kind, "fails on it")
        status = getattr(error, "status_code", None)
        status = "" if status is None else f" (status {status})"
        return f"The server {endpoint.url} {how}{status}: {' '.join(str(error).split())[:300]}"

    def _take_back(self, endpoint: Endpoint) -> None:
        """What a server that is not well has failed on is asked for again."""
        for request, _ in endpoint.doubtful:
            request.forget_tries()
            self._ask_again(request)
        endpoint.doubtful.clear()

    def _give_up(self, endpoint: Endpoint) -> None:
        if not endpoint.dead:
            endpoint.dead = True
            logger.warning(f"{endpoint.url} is given up: {self.last_error}")
            self._take_back(endpoint)

    async def _rest(self, endpoint: Endpoint) -> None:
        now = time.monotonic()
        endpoint.failing_since = endpoint.failing_since or now
        self._suspect(endpoint)
        failing, patience = now - endpoint.failing_since, self.sampler.patience
        if failing > patience:
            return self._give_up(endpoint)
        # All who asked it come here: the longer it fails, the longer they wait
        wait = min(max(_FIRST_WAIT, failing / 2), _LONGEST_WAIT, max(patience - failing, _FIRST_WAIT))
        await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    def _suspect(self, endpoint: Endpoint) -> None:
        """Notes what a server had been asked for when it stopped answering."""
        if not endpoint.failed_last:
            return
        for request in endpoint.failed_last.values():
            request.crashes += 1
        endpoint.failed_last.clear()
        waiting, self.waiting, self.suspects = [*self.waiting, *self.suspects], deque(), deque()
        for request in sorted(waiting, key=lambda x: x.crashes):
            if request.crashes < _MAX_CRASHES or self.known is None:
                self._ask_again(request)
            else:
                self.num_unanswered -= 1
                self.on_failure(
                    request, f"A server stopped answering each of the {request.crashes} times that it was asked for it."
                )

    async def _all_samples(self, endpoint: Endpoint, request: Request) -> list[Sample]:
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
        self, endpoint: Endpoint, request: Request, temperature: float, places: list[int], found: list[Sample]
    ) -> list[Sample]:
        """All samples are the same: perhaps the server decodes greedily unless told otherwise in its own words."""
        if endpoint.extra is None:  # it does not know these words
            self._warn_of_equal(endpoint, temperature, len(places))
            return found
        extra = endpoint.extra or {"do_sample": True, "top_k": 0, "eos_token_id": self.sampler.end_ids}
        again = [found[0]]
        for place in places[1:]:
            more = await endpoint.try_with(extra, request, temperature, request.seed + place)
            if more is None:
                self._warn_of_equal(endpoint, temperature, len(places))
                return found
            again += more[:1]
        if len(again) < len(places):
            return found
        if len({sample.text for sample in again}) == 1:
            self._warn_of_equal(endpoint, temperature, len(places))
        return again

    def _warn_of_equal(self, endpoint: Endpoint, temperature: float, count: int) -> None:
        endpoint.warn(
            f"Identical samples: at temperature {temperature} a server returned the same completion {count} times for "
            "a prompt. If that continues, the server ignores the temperature."
        )


def _log_unless_stopped(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A signal is raised in whatever task is at work, which is no error of that task."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)
