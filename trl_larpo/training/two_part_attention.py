"""
Shared prompts with PyTorch's own build of FlashAttention, for models that run SDPA on a GPU in half precision.

Attention of a packed row is worked out in two parts: every prompt and every candidate over itself, which is causal;
then all candidates of a list over their prompt, which needs no mask. The softmax of a candidate's token is over the
keys of both, so the parts are weighted by their shares of its normalizer. No key is copied, and nothing is computed
that separate rows would not compute.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .token_rows import Rows


@dataclass
class TwoParts:
    """
    The sequences of a packed row, whose prompts come before its candidates.

    Attributes:
        own: Every prompt and candidate, and the padding: queries and keys of the whole row.
        prompts: The lists: queries of all candidates, keys of all prompts.
        num_prompt_tokens: Tokens of all prompts.
        num_candidate_tokens: Tokens of all candidates.
        sees: Works out what the tokens of the row see, bool `(length, length)`, `[query, key]`; to compare with.
        deviations: See [`recorded_deviations`].
    """

    own: "Sequences"
    prompts: "Sequences"
    num_prompt_tokens: int
    num_candidate_tokens: int
    sees: Callable[[], Tensor]
    deviations: list[float] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those whose sizes change from batch to batch."""
        return [self.own.query_ends, self.prompts.query_ends, self.prompts.key_ends]

    @property
    def candidates(self) -> slice:
        """Where the candidates' tokens are in the row."""
        return slice(self.num_prompt_tokens, self.num_prompt_tokens + self.num_candidate_tokens)

    @torch.compiler.disable
    def attend(self, attention, module, query: Tensor, key: Tensor, value: Tensor, prompts, *args, **kwargs):
        """Attention of a row, in place of SDPA. Returns `(1, length, heads, head_size)`, and `None` for the weights."""
        unknown = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
        if unknown:
            raise NotImplementedError(f"attention in two parts takes no {', '.join(unknown)}")
        states = [of_row[0].transpose(0, 1) for of_row in (query, key, value)]
        device = query.device.type
        if torch.is_autocast_enabled(device) and query.dtype == torch.float32:
            states = [of_row.to(torch.get_autocast_dtype(device)) for of_row in states]
        scale = query.size(-1) ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        options = self, scale, kwargs.get("dropout", 0.0)
        if self.deviations is not None:
            self.deviations.append(_deviation(states, options))
        return _TwoPartAttention.apply(*states, *options)[None], None


@dataclass
class Sequences:
    """
    Sequences behind one another, queries and keys each.

    Attributes:
        query_ends: int32 `(sequences + 1,)`, where the queries of each sequence end, from 0 on.
        key_ends: int32, same shape, the same of keys.
        max_queries: Most queries of a sequence.
        max_keys: Most keys of a sequence.
        is_causal: Whether a query sees no key after its own; there are as many keys as queries then.
    """

    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int
    is_causal: bool


def two_parts(rows: Rows) -> TwoParts | None:
    """
    Takes a packed row apart. `None` where a list has no prompt to share, as the kernels are not asked for no keys.

    Args:
        rows: One row of several lists, as [`pack`][trl_larpo.training.token_rows.pack] makes it.
    """
    assert rows.lists is not None and len(rows.lists) == 1
    lists = torch.where(rows.real[0], rows.lists[0], -1)
    segments = torch.where(rows.real[0], rows.segments[0], 0)
    _, lengths = torch.unique_consecutive(torch.stack([lists, segments]), dim=1, return_counts=True)
    is_candidate = rows.real[0] & (segments > 0)
    num_lists = int(lists.max()) + 1
    totals = lengths.new_zeros(2, num_lists)  # prompts, candidates
    totals.index_put_((is_candidate.long(), lists.clamp(min=0)), rows.real[0].long(), accumulate=True)
    sizes = torch.cat([lengths.max()[None], totals.amax(dim=1), totals[:1].amin(dim=1), totals.sum(dim=1)]).tolist()
    longest, longest_prompt, most_queries, shortest_prompt, num_prompt_tokens, num_candidate_tokens = sizes
    if shortest_prompt == 0 or num_candidate_tokens == 0:
        return None
    own_ends = _ends(lengths)
    prompt_ends, candidate_ends = _ends(totals[0]), _ends(totals[1])
    return TwoParts(
        Sequences(own_ends, own_ends, longest, longest, is_causal=True),
        Sequences(candidate_ends, prompt_ends, most_queries, longest_prompt, is_causal=False),
        num_prompt_tokens,
        num_candidate_tokens,
        partial(_visible, lists, segments),
    )


