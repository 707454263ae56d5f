"""
Shared prompts on FlashAttention, whose kernels take no mask, but sequences of any length behind one another.

Their contract (flash-attn 2.1 and later): a sequence may have more keys than queries. Its last query sees all of its
keys, and each query before it one key fewer; a sliding window is counted from there. So a candidate is a sequence whose
queries are its own tokens and whose keys are those of its prompt and its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .token_rows import Rows

_ORIGINALS: dict[Callable, Callable] = {}
"""Attention functions registered here → those of transformers that they call."""


@dataclass
class VariableLengths:
    """
    The sequences that prompts and candidates are for attention.

    Queries stay where they are: in a packed row, sequences follow one another. The keys of a prompt are gathered once
    for each of its candidates, because the kernels take the keys of each sequence from a place of its own.

    Attributes:
        keys: int64 `(keys,)`, which tokens the keys of the sequences are, counted over prompts that are kept outside
            the row (all of them, with their padding), then over the row.
        query_ends: int32 `(sequences + 1,)`, where the queries of each sequence end, from 0 on.
        key_ends: int32, same shape, the same of keys.
        max_queries: Most queries of a sequence.
        max_keys: Most keys of a sequence.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int

    @property
    def tensors(self) -> list[Tensor]:
        """Those whose sizes change from batch to batch."""
        return [self.keys, self.query_ends, self.key_ends]

    def attend(self, attention, module, query: Tensor, key: Tensor, value: Tensor, prompts, *args, **kwargs):
        """FlashAttention over the sequences; `prompts` are keys and values that are kept outside the row, or `None`."""
        of_prompts = (None, None) if prompts is None else prompts
        key, value = (_gather(states, before, self) for states, before in zip((key, value), of_prompts, strict=True))
        kwargs |= {
            "cu_seq_lens_q": self.query_ends,
            "cu_seq_lens_k": self.key_ends,
            "max_length_q": self.max_queries,
            "max_length_k": self.max_keys,
            "position_ids": None,  # the other way to say where sequences begin
            "is_causal": True,
        }
        return attention(module, query, key, value, None, *args, **kwargs)


def variable_lengths(rows: Rows, prompt_real: Tensor | None = None) -> VariableLengths:
    """
    Takes a packed row apart.

    Args:
        rows: One row of several lists, as [`pack`][trl_larpo.training.token_rows.pack] makes it. Padding is a sequence
            of its own.
        prompt_real: bool `(lists, prompt_length)`, where prompts that are kept outside the row have tokens.
    """
    assert rows.lists is not None and len(rows.lists) == 1
    lists = torch.where(rows.real[0], rows.lists[0], -1)
    segments = torch.where(rows.real[0], rows.segments[0], 0)
    num_lists = int(rows.lists.max()) + 1
    sequences, num_queries = torch.unique_consecutive(
        torch.stack([lists, segments]), dim=1, return_counts=True
    )  # (2, sequences), (sequences,)
    of_list, segment = sequences
    query_ends = num_queries.cumsum(dim=0)
    # Where the prompt of each list is, and how long
    if prompt_real is None:
        first_queries = query_ends - num_queries
        is_prompt = (of_list >= 0) & (segment == 0)
        prompt_starts, prompt_lengths = torch.zeros(2, num_lists, dtype=torch.long, device=lists.device)
        prompt_starts[of_list[is_prompt]] = first_queries[is_prompt]
        prompt_lengths[of_list[is_prompt]] = num_queries[is_prompt]
        row_start = 0
    else:
        prompt_starts = torch.arange(len(prompt_real), device=lists.device) * prompt_real.size(1)
        prompt_lengths = prompt_real.sum(dim=1)
        row_start = prompt_real.numel()
    shared = torch.where(segment > 0, prompt_lengths[of_list.clamp(min=0)], 0)
    num_keys = shared + num_queries
    key_ends = num_keys.cumsum(dim=0)

    sequence = torch.repeat_interleave(num_keys)
    offset = torch.arange(len(sequence), device=lists.device) - (key_ends - num_keys)[sequence]
    in_prompt = prompt_starts[of_list.clamp(min=0)][sequence] + offset
    in_row = row_start + (query_ends - num_queries - shared)[sequence] + offset
    return VariableLengths(
        keys=torch.where(offset < shared[sequence], in_prompt, in_row),
        query_ends=F.pad(query_ends, (1, 0)).int(),
        key_ends=F.pad(key_ends, (1, 0)).int(),
        max_queries=int(num_queries.max()),
        max_keys=int(num_keys.max()),
    )


def uses_variable_lengths(model: PreTrainedModel) -> bool:
    """Whether attention of the model is a kernel of FlashAttention, from its own package or from the hub."""
    name = model.config.get_text_config()._attn_implementation
    attention: Any = None if name is None else ALL_ATTENTION_FUNCTIONS.get(name)
    attention = _ORIGINALS.get(attention, attention)
    attention = attention.func if isinstance(attention, partial) else attention  # transformers 4 binds kernels so
    return attention is flash_attention_forward


def enable_variable_lengths(model: PreTrainedModel, wrap: Callable[[Callable], Callable]) -> None:
    """
    Lets the FlashAttention of `model` take [`VariableLengths`].

    The function is registered under the name that it had: transformers reads from the name which kernel to load.

    Args:
        model: Bare model that [`uses_variable_lengths`].
        wrap: Makes an attention function of transformers one that does.
    """
    name = model.config.get_text_config()._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS[name]
    if attention not in _ORIGINALS:
        knowing = wrap(attention)
        _ORIGINALS[knowing] = attention
        AttentionInterface.register(name, knowing)


def _gather(states: Tensor, of_prompts: Tensor | None, split: VariableLengths) -> Tensor:
    """The keys or values of all sequences, `(1, heads, keys, head_size)`."""
    tokens = states.transpose(1, 2).flatten(0, 1)
    if of_prompts is not None:
        tokens = torch.cat([of_prompts.transpose(1, 2).flatten(0, 1), tokens])
    return tokens.index_select(0, split.keys).transpose(0, 1)[None]
