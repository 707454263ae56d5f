"""[`Endpoint`]: one server that speaks OpenAI's protocol. What it answers is checked, because servers differ."""

import asyncio
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LarPOError
from ..prompts import Content, is_unicode
from .in_process import Sample
from .server_errors import UnusableAnswerError, describe
from .urls import api_key, is_loopback

logger = logging.getLogger(__name__)

_MORE_SETTINGS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
"""
Beyond OpenAI's protocol. What is not said a server takes from the model's `generation_config.json`, so that samples of
one model would be drawn in another way than those of the next.
"""

_ENOUGH_SAMPLED = 3  # prompts whose completions differ, from which on a server is known to sample

_UNKNOWN_SETTING = (400, 422)  # what a server says to a setting that it does not know

BAD_SERVER = 20
"""Failures in a row from which on the prompts may not be at fault."""


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
        tries: How often servers that are well could not answer it; some failures count for more, or less, than one.
        failed_on: Addresses of these servers.
        times_busy: How often they had too much to do.
        crashes: How often a server that it was sent to stopped answering.
    """

    key: str
    prompt: Content
    temperatures: list[float]
    prompt_ids: list[int]
    seed: int
    tries: float = 0
    failed_on: set[str] = field(default_factory=set)
    times_busy: int = 0
    crashes: int = 0

    def forget_tries(self) -> None:
        """Forgets which servers could not answer it: they were not well, or are others now."""
        self.tries, self.failed_on, self.times_busy = 0, set(), 0

    def for_one_sample(self) -> "Request":
        """The same for a single completion."""
        return replace(self, temperatures=self.temperatures[:1])


class Doubt(NamedTuple):
    """
    A request that a server fails on, although it seems to be well.

    Attributes:
        request: The request.
        reason: Why it failed.
        failed_at: When. What the server answers that it was asked for later shows that the request is at fault.
    """

    request: Request
    reason: str
    failed_at: float


@dataclass
class SamplerSettings:
    """
    How to sample, for all requests alike.

    Attributes:
        urls: Base addresses, e.g. `http://127.0.0.1:8000/v1`.
        model: Name of the model on the servers. `None`: the one that has its path as name or root, else the first that
            a server offers.
        model_path: Folder or hub id of the model.
        must_offer: Whether a server must offer the model by its path: the run has trained it, and running servers are
            not given new weights.
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
    model_path: str
    must_offer: bool
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