@contextmanager
def recorded_deviations(parts: Any) -> Iterator[list[float]]:
    """In it, each layer that works on some `TwoParts` adds how far it is from SDPA in float32 on the same states."""
    assert isinstance(parts, TwoParts)
    parts.deviations = []
    try:
        yield parts.deviations
    finally:
        parts.deviations = None


def _visible(lists: Tensor, segments: Tensor) -> Tensor:
    index = torch.arange(len(lists), device=lists.device)
    seen = (segments == 0) | (segments == segments[:, None])
    return seen & (lists == lists[:, None]) & (index[:, None] >= index)


def _deviation(states: list[Tensor], options: tuple[TwoParts, float, float]) -> float:
    """How far the worst of output and gradients is from SDPA in float32, as a share of its norm."""
    parts, scale, _ = options
    weights = torch.linspace(0, 20, states[0].numel(), device=states[0].device).view_as(states[0]).cos()

    def in_two_parts(*leaves: Tensor) -> Tensor:
        return _TwoPartAttention.apply(*leaves, parts, scale, 0.0)

    def by_sdpa(*leaves: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in leaves)
        key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, parts.sees(), scale=scale)[0].transpose(0, 1)

    def results(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in states]
        with torch.enable_grad(), torch.autocast(weights.device.type, enabled=False):
            output = attention(*leaves)
            return [output.detach(), *torch.autograd.grad((weights * output).sum(), leaves)]

    def deviation(found: list[Tensor]) -> float:
        # Gradients of what hardly matters are rounding alone, as those of queries and keys where all values are equal
        norms = [expected[0].norm(), *(y.norm().clamp(min=1e-2 * largest) for y in expected[1:])]
        return max(float((x - y).norm() / n) for x, y, n in zip(found, expected, norms, strict=True))

    expected = results(by_sdpa, torch.float32)
    largest = max(float(y.norm()) for y in expected[1:])
    return deviation(results(in_two_parts, states[0].dtype))


def _ends(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(dim=0), (1, 0)).int()


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's FlashAttention runs here. What it cannot do of a model, the proof on the model finds."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and hasattr(torch.ops.aten, "_flash_attention_forward")
    )


class _TwoPartAttention(torch.autograd.Function):
    """
    Tensors are `(tokens, heads, head_size)`; keys and values may have fewer heads.

    The backward pass of a kernel works out the probabilities of its keys from the normalizer that it is given. Given
    that of both parts, and what both parts come to, it returns the gradients through the whole softmax.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, parts: TwoParts, scale: float, dropout: float
    ) -> Tensor:
        prompts, candidates = slice(parts.num_prompt_tokens), parts.candidates
        output, normalizer, state = _forward(query, key, value, parts.own, scale, dropout)
        of_prompts, of_prompts_normalizer, prompts_state = _forward(
            query[candidates], key[prompts], value[prompts], parts.prompts, scale, dropout
        )
        own_normalizer = normalizer[:, candidates]
        # In half precision, the share that is rounded is the smaller one as a rule
        share = torch.sigmoid(own_normalizer - of_prompts_normalizer).t()[:, :, None].to(output.dtype)
        torch.lerp(of_prompts, output[candidates], share, out=output[candidates])
        torch.logaddexp(own_normalizer, of_prompts_normalizer, out=own_normalizer)
        ctx.save_for_backward(query, key, value, output, normalizer)
        ctx.parts, ctx.options, ctx.states = parts, (scale, dropout), (state, prompts_state)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        query, key, value, output, normalizer = ctx.saved_tensors
        parts: TwoParts = ctx.parts
        prompts, candidates = slice(parts.num_prompt_tokens), parts.candidates
        (scale, dropout), (state, prompts_state) = ctx.options, ctx.states
        gradient = gradient.contiguous()
        of_query, of_key, of_value = _backward(
            gradient, query, key, value, output, normalizer, parts.own, scale, dropout, state
        )
        more_of_query, more_of_key, more_of_value = _backward(
            gradient[candidates], query[candidates], key[prompts], value[prompts], output[candidates],
            normalizer[:, candidates].contiguous(), parts.prompts, scale, dropout, prompts_state,
        )  # fmt: skip
        of_query[candidates].add_(more_of_query)  # `+=` would copy the sum to its own place
        of_key[prompts].add_(more_of_key)
        of_value[prompts].add_(more_of_value)
        return of_query, of_key, of_value, None, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, dropout: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """What the queries see, the logarithms of their normalizers `(heads, queries)`, and what the kernel wants back."""
    if not has_kernel(query.device, query.dtype):
        if dropout > 0:
            raise NotImplementedError(f"no kernel here takes {query.dtype} and dropout of attention")
        return *_plain_forward(query, key, value, sequences, scale), ()
    output, normalizer, *state, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, sequences.query_ends, sequences.key_ends, sequences.max_queries, sequences.max_keys,
        dropout, sequences.is_causal, False, scale=scale,
    )  # fmt: skip
    return output, normalizer, tuple(state)


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, normalizer: Tensor,
    sequences: Sequences, scale: float, dropout: float, state: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values."""
    if not has_kernel(query.device, query.dtype):
        return _plain_backward(gradient, query, key, value, output, normalizer, sequences, scale)
    return torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, normalizer, sequences.query_ends, sequences.key_ends,
        sequences.max_queries, sequences.max_keys, dropout, sequences.is_causal, *state, scale=scale,
    )  # fmt: skip


