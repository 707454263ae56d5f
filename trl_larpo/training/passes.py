"""
How the candidates of a batch become the calls of a model: in which rows, and how many at a time.

With a chunk size, each chunk of candidates but the last runs under checkpointing: what its backward pass needs is
computed again when it is needed, and freed before the next chunk. Of a whole list there remain the hidden states that
the head reads. So memory hardly grows with the list, gradients are exact, and there is one backward pass.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from .attention import SplitRows, attention_masks, split_rows, uses_blocks
from .token_rows import Batch, Rows, candidate_rows, extend, pack, prompt_rows, separate_rows, shared_prompt_rows
from .two_part_attention import TwoParts, two_parts
from .variable_length import VariableLengths, uses_variable_lengths, variable_lengths

BLOCK = 128
"""Tokens of a block of FlexAttention's masks. Its code is compiled for the second length, and then for all others."""


class Layout(Enum):
    """What the rows of a model hold, and how its attention treats them."""

    PACKED = "one row for all lists, whose attention is worked out in two parts"
    SPLIT = "one row for each list, taken apart for attention"
    SHARED = "one row for each list"
    PROMPT_FIRST = "the prompt of a list once, then its candidates, which read its keys and values"
    SEPARATE = "a row for each completion, with the prompt in each"

    @property
    def shares_prompt(self) -> bool:
        return self is not Layout.SEPARATE


@dataclass
class Call:
    """
    One call of the model.

    Attributes:
        rows: The rows it is given.
        mask: What they see, as `attention_mask`. `None` where `split` says it.
        with_positions: Whether to tell the model the positions of the tokens, which it works out itself in plain rows.
        split: How attention takes the rows apart, `None` where it does not.
        scored: int64 `(scored tokens,)`, the places that predict them, in flattened rows.
    """

    rows: Rows
    mask: "Tensor | BlockMask | dict[str, Tensor | BlockMask] | None"
    with_positions: bool
    split: SplitRows | VariableLengths | TwoParts | None = None

    def __post_init__(self):
        self.scored = self.rows.scored.flatten().nonzero()[:, 0]  # now, as it makes the host wait for the device


@dataclass
class Prompts:
    """
    Prompts that run once before the calls that read their keys and values.

    Attributes:
        input_ids: int64 `(lists, prompt_length)`.
        real: bool, same shape, `False` in the padding.
        weights: int64, same shape, as in [`Rows`].
        positions: int64, same shape.
    """

    input_ids: Tensor
    real: Tensor
    weights: Tensor
    positions: Tensor


@dataclass
class Pass:
    """
    Lists that go through the model together.

    Attributes:
        calls: Their candidates, in chunks that the model is given one after the other.
        prompts: Their prompts where these run first, else `None`.
        recompute: Whether the backward pass computes the calls again.
    """

    calls: list[Call]
    prompts: Prompts | None = None
    recompute: bool = field(default=True)


class PassMemory:
    """
    The passes of the last batch, for the second of two models that score each batch one after the other.

    They are kept from the first time on that a batch was scored twice.
    """

    def __init__(self):
        self._kept: tuple[Batch, Any, list[Pass]] | None = None
        self._last_batch: int | None = None
        self._is_asked_for = False

    def keep(self, batch: Batch, kind: Any, passes: list[Pass]) -> None:
        """Args as in `take`."""
        self._last_batch = id(batch)
        self._kept = (batch, kind, passes) if self._is_asked_for else None

    def take(self, batch: Batch, kind: Any) -> list[Pass] | None:
        """
        Passes are given back once.

        Args:
            batch: The batch; the same object, not one that is equal.
            kind: What passes depend on beside it. None are given to a scorer of another kind.
        """
        self._is_asked_for |= id(batch) == self._last_batch
        kept, self._kept = self._kept, None
        return kept[2] if kept is not None and kept[0] is batch and kept[1] == kind else None


def whole_pass(
    model: PreTrainedModel, batch: Batch, layout: Layout, pad_to_multiple_of: int | None = None
) -> list[Pass]:
    """
    All candidates of a batch at once.

    Args:
        model: Model the pass is for, bare or as a `PeftModel`.
        batch: As [`DataCollatorForCandidateLists`] makes it.
        layout: `PACKED`, `SPLIT`, `SHARED` or `SEPARATE`.
        pad_to_multiple_of: The length of the rows is padded to a multiple of this.
    """
    lay_out = shared_prompt_rows if layout.shares_prompt else separate_rows
    rows = lay_out(batch, pad_to_multiple_of)
    return [Pass([_call(model, rows, layout, multiple=pad_to_multiple_of)], recompute=False)]