class Endpoint:
    """One server, and how it has fared."""

    def __init__(self, sampler: SamplerSettings, url: str):
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        self.url, self.sampler, self.model = url, sampler, sampler.model
        self.key = api_key(sampler.api_key_variable)
        self.extra: dict[str, Any] | None = {}  # what makes it sample, in its own words; `None`: it refuses such words
        self.client = AsyncOpenAI(
            base_url=url,
            api_key=self.key,
            timeout=sampler.timeout,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(trust_env=False) if is_loopback(url) else None,  # no proxy
        )
        # Temperatures, and how many prompts got different completions there: more than rounding makes of the same ones
        self.num_sampled: Counter[float] = Counter()
        self.was_told = False  # that it returns the same completion again and again
        self.takes_more: bool | None = None  # whether it knows the settings beyond OpenAI's; `None`: not known yet
        self.known: Request | None = None  # one that it has answered
        self.doubtful: list[Doubt] = []
        self.in_flight: dict[str, Request] = {}
        self.failed_last: dict[str, Request] = {}  # in flight when it stopped answering
        self.stopped_at: float | None = None  # its first failure since its last answer
        self.failures = 0  # in a row
        self.trust = BAD_SERVER  # so many failures in a row may be the fault of prompts
        self.failing_since: float | None = None
        self.last_refusal = 0.0  # when it did not answer what was answered before
        self.lock = asyncio.Lock()
        self.dead = False

    async def all_samples(self, request: Request) -> list[Sample]:
        """One sample for each of the temperatures."""
        samples: dict[int, Sample] = {}
        for temperature in dict.fromkeys(request.temperatures):
            places = [i for i, value in enumerate(request.temperatures) if value == temperature]
            seed = request.seed + places[0]
            found = await self.complete(request, temperature, len(places), seed)
            while len(found) < len(places):  # servers that know no `n`
                more = await self.complete(request, temperature, 1, request.seed + places[len(found)])
                if not more:
                    raise UnusableAnswerError("it returned no completion")
                found += more
            if len(places) > 1 and temperature > 0:
                # One that is known to sample is certain of its answer
                is_known = self.num_sampled[temperature] >= _ENOUGH_SAMPLED
                if not is_known and len({sample.text for sample in found}) == 1:
                    found = await self._ask_to_sample(request, temperature, places, found)
                self.num_sampled[temperature] += 2 * len({sample.text for sample in found}) > len(found)
            for place, sample in zip(places, found, strict=True):
                samples[place] = sample
        return [samples[place] for place in range(len(request.temperatures))]

    async def _ask_to_sample(
        self, request: Request, temperature: float, places: list[int], found: list[Sample]
    ) -> list[Sample]:
        """All samples are the same: perhaps the server decodes greedily unless told otherwise in its own words."""
        if self.extra is None:  # it does not know these words
            self._warn_of_equal(temperature, len(places))
            return found
        extra = self.extra or {"do_sample": True, "top_k": 0, "eos_token_id": self.sampler.end_ids}
        again = [found[0]]
        for place in places[1:]:
            more = await self.try_with(extra, request, temperature, request.seed + place)
            if more is None:
                self._warn_of_equal(temperature, len(places))
                return found
            again += more[:1]
        if len(again) < len(places):
            return found
        if len({sample.text for sample in again}) == 1:
            self._warn_of_equal(temperature, len(places))
        return again

    def _warn_of_equal(self, temperature: float, count: int) -> None:
        self.warn(
            f"Identical samples: at temperature {temperature} a server returned the same completion {count} times for "
            "a prompt. If that continues, the server ignores the temperature."
        )

    async def try_with(
        self, extra: dict[str, Any], request: Request, temperature: float, seed: int
    ) -> list[Sample] | None:
        """A sample with further words, which stay if the server knows them; `None` if it refuses them."""
        import openai

        if extra != self.extra and not self.was_told:  # all who ask it find that at the same time
            self.was_told = True
            logger.info(f"{self.url} returns the same completion again and again; asking it to sample.")
        try:
            found = await self.complete(request, temperature, 1, seed, extra)
        except openai.APIStatusError as error:
            if error.status_code not in _UNKNOWN_SETTING:
                raise
            self.extra = None
            return None
        self.extra = extra
        return found

    async def complete(
        self, request: Request, temperature: float, count: int, seed: int, extra: dict[str, Any] | None = None
    ) -> list[Sample]:
        """Up to `count` samples: what the server returns."""
        if self.model is None:
            self.model = await self.offered_model()
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
        answer = await self.ask(request.prompt, options, self.extra_body(temperature, extra or self.extra) | template)
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list):
            raise UnusableAnswerError(f"it answered without choices: {' '.join(str(answer).split())[:150]}")
        texts = [_text_of(choice, chat=not isinstance(request.prompt, str)) for choice in choices]
        self.check_prompt(request, answer)
        samples = []
        for text, choice in zip(texts, choices, strict=True):
            reason = getattr(choice, "finish_reason", None)
            if reason not in ("stop", "length", None):
                raise UnusableAnswerError(f"a completion ended for another reason than its end or length: {reason!r}")
            if reason is None:
                self.warn(
                    "The servers do not say why completions end (`finish_reason` is missing): all of them count as cut "
                    "off. Take a server that says it."
                )
            finished = reason == "stop"
            ids = _ids_of(choice, "token_ids")
            known = _tokens_used(answer, "completion_tokens") if len(texts) == 1 else None
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

    async def offered_model(self) -> str:
        """The name of the model that it is asked for."""
        path, models = self.sampler.model_path, await self.models()
        for model in models:
            if _is_same_path(model.id, path) or _is_same_path(getattr(model, "root", None), path):
                return model.id
        if self.sampler.must_offer:
            raise LarPOError(
                f"`server_urls`: {self.url} offers {', '.join(model.id for model in models)} and not {path}, which the "
                "run has trained. Servers that run already are not given new weights: restart them with this model and "
                "run the same command again, with `server_model` if they call it otherwise. With `server_command`, a "
                "run gives its servers each model on its own."
            )
        self.warn(f"The servers offer another name: {models[0].id} is taken to be {path}.")
        return models[0].id

    async def models(self) -> list[Any]:
        """What it offers, at least one."""
        try:
            async with asyncio.timeout(self.sampler.timeout):
                models = (await self.client.models.list()).data
        except (AttributeError, TypeError, ValueError):  # the client's own, about what is no list
            models = None
        if not models or not all(isinstance(getattr(model, "id", None), str) for model in models):
            raise UnusableAnswerError("it offers no model")
        return models

    async def is_well(self) -> bool:
        """Whether it answers a question that has nothing to do with a prompt."""
        try:
            async with asyncio.timeout(10):
                await self.models()
        except Exception:  # whatever it is
            return False
        return True

    def describe(self, error: Exception) -> str:
        """Why a request to it failed."""
        return describe(error, timeout=self.sampler.timeout, key=self.key)

    def extra_body(self, temperature: float, extra: dict[str, Any] | None) -> dict:
        if not extra or temperature == 0:
            return {}
        settings = extra | {"temperature": temperature, "max_new_tokens": self.sampler.max_new_tokens}
        return {"generation_config": json.dumps(settings | {"top_p": self.sampler.top_p})}

    def check_prompt(self, request: Request, answer: Any) -> None:
        """Compares the prompt's tokens, or their number where the server does not give them."""
        of_choice = _ids_of(answer.choices[0], "prompt_token_ids") if answer.choices else None
        ids = _ids_of(answer, "prompt_token_ids") or of_choice
        prompt_tokens = len(ids) if ids else _tokens_used(answer, "prompt_tokens")
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


