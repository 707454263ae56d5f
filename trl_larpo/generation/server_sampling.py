"""[`ServerSampling`]: samples the prompts of a task on servers, and starts servers again that end meanwhile."""

import logging
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..candidates import CandidatePool
from ..preparation import preparing
from ..prompts import Prompt
from ..set_aside import SetAside
from ..storage import GrowingFile
from ..token_parts import is_text_enough
from .in_process import Sample, encode_prompt, render_prompt, with_half_character
from .model_servers import ModelServers
from .options import GenerationOptions
from .sampling_task import SamplingTask, as_pool, end_ids_of
from .server_client import Sampler, ServersGoneError, request_seed
from .server_endpoint import Request

logger = logging.getLogger(__name__)

_MAX_RESTARTS = 5  # in a row that each bring few prompts; those that bring none count twice
_FEW = 100


class _LazyRequest(Request):
    """
    A request whose prompt is tokenized when its tokens are asked for: to tokenize all prompts takes minutes, in which
    servers would wait. The tokens take 4 bytes each.
    """

    tokenize: Callable[[], list[int]] | None = None  # until it has been

    @property
    def prompt_ids(self) -> list[int]:
        if self.tokenize is not None:
            self.prompt_ids, self.tokenize = self.tokenize(), None
        return self._tokens.tolist()

    @prompt_ids.setter
    def prompt_ids(self, ids: list[int]) -> None:
        self._tokens = array("i", ids)


@dataclass
class ServerSampling:
    """
    Samples on servers.

    Attributes:
        servers: Those that are started, where none run already.
        options: How to sample.
        seed: Seed of the random numbers.
        task: What to sample.
        file: Where samples are saved.
        set_aside: Where prompts are named that cannot be sampled.
        progress: A bar to advance, in completions.
        on_pools: Called with what has been sampled and saved.
    """

    servers: ModelServers
    options: GenerationOptions
    seed: int
    task: SamplingTask
    file: GrowingFile
    set_aside: SetAside
    progress: tqdm
    on_pools: Callable[[list[CandidatePool]], None]
    _waiting: dict[str, Prompt] = field(default_factory=dict)
    _requests: dict[str, Request] = field(default_factory=dict)  # for those that wait
    _known: Request | None = None  # one that was answered

    def sample(self, prompts: list[Prompt], done: set[str]) -> None:
        """
        Samples prompts.

        Args:
            prompts: The prompts.
            done: Names of those that are in the file.

        Raises:
            LarPOError: If no server answers any more, or too many prompts fail.
            DataError: If the chat template refuses a prompt, before servers start.
        """
        options, wasted = self.options, 0
        tokenizer = AutoTokenizer.from_pretrained(self.task.model_path, revision=self.task.revision)
        self._waiting = {prompt.id: prompt for prompt in prompts if prompt.id not in done}
        self._requests = {key: self._request(tokenizer, prompt) for key, prompt in self._waiting.items()}
        # A short one, which every server should take
        known = min((prompt for prompt in prompts if prompt.id in done), key=lambda x: len(x.text), default=None)
        self._known = None if known is None else self._request(tokenizer, known)
        while self._waiting:
            urls, name = options.server_urls, options.server_model
            num_waiting, num_failed = len(self._waiting), self.set_aside.count
            if not urls:
                with preparing():
                    urls, name = self.servers.serve(self.task.model_path)
            try:
                return self._ask(urls, name, tokenizer)
            except ServersGoneError as error:
                num_done = num_waiting - len(self._waiting)
                # What ended a server was found: how often that may be is up to `max_failed_share`
                found_cause = self.set_aside.count > num_failed
                wasted = 0 if num_done >= _FEW or found_cause else wasted + (1 if num_done else 2)
                if options.server_urls or wasted > _MAX_RESTARTS:
                    raise
                how = "do not answer" if self.servers.are_alive() else "have ended"
                logger.warning(f"Servers {how}, and are started again: {error.reason}")
                self.servers.close()

    def _ask(self, urls: list[str], name: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes those out of the prompts that wait that are sampled or set aside."""
        options, task = self.options, self.task
        started, num_tokens = time.monotonic(), 0

        def save(request: Request, samples: list[Sample]) -> None:
            nonlocal num_tokens
            samples = [with_half_character(tokenizer, sample) for sample in samples]
            pool = as_pool(tokenizer, self._waiting[request.key], samples, task, options.template_kwargs)
            self.file.add([pool.to_row()])
            self._take(request)
            self._known = request
            self.on_pools([pool])
            num_tokens += sum(sample.num_tokens for sample in samples)
            self.progress.set_postfix_str(f"{num_tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
            self.progress.update(len(samples))

        def give_up(request: Request, reason: str) -> None:
            self.set_aside.add(self._take(request), reason)

        for request in self._requests.values():
            request.forget_tries()
        sampler = Sampler(
            urls,
            name,
            task.model_path,
            must_offer=task.is_trained and bool(options.server_urls),
            max_new_tokens=options.max_new_tokens,
            top_p=options.top_p,
            end_ids=sorted(end_ids_of(task, tokenizer)),
            count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            api_key_variable=options.server_api_key_variable,
            chat_template_kwargs=options.template_kwargs,
            requests_in_flight=options.server_requests_in_flight,
            timeout=options.server_timeout,
            patience=options.server_patience,
        )
        sampler.sample(
            list(self._requests.values()),
            save,
            give_up,
            known=self._known,
            num_tolerated=int(self.set_aside.limit),
        )

    def _take(self, request: Request) -> Prompt:
        del self._requests[request.key]
        return self._waiting.pop(request.key)

    def _request(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Request:
        kwargs = self.options.template_kwargs
        check = render_prompt if is_text_enough(kwargs) else encode_prompt
        check(tokenizer, prompt.content, kwargs)  # an error here, before servers start
        request = _LazyRequest(
            key=prompt.id,
            prompt=prompt.content,
            temperatures=self.task.temperatures,
            prompt_ids=[],
            seed=request_seed(self.seed, self.task.key, prompt.id),
        )
        request.tokenize = partial(encode_prompt, tokenizer, prompt.content, kwargs)
        return request
