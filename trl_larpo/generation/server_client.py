"""
Samples completions from servers that speak OpenAI's protocol: vLLM, SGLang, `transformers serve`, llama.cpp.

Several servers are used side by side with many requests in flight. What comes back is checked, because servers differ:
some return one completion however many are asked for, some sample greedily whatever the temperature, some render the
prompt in another way. A server that fails hands its requests to the others. A request that a server cannot answer while
it answers others is tried again later, elsewhere, and set aside after a few tries: as soon as the server has answered
another one since, so that what a bad server does is not put down to prompts.
"""

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from ..errors import LarPOError
from ..lifetime import stop_in
from .in_process import Sample
from .server_endpoint import BAD_SERVER, Doubt, Endpoint, Request, SamplerSettings
from .server_errors import kind_of, was_sent
from .server_queue import RequestQueue

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two tries

_TIME_TO_REVIVE = 30.0  # seconds between two questions to a server that was given up

_MAX_TRIES = 8  # of a request to servers that are well
_TRIES_OF = {"refused": 4, "hopeless": 4, "timeout": 3}  # number of tries that such a failure counts as
_MAX_BUSY = 16  # answers "busy" to a request, which are no tries yet

_MAX_TRUST = 160  # failures in a row of a server that refuses prompts and answers others whenever it is asked
_MAX_HOPELESS = 3  # prompts before any answer for which key, model or address are wrong

_OF_A_STOP = ("unreachable", "timeout", "failed", "unusable")  # how requests may fail as their server stops


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
        try:
            asyncio.run(_Run(self, requests, on_samples, on_failure, known, num_tolerated).run())
        except BaseExceptionGroup as group:
            if (stop := stop_in(group)) is None:
                raise
            raise stop from None