def passes_in_chunks(
    model: PreTrainedModel,
    batch: Batch,
    layout: Layout,
    chunk_size: int,
    list_size: int,
    *,
    longest: int | None = None,
    multiple: int | None = None,
) -> list[Pass]:
    """
    The candidates of a batch, at most `chunk_size` at a time. Lists are cut only where a whole one does not fit.

    Args:
        model: Model the passes are for, bare or as a `PeftModel`.
        batch: As [`DataCollatorForCandidateLists`] makes it.
        layout: `PROMPT_FIRST`, `SHARED` or `SPLIT` (the prompt in the rows of each chunk) or `SEPARATE`.
        chunk_size: Most candidates in a chunk.
        list_size: What lists are taken to hold, at least `batch`'s own. Processes that work together must agree on it,
            because all take part in every pass.
        longest: Tokens of the longest sequence, for models whose position embeddings depend on it: all calls then see
            the same.
        multiple: The lengths of rows and of prompts are padded to multiples of this.
    """
    of_prompts = {name: tensor for name, tensor in batch.items() if name.startswith("prompt_")}
    missing = list_size - batch["candidate_mask"].size(1)
    of_candidates = {
        name: F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, missing])
        for name, tensor in batch.items()
        if name not in of_prompts
    }
    lists_per_pass, candidates_per_chunk = max(1, chunk_size // list_size), min(chunk_size, list_size)
    passes = []
    for start in range(0, of_prompts["prompt_ids"].size(0), lists_per_pass):
        lists = slice(start, start + lists_per_pass)
        of_these = {name: tensor[lists] for name, tensor in of_prompts.items()}
        chunks = [
            of_these
            | {name: tensor[lists, first : first + candidates_per_chunk] for name, tensor in of_candidates.items()}
            for first in range(0, list_size, candidates_per_chunk)
        ]
        lay_out = {
            Layout.PROMPT_FIRST: candidate_rows,
            Layout.SHARED: shared_prompt_rows,
            Layout.SPLIT: shared_prompt_rows,
            Layout.SEPARATE: separate_rows,
        }[layout]
        prompts = None
        if layout is Layout.PROMPT_FIRST:
            prompts = _prompts(of_these, of_candidates["candidate_mask"][lists].sum(dim=1), longest, multiple)
        calls = [_call(model, lay_out(chunk, multiple), layout, prompts, longest, multiple) for chunk in chunks]
        passes.append(Pass(calls, prompts))
    return passes


def _call(
    model: PreTrainedModel,
    rows: Rows,
    layout: Layout,
    prompts: Prompts | None = None,
    longest: int | None = None,
    multiple: int | None = None,
) -> Call:
    if layout is Layout.SEPARATE:
        if longest is not None:  # where sequences are cut at the start, these begin at 0 again
            positions = torch.arange(rows.real.size(1), device=rows.real.device).clamp(max=longest - 1)
            rows.positions = positions.expand(len(rows.real), -1)
            rows = extend(rows, longest - 1, multiple or 1)
        # A row that is all padding must see something, or its softmax is over nothing
        seen = rows.real | (torch.arange(rows.real.size(1), device=rows.real.device) == 0)
        return Call(rows, seen.long(), with_positions=longest is not None)
    if layout is Layout.PACKED:
        packed = pack(rows, multiple or 1, prompts_first=True)
        if (parts := two_parts(packed)) is not None:
            return Call(packed, packed.real[:, None, None], True, parts)  # a mask that models leave as it is
    has_variable_lengths = uses_variable_lengths(model)
    if has_variable_lengths:
        rows = pack(rows, multiple or 1)
    elif uses_blocks(model):
        rows = pack(rows, BLOCK)
    if longest is not None:
        rows = extend(rows, longest - 1, multiple or 1)
    prompt_real = None if prompts is None else prompts.real
    if has_variable_lengths:
        return Call(rows, None, True, variable_lengths(rows, prompt_real))
    if layout is Layout.SPLIT and (split := split_rows(rows)) is not None:
        return Call(rows, split.mask, True, split)
    return Call(rows, attention_masks(model, rows, prompt_real), True)


def _prompts(batch: Batch, num_candidates: Tensor, longest: int | None, multiple: int | None) -> Prompts:
    input_ids, real = prompt_rows(batch)
    positions = torch.arange(input_ids.size(1), device=real.device).expand(len(real), -1)
    if longest is not None:
        input_ids, real = torch.cat([input_ids, input_ids[:, :1]], dim=1), F.pad(real, (0, 1))
        positions = torch.cat([positions, torch.full_like(positions[:, :1], longest - 1)], dim=1)
    if padding := -input_ids.size(1) % (multiple or 1):
        input_ids = torch.cat([input_ids, input_ids[:, :1].expand(-1, padding)], dim=1)
        real, positions = F.pad(real, (0, padding)), F.pad(positions, (0, padding))
    return Prompts(input_ids, real, real * num_candidates[:, None], positions)
