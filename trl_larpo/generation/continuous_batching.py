"""
Samples from a causal language model with continuous batching.

A prompt runs through the model once, however many completions are sampled for it. Every few tokens the completions
that have ended leave the batch, and those of waiting prompts take their places. Each completion draws its tokens with
random numbers of its own, so that what is sampled does not depend on what else is in the batch, but for rounding.
So the batch may be as large as memory allows: it is lowered to what fits into the free memory of a GPU, and halved when
memory runs out.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import LarPOError
from ..layers import cache_argument, layer_obstacle
from .batch_memory import fitting_batch_size, lower_batch_size

_STRIDE = 8  # tokens after which completions that have ended leave

_ROOM = 64  # tokens by which the memory for keys and values grows

_BLOCK = 256  # vocabulary entries summed up at a time

_PREFILL_TOKENS = 8192  # of prompts, with padding, that run through the model at a time


@dataclass
class Job:
    """
    Completions to sample for one prompt.

    Attributes:
        prompt_ids: Tokens of the prompt, at least one.
        temperatures: Temperature of each completion; 0 decodes greedily.
        uniforms: One row of random numbers in [0, 1) for each completion, `(completions, max_new_tokens)`.
        results: Tokens of each completion, an end token included; empty until [`sample`] has sampled it.
    """

    prompt_ids: list[int]
    temperatures: list[float]
    uniforms: np.ndarray
    results: list[list[int]] = field(init=False)

    def __post_init__(self):
        self.results = [[] for _ in self.temperatures]

    @property
    def missing(self) -> list[int]:
        """Numbers of the completions that are still to be sampled."""
        return [i for i, ids in enumerate(self.results) if not ids]


_Group = tuple[Job, list[int]]
"""A prompt, and numbers of some of its completions."""


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    jobs: list[Job],
    *,
    batch_size: int,
    max_new_tokens: int,
    end_ids: set[int],
    pad_id: int,
    top_p: float = 1.0,
    on_completion: Callable[[list[int]], None] = lambda ids: None,
) -> None:
    """
    Fills in the results of `jobs`, in the order given.

    Args:
        model: Causal language model in evaluation mode.
        jobs: What to sample.
        batch_size: Completions in the batch at the same time; fewer where the memory of a GPU is too small for them.
        max_new_tokens: Longest completion, in tokens.
        end_ids: Tokens that end a completion.
        pad_id: Any token, to fill up prompts with.
        top_p: Nucleus sampling threshold in (0, 1].
        on_completion: Called with the tokens of each completion when it has ended.

    Raises:
        LarPOError: If the memory is too small for a single completion, or logits are not finite.
    """
    settings = _Settings(max_new_tokens, end_ids, pad_id, top_p)
    work = _sample_in_groups if layer_obstacle(model) is not None else _sample_continuously
    longest = max((len(job.prompt_ids) for job in jobs), default=0) + max_new_tokens + _ROOM
    num_completions = sum(len(job.temperatures) for job in jobs)
    batch_size = max(1, fitting_batch_size(model, min(batch_size, num_completions), longest))
    while True:
        try:
            work(model, jobs, batch_size, settings, on_completion)
            return
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise LarPOError(
                    f"The memory is too small to sample one completion at a time: {' '.join(str(error).split())[:200]} "
                    "Lower `max_new_tokens` or the length of the prompts, or take a larger GPU."
                ) from error
        # Completions that had not ended are sampled from their beginning, with the same random numbers
        batch_size //= 2
        lower_batch_size(model, batch_size)


@dataclass(frozen=True)
class _Settings:
    """How to sample, as in [`sample`]."""

    max_new_tokens: int
    end_ids: set[int]
    pad_id: int
    top_p: float


def _sample_in_groups(
    model: PreTrainedModel,
    jobs: list[Job],
    batch_size: int,
    settings: _Settings,
    on_completion: Callable[[list[int]], None],
) -> None:
    """For models without a cache of keys and values that could be rearranged."""
    rows = [(job, i) for job in jobs for i in job.missing]
    # Prompts of one length together: not every model that keeps a state leaves padding out of it
    for _, group in groupby(sorted(rows, key=_prompt_length, reverse=True), _prompt_length):
        same_length = list(group)
        for start in range(0, len(same_length), batch_size):
            together = same_length[start : start + batch_size]
            completions = _generate(model, together, settings)
            for (job, i), ids in zip(together, completions, strict=True):
                job.results[i] = ids
                on_completion(ids)


def _sample_continuously(
    model: PreTrainedModel,
    jobs: list[Job],
    batch_size: int,
    settings: _Settings,
    on_completion: Callable[[list[int]], None],
) -> None:
    waiting = deque(_groups(jobs, batch_size))
    batch = _Batch(model, settings)
    while waiting or batch.rows:
        entering, free = [], batch_size - len(batch.rows)
        if free == batch_size or free >= batch_size // 4:  # a few at a time: each entry is a pass over prompts
            while waiting and len(waiting[0][1]) <= free:
                entering.append(waiting.popleft())
                free -= len(entering[-1][1])
        for together in _by_tokens(entering):
            batch.enter(together)
        batch.advance()
        for job, i, ids in batch.leave():
            job.results[i] = ids
            on_completion(ids)


def _prompt_length(row: tuple[Job, int]) -> int:
    return len(row[0].prompt_ids)


def _groups(jobs: list[Job], batch_size: int) -> list[_Group]:
    """Completions of one prompt that enter the batch together: all of them, unless they are more than fit."""
    return [
        (job, job.missing[start : start + batch_size])
        for job in jobs
        for start in range(0, len(job.missing), batch_size)
    ]


def _by_tokens(groups: list[_Group]) -> Iterator[list[_Group]]:
    """Groups whose prompts run through the model together, as many as a pass may have tokens."""
    together: list[_Group] = []
    longest = 0
    for group in groups:
        longest = max(longest, len(group[0].prompt_ids))
        if together and longest * (len(together) + 1) > _PREFILL_TOKENS:
            yield together
            together, longest = [], len(group[0].prompt_ids)
        together.append(group)
    if together:
        yield together


class _Layer(DynamicLayer):
    """Keys and values in memory with room for further tokens, which is not copied for each token."""

    keys: Tensor | None
    values: Tensor | None
    _rooms: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        old = 0 if self.keys is None or self.keys.numel() == 0 else self.keys.size(2)
        new = old + key_states.size(2)
        if not self._rooms or new > self._rooms[0].size(2):
            self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
            rooms = []
            for states in (key_states, value_states):
                batch, heads, _, size = states.shape
                rooms.append(states.new_empty(batch, heads, new + _ROOM, size))
            if old:
                rooms[0][:, :, :old], rooms[1][:, :, :old] = self.keys, self.values
            self._rooms = tuple(rooms)
        self._rooms[0][:, :, old:new], self._rooms[1][:, :, old:new] = key_states, value_states
        self.keys, self.values = (room[:, :, :new] for room in self._rooms)
        return self.keys, self.values

    def repeat_rows(self, repeats: Tensor) -> None:
        """Each row as many times as `repeats` says. As in what follows, only its keys, or values, are there twice."""
        assert self.keys is not None and self.values is not None
        self._rooms = ()  # made with the next token
        self.keys = self.keys.repeat_interleave(repeats, dim=0)
        self.values = self.values.repeat_interleave(repeats, dim=0)

    def take_rows_of(self, other: "_Layer") -> None:
        """Moves the rows of another layer beneath its own."""
        self._rooms = other._rooms = ()
        assert self.keys is not None and other.keys is not None
        self.keys, other.keys = _stack(self.keys, other.keys), None
        assert self.values is not None and other.values is not None
        self.values, other.values = _stack(self.values, other.values), None

    def keep(self, rows: Tensor, first: int) -> None:
        """Keeps some rows, from the column `first` on."""
        assert self.keys is not None and self.values is not None
        self._rooms = ()
        self.keys = self.keys[rows, :, first:]
        self.values = self.values[rows, :, first:]


def _cache() -> DynamicCache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = _Layer
    return cache


class _Batch:
    """
    The completions being sampled. They end in the same column; shorter ones are padded in front.

    When rows enter or leave, keys and values are copied one layer after the other: all at once would need the memory
    two or three times.
    """

    def __init__(self, model: PreTrainedModel, settings: _Settings):
        self.model, self.settings = model, settings
        self.rows: list[tuple[Job, int, list[int]]] = []  # job, number of the completion, its tokens so far
        self.cache = _cache()
        self.cache_argument = cache_argument(model)
        self.real = torch.zeros(0, 0, dtype=torch.long, device=model.device)  # (rows, length): 0 is padding
        self.last_ids = torch.zeros(0, dtype=torch.long, device=model.device)
        self.are_finite: list[Tensor] = []  # whether logits were, at each token since the last check

    def enter(self, groups: list[_Group]) -> None:
        """Runs the prompts through the model and adds a row for each of their completions."""
        device = self.model.device
        length = max(len(job.prompt_ids) for job, _ in groups)
        input_ids = torch.full((len(groups), length), self.settings.pad_id)
        real = torch.zeros(len(groups), length, dtype=torch.long)
        for row, (job, _) in enumerate(groups):
            input_ids[row, length - len(job.prompt_ids) :] = torch.tensor(job.prompt_ids)
            real[row, length - len(job.prompt_ids) :] = 1
        real, cache = real.to(device), _cache()
        logits = self._run(input_ids.to(device), real, cache)
        repeats = torch.tensor([len(numbers) for _, numbers in groups], device=device)
        new_rows: list[tuple[Job, int, list[int]]] = [(job, i, []) for job, numbers in groups for i in numbers]
        new_ids = self._draw(logits.repeat_interleave(repeats, dim=0), new_rows, 0)
        _check_finite(self.model, self.are_finite)
        for (*_, ids), token in zip(new_rows, new_ids.tolist(), strict=True):
            ids.append(token)

        real = real.repeat_interleave(repeats, dim=0)
        if self.rows:
            for old, new in zip(self.cache.layers, cache.layers, strict=True):
                new.repeat_rows(repeats)
                old.take_rows_of(new)
            real = _stack(self.real[..., None], real[..., None])[..., 0]
        else:
            for new in cache.layers:
                new.repeat_rows(repeats)
            self.cache = cache
        self.real = real
        self.rows += new_rows
        self.last_ids = torch.cat([self.last_ids, new_ids])

    def advance(self) -> None:
        """Adds a few tokens to every row; what is too much in those that end meanwhile is cut off when they leave."""
        columns: list[Tensor] = []
        for _ in range(min(_STRIDE, self.settings.max_new_tokens - max(len(ids) for *_, ids in self.rows))):
            self.real = torch.cat([self.real, torch.ones_like(self.real[:, :1])], dim=1)
            logits = self._run(self.last_ids[:, None], self.real, self.cache)
            self.last_ids = self._draw(logits, self.rows, len(columns))
            columns.append(self.last_ids)
        _check_finite(self.model, self.are_finite)
        new_ids = torch.stack(columns, dim=1).tolist() if columns else [[]] * len(self.rows)
        for (*_, ids), of_row in zip(self.rows, new_ids, strict=True):
            ids += of_row

    def leave(self) -> list[tuple[Job, int, list[int]]]:
        """Takes out the rows that have ended. Returns job, number and tokens of each."""
        ended, staying, end_ids = [], [], self.settings.end_ids
        for row, (job, i, ids) in enumerate(self.rows):
            end = next((n + 1 for n, token in enumerate(ids) if token in end_ids), len(ids))
            if end < len(ids) or ids[-1] in end_ids or len(ids) >= self.settings.max_new_tokens:
                ended.append((job, i, ids[:end]))
            else:
                staying.append(row)
        if ended:
            keep = torch.tensor(staying, dtype=torch.long, device=self.real.device)
            self.rows = [self.rows[row] for row in staying]
            self.real, self.last_ids = self.real[keep], self.last_ids[keep]
            first = int(self.real.any(dim=0).long().argmax()) if staying else 0  # columns before are all padding
            self.real = self.real[:, first:]
            if not staying:
                self.cache = _cache()
            for layer in self.cache.layers:
                layer.keep(keep, first)
        return ended

    def _run(self, input_ids: Tensor, real: Tensor, cache: DynamicCache) -> Tensor:
        """Logits after the last token of each row, `(rows, vocabulary)`."""
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.size(1) :]
        return self.model(
            input_ids=input_ids,
            attention_mask=real,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_argument: cache},
        ).logits[:, -1]

    def _draw(self, logits: Tensor, rows: list[tuple[Job, int, list[int]]], offset: int) -> Tensor:
        """Tokens for some rows, `offset` tokens beyond those they have in their lists."""
        places = [(job, i, len(ids) + offset) for job, i, ids in rows]
        drawn, is_finite = _draw(logits, places, self.settings.top_p)
        self.are_finite.append(is_finite)
        return drawn


def _stack(above: Tensor, below: Tensor) -> Tensor:
    """Puts rows beneath rows, all ending in the same column (dimension -2); what is missing in front is 0."""
    length = max(above.size(-2), below.size(-2))
    padded = [torch.nn.functional.pad(t, (0, 0, length - t.size(-2), 0)) for t in (above, below)]
    return torch.cat(padded)


def _check_finite(model: PreTrainedModel, are_finite: list[Tensor]) -> None:
    if are_finite and not torch.stack(are_finite).all():
        raise LarPOError(
            f"The logits of the model are NaN or infinite in {str(model.dtype).removeprefix('torch.')}. If its weights "
            "are sound, sample with a larger range: `generation_dtype: float32`, or bfloat16."
        )
    are_finite.clear()


def _draw(logits: Tensor, places: list[tuple[Job, int, int]], top_p: float) -> tuple[Tensor, Tensor]:
    """
    One token for each row.

    Args:
        logits: `(rows, vocabulary)`.
        places: For each row its job, the number of the completion and the number of the token in it.
        top_p: Nucleus sampling threshold.

    Returns:
        Token ids `(rows,)`, and whether the largest logits of all rows are finite, a scalar. Of others, any token.
    """
    temperatures = torch.tensor([job.temperatures[i] for job, i, _ in places], device=logits.device)[:, None]
    greedy = logits.argmax(dim=-1)  # NaN counts as the largest
    is_finite = logits.gather(1, greedy[:, None]).isfinite().all()
    if not temperatures.any():
        return greedy, is_finite
    uniforms = [job.uniforms[i, n] for job, i, n in places]
    logits = logits.float() / torch.where(temperatures > 0, temperatures, 1.0)
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    if top_p < 1:
        ordered, _ = weights.sort(dim=-1, descending=True)
        before = (ordered.cumsum(dim=-1) - ordered) / ordered.sum(dim=-1, keepdim=True)
        smallest = torch.where(before < top_p, ordered, torch.inf).amin(dim=-1, keepdim=True)
        weights = torch.where(weights >= smallest, weights, 0.0)
    drawn = _inverse_cdf(weights, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))
    return torch.where(temperatures[:, 0] > 0, drawn.clamp(max=logits.size(1) - 1), greedy), is_finite


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """
    The index at which the running sum of each row first exceeds its uniform number times the row's sum.

    Sums by blocks first and looks into one block then: the running sum over a whole vocabulary would cost more than the
    softmax.
    """
    weights = torch.nn.functional.pad(weights, (0, -weights.size(1) % _BLOCK)).view(weights.size(0), -1, _BLOCK)
    blocks = weights.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target = uniforms[:, None] * blocks[:, -1:]
    block = _first_above(blocks, target)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = weights[torch.arange(len(weights), device=weights.device), block[:, 0]].double().cumsum(dim=1)
    # Rounding can leave the target beyond the block's sum: then the last entry with any weight counts
    return (block * _BLOCK + _first_above(inside, target - before))[:, 0]


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    index = torch.searchsorted(sums, target, right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(index, last).clamp(max=sums.size(1) - 1)  # NaN is beyond the end


class _DrawWithOwnNumbers(LogitsProcessor):
    """Draws the token itself and leaves `generate` no other choice."""

    def __init__(self, rows: list[tuple[Job, int]], prompt_length: int, top_p: float):
        self.rows, self.prompt_length, self.top_p = rows, prompt_length, top_p
        self.are_finite: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        number = input_ids.size(1) - self.prompt_length
        drawn, is_finite = _draw(scores, [(job, i, number) for job, i in self.rows], self.top_p)
        self.are_finite.append(is_finite)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


def _generate(model: PreTrainedModel, rows: list[tuple[Job, int]], settings: _Settings) -> list[list[int]]:
    """Completions by `generate`, for models that keep something else than keys and values. Prompts of one length."""
    input_ids = torch.tensor([job.prompt_ids for job, _ in rows], device=model.device)
    length = input_ids.size(1)
    draw = _DrawWithOwnNumbers(rows, length, settings.top_p)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=sorted(settings.end_ids) or None,
        pad_token_id=settings.pad_id,
        logits_processor=LogitsProcessorList([draw]),
    )
    _check_finite(model, draw.are_finite)
    completions, end_ids = output[:, length:].tolist(), settings.end_ids
    return [ids[: next((n + 1 for n, token in enumerate(ids) if token in end_ids), len(ids))] for ids in completions]