class _Over(Exception):
    """All requests are settled, or no server is left: workers that still wait need not."""


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
        self.queue, self.num_unanswered = RequestQueue(requests, sampler.requests_in_flight), len(requests)
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
            with contextlib.suppress(_Over):
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
        while self.num_unanswered and not self.is_ending:
            if endpoint.dead:
                await self._try_to_revive(endpoint)
                continue
            request = self.queue.next_for(endpoint, self.endpoints)
            if request is None:
                await self._without_work(endpoint)
                continue
            began, endpoint.in_flight[request.key] = time.monotonic(), request
            try:
                samples = await endpoint.all_samples(request)
            except Exception as error:
                del endpoint.in_flight[request.key]
                kind = kind_of(error)
                if kind is None:
                    raise
                if kind in _OF_A_STOP and was_sent(error):
                    endpoint.stopped_at = endpoint.stopped_at or time.monotonic()
                    if began < endpoint.stopped_at:
                        endpoint.failed_last[request.key] = request
                await self._failed(endpoint, request, kind, error)
            else:
                del endpoint.in_flight[request.key]
                self.on_samples(request, samples)
                self.known = self.known or request
                endpoint.known = endpoint.known or request
                endpoint.trust = BAD_SERVER
                self._is_well(endpoint, began)
                self._settled()

    def _settled(self) -> None:
        self.num_unanswered -= 1
        if not self.num_unanswered:
            raise _Over

    def _set_aside(self, request: Request, reason: str) -> None:
        self.on_failure(request, reason)
        self._settled()

    def _is_well(self, endpoint: Endpoint, asked_at: float) -> None:
        """Notes that a server has answered. What it had failed on before it was asked is at fault, and set aside."""
        endpoint.failing_since, endpoint.stopped_at, endpoint.failures = None, None, 0
        endpoint.failed_last.clear()
        guilty = [each for each in endpoint.doubtful if each.failed_at < asked_at]
        endpoint.doubtful = [each for each in endpoint.doubtful if each.failed_at >= asked_at]
        for each in guilty:
            self._set_aside(each.request, each.reason)

    async def _without_work(self, endpoint: Endpoint) -> None:
        """Others may still fail and give their requests back. Meanwhile, what is in doubt is decided."""
        doubtful = [each for other in self.endpoints for each in other.doubtful]
        if self.known is None and len(doubtful) == self.num_unanswered:
            raise LarPOError(f"The servers answered none of the first {len(doubtful)} requests. {doubtful[0].reason}")
        if self.known is None or not endpoint.doubtful:
            await asyncio.sleep(0.05)
        elif not await self._answers_another(endpoint):
            await self._rest(endpoint)

    async def _failed(self, endpoint: Endpoint, request: Request, kind: str, error: Exception) -> None:
        """Whose fault is it? The server's, if it is not well; else the prompt's."""
        reason = self._reason(endpoint, kind, error)
        if kind == "hopeless" and endpoint.known is not None:  # key, model and address were right
            kind = "refused"
        if kind == "busy" and request.times_busy < _MAX_BUSY:
            request.times_busy += 1
            self.queue.put(request)
            await self._rest(endpoint, _FIRST_WAIT * 2 ** min(request.times_busy, 6))
        elif await self._is_at_fault(endpoint, kind, error, reason) or endpoint.dead:
            self.queue.put(request, first=True)
            self._suspect(endpoint)
            await self._rest(endpoint) if kind != "hopeless" else self._give_up(endpoint)
        else:
            request.tries += _TRIES_OF.get(kind, 1)
            request.failed_on.add(endpoint.url)
            alive = {other.url for other in self.endpoints if not other.dead}
            if request.tries < _MAX_TRIES or not alive <= request.failed_on:
                self.queue.put(request)  # behind all others, and for another server
                await asyncio.sleep(_FIRST_WAIT * random.uniform(0.5, 1.0) if kind != "refused" else 0)
            else:
                endpoint.doubtful.append(Doubt(request, reason, time.monotonic()))

    async def _is_at_fault(self, endpoint: Endpoint, kind: str, error: Exception, reason: str) -> bool:
        """Whether it may be no fault of the prompt that a server fails."""
        if kind == "hopeless":
            endpoint.failures += 1
            return endpoint.failures >= _MAX_HOPELESS
        if not was_sent(error) or not await endpoint.is_well():
            return True
        endpoint.failures += 1
        if self.known is not None:
            endpoint.trust = endpoint.trust if kind == "refused" else BAD_SERVER
            return endpoint.failures >= endpoint.trust and not await self._answers_another(endpoint)
        limit = max(BAD_SERVER, self.num_tolerated) if kind == "refused" else BAD_SERVER
        never = kind in ("refused", "unusable")  # what else fails may come to itself
        if never and all(other.dead or other.failures >= limit for other in self.endpoints):
            raise LarPOError(f"The servers answered none of the first {limit} requests. {reason}")
        return endpoint.failures >= limit

    async def _answers_another(self, endpoint: Endpoint) -> bool:
        """Whether a server answers a request that it, or else another one, has answered before."""
        began = time.monotonic()
        async with endpoint.lock:  # one asks for all who wait
            if endpoint.dead or endpoint.last_refusal > began:
                return False
            if endpoint.failures < endpoint.trust and not endpoint.doubtful:  # it has answered meanwhile
                return True
            return await self._answers_known(endpoint)

    async def _answers_known(self, endpoint: Endpoint) -> bool:
        known, asked_at = endpoint.known or self.known, time.monotonic()
        assert known is not None
        try:
            await endpoint.all_samples(known.for_one_sample())
        except Exception as error:
            kind = kind_of(error)
            if kind is None:
                raise
            self._reason(endpoint, kind, error)
            endpoint.last_refusal = time.monotonic()
            endpoint.failing_since = endpoint.failing_since or asked_at
            self._take_back(endpoint)
            return False
        endpoint.trust = min(2 * endpoint.trust, _MAX_TRUST)
        self._is_well(endpoint, asked_at)
        return True

    async def _try_to_revive(self, endpoint: Endpoint) -> None:
        """A server that was given up is used again once it answers what was answered before."""
        await asyncio.sleep(_TIME_TO_REVIVE)  # without the lock, at which others wait with requests
        async with endpoint.lock:
            if not endpoint.dead or time.monotonic() - endpoint.last_refusal < _TIME_TO_REVIVE:
                return
            endpoint.last_refusal = time.monotonic()
            try:
                answers = self.known is not None and await endpoint.is_well() and await self._answers_known(endpoint)
            except LarPOError:  # it has come back with another model
                return
            if answers:
                endpoint.dead = False
                endpoint.num_sampled.clear()  # it may be another server now
                self.queue.changed()
                logger.warning(f"{endpoint.url} answers again.")

    def _reason(self, endpoint: Endpoint, kind: str, error: Exception) -> str:
        """Why a request failed, which is noted as the last error too."""
        how = {"refused": "refuses it", "hopeless": "refuses it", "timeout": "does not answer in time"}
        status = getattr(error, "status_code", None)
        status = "" if status is None else f" (status {status})"
        text = endpoint.describe(error)
        self.last_error = f"{type(error).__name__}: {text}"
        return f"The server {endpoint.url} {how.get(kind, 'fails on it')}{status}: {text}"

    def _take_back(self, endpoint: Endpoint) -> None:
        """What a server that is not well has failed on is asked for again."""
        for each in endpoint.doubtful:
            each.request.forget_tries()
            self.queue.put(each.request)
        endpoint.doubtful.clear()

    def _give_up(self, endpoint: Endpoint) -> None:
        if endpoint.dead:
            return
        endpoint.dead = True
        logger.warning(f"{endpoint.url} is given up: {self.last_error}")
        self._take_back(endpoint)
        self.queue.changed()
        if all(other.dead for other in self.endpoints):
            raise _Over

    async def _rest(self, endpoint: Endpoint, least: float | None = None) -> None:
        """Waits until a server may be asked again, at least for some seconds; gives it up when its time is over."""
        now = time.monotonic()
        endpoint.failing_since = endpoint.failing_since or now
        failing, patience = now - endpoint.failing_since, self.sampler.patience
        if failing > patience or endpoint.dead:
            return self._give_up(endpoint)
        # All who asked it come here: the longer it fails, the longer they wait
        least = least or _FIRST_WAIT
        wait = min(max(least, failing / 2), _LONGEST_WAIT, max(patience - failing, _FIRST_WAIT))
        await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    def _suspect(self, endpoint: Endpoint) -> None:
        """Notes what a server had been asked for when it stopped answering."""
        if not endpoint.failed_last:
            return
        too_bad = self.queue.suspect(endpoint.failed_last.values())
        endpoint.failed_last.clear()
        for request in too_bad:
            if self.known is None:  # nothing shows yet that servers answer at all
                self.queue.put(request)
            else:
                self._set_aside(
                    request, f"A server stopped answering each of the {request.crashes} times that it was asked for it."
                )


def _log_unless_stopped(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A signal is raised in whatever task is at work, which is no error of that task."""
    if stop_in(context.get("exception")) is None:
        loop.default_exception_handler(context)