# The same for every device and precision: layouts are proved in float32, and tested without a GPU


def _plain_forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float
) -> tuple[Tensor, Tensor]:
    outputs, normalizers = [], []
    for queries, keys in _each(sequences):
        scores = _scores(query[queries], key[keys], sequences, scale)
        normalizers.append(scores.logsumexp(dim=2))
        probabilities = (scores - normalizers[-1][:, :, None]).exp()
        outputs.append(torch.einsum("hqk,khd->qhd", probabilities, _repeated(value[keys], query.size(1)).float()))
    return torch.cat(outputs).to(query.dtype), torch.cat(normalizers, dim=1)


def _plain_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, normalizer: Tensor,
    sequences: Sequences, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    heads = query.size(1)
    of_query, of_key, of_value = (torch.zeros_like(states, dtype=torch.float32) for states in (query, key, value))
    for queries, keys in _each(sequences):
        probabilities = (_scores(query[queries], key[keys], sequences, scale) - normalizer[:, queries, None]).exp()
        of_output = gradient[queries].float()
        of_value[keys] += _summed(torch.einsum("hqk,qhd->khd", probabilities, of_output), value.size(1))
        of_probabilities = torch.einsum("qhd,khd->hqk", of_output, _repeated(value[keys], heads).float())
        mean = (of_output * output[queries].float()).sum(dim=2).t()
        of_scores = scale * probabilities * (of_probabilities - mean[:, :, None])
        of_query[queries] += torch.einsum("hqk,khd->qhd", of_scores, _repeated(key[keys], heads).float())
        of_key[keys] += _summed(torch.einsum("hqk,qhd->khd", of_scores, query[queries].float()), key.size(1))
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def _each(sequences: Sequences) -> Iterator[tuple[slice, slice]]:
    query_ends, key_ends = sequences.query_ends.tolist(), sequences.key_ends.tolist()
    for i in range(len(query_ends) - 1):
        yield slice(*query_ends[i : i + 2]), slice(*key_ends[i : i + 2])


def _scores(query: Tensor, key: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """float32 `(heads, queries, keys)`."""
    scores = scale * torch.einsum("qhd,khd->hqk", query.float(), _repeated(key, query.size(1)).float())
    if sequences.is_causal:
        scores.masked_fill_(scores.new_ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return scores


def _repeated(states: Tensor, heads: int) -> Tensor:
    """Keys or values as many times as there are query heads for each of them."""
    return states.repeat_interleave(heads // states.size(1), dim=1)


def _summed(gradients: Tensor, heads: int) -> Tensor:
    return gradients.unflatten(1, (heads, -1)).sum(dim=2)