def _text_of(choice: Any, chat: bool) -> str:
    message = getattr(choice, "message", None) if chat else choice
    text = getattr(message, "content" if chat else "text", None)
    if chat and message is not None and text is None:
        if getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None):
            raise LarPOError(
                "A server splits completions into thoughts and answers, and some hold thoughts alone. Start it without "
                "its reasoning parser (`--reasoning-parser` of vLLM), so that it returns completions as they are."
            )
        text = ""  # an empty answer; a choice without a message is none
    if not isinstance(text, str) or not is_unicode(text):
        raise UnusableAnswerError(f"its choices hold no text: {' '.join(repr(choice).split())[:150]}")
    return text


def _ids_of(part: Any, name: str) -> list[int] | None:
    """Tokens in an answer or a choice, if there are any."""
    ids = getattr(part, name, None) or None
    if ids is not None and not (isinstance(ids, list) and all(isinstance(x, int) for x in ids)):
        raise UnusableAnswerError(f"its `{name}` is no list of tokens: {str(ids)[:150]}")
    return ids


def _tokens_used(answer: Any, name: str) -> int | None:
    count = getattr(getattr(answer, "usage", None), name, None)
    return count if isinstance(count, int) else None


def _is_same_path(name: Any, path: str) -> bool:
    """Whether a server's name of a model is its path, also if one of them is relative or leads over a link."""
    if not isinstance(name, str) or name == path:
        return name == path
    # A link `latest` may have been moved since the server was started
    return os.path.realpath(name) == os.path.realpath(path) and Path(name).parts[-2:] == Path(path).parts[-2:]
