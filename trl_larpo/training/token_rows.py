"""How the candidates of a batch are laid out in the rows a model sees: one row each, or one row per list."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = dict[str, Tensor]
"""As [`DataCollatorForCandidateLists`] makes it; and perhaps `scored_mask`, bool and of the shape of `completion_mask`,
`False` for tokens of a completion that the model did not write, such as the answer of a tool: seen, and not scored."""

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Layer number → keys and values of prompts, each `(lists, heads, prompt_length, head_size)`."""


@dataclass
class Rows:
    """
    Rows for a causal language model, and the way back from their tokens to the candidates.

    Attributes:
        input_ids: int64 `(rows, length)`. Padding holds the first token of the row's prompt: the embedding of a token
            called padding may be all zeros, where gradients of norms are NaN.
        labels: int64 `(rows, length)`, the tokens of completions that are to be scored, -100 elsewhere.
        real: bool `(rows, length)`, `False` in the padding.
        positions: int64 `(rows, length)`, position of each token in its own sequence of prompt and completion.
        segments: int64 `(rows, length)`. A token sees the tokens of segment 0 and of its own segment that come before
            it in the row. Segment 0 is the shared prompt; in separate rows it is empty.
        token_mask: bool `(batch, list_size, completion_length)`, `True` where a completion token is scored.
        token_index: int64, same shape; where the score of that token stands in a flattened `(rows, length - 1)` tensor.
        weights: int64 `(rows, length)`, in how many separate rows the token would stand: the number of candidates for
            tokens of a shared prompt, 1 for others, 0 in the padding.
        lists: int64 `(rows, length)`, which list a token is of, where a row holds several; they do not see each other.
    """

    input_ids: Tensor
    labels: Tensor
    real: Tensor
    positions: Tensor
    segments: Tensor
    token_mask: Tensor
    token_index: Tensor
    weights: Tensor
    lists: Tensor | None = None

    @property
    def scored(self) -> Tensor:
        """bool `(rows, length)`, where the next token is scored."""
        return F.pad(self.labels[:, 1:] != -100, (0, 1))

    def per_token(self, values: Tensor) -> Tensor:
        """
        Takes what the model says of each token to the completions.

        Args:
            values: `(rows, length - 1)`, the value at t belongs to token t + 1.

        Returns:
            `(batch, list_size, completion_length)`, 0 where no token is scored.
        """
        return values.flatten()[self.token_index].masked_fill(~self.token_mask, 0)


def separate_rows(batch: Batch, pad_to_multiple_of: int | None = None) -> Rows:
    """
    A row for each candidate: prompt and completion.

    Args:
        batch: As [`DataCollatorForCandidateLists`] makes it.
        pad_to_multiple_of: The length of the rows is padded to a multiple of this.
    """
    exists = batch["candidate_mask"]
    lists, candidates = exists.nonzero(as_tuple=True)
    if len(lists) == 0:  # a chunk past the end of its lists: one row of padding
        lists = candidates = torch.zeros(1, dtype=torch.long, device=exists.device)
    first = batch["first_position"] if "first_position" in batch else torch.zeros_like(exists, dtype=torch.long)
    lengths = ((sequence_lengths(batch) - first) * exists)[lists, candidates]
    rows = torch.zeros_like(exists, dtype=torch.long)
    rows[lists, candidates] = torch.arange(len(lists), device=exists.device)
    return _build(
        batch,
        pad_to_multiple_of or 1,
        list_of_row=lists,
        candidate_of_segment=candidates[:, None],
        segment_lengths=torch.stack([torch.zeros_like(lengths), lengths], dim=1),
        first=first,
        row_of=rows,
        segment_of=torch.ones_like(rows),
    )


def shared_prompt_rows(batch: Batch, pad_to_multiple_of: int | None = None) -> Rows:
    """
    A row for each list: the prompt but for its last token, then, for each candidate, that token and the completion.

    Every candidate begins with a copy of the prompt's last token, because that is where its first token is predicted;
    so labels stand one place after their prediction, as in any row. Positions of a candidate continue the prompt's.

    Args:
        batch: As [`DataCollatorForCandidateLists`] makes it, not cut at the start.
        pad_to_multiple_of: The length of the rows is padded to a multiple of this.
    """
    return _shared_rows(batch, pad_to_multiple_of or 1, with_prompt=True)


def pack(rows: Rows, multiple: int, prompts_first: bool = False) -> Rows:
    """
    All rows behind one another in one, without the padding between them.

    Worth it where attention leaves out what is masked.

    Args:
        rows: The rows.
        multiple: The length is padded to a multiple of this.
        prompts_first: Whether all prompts come before all candidates.
    """
    order = rows.real.flatten().nonzero()[:, 0]
    if prompts_first:
        is_candidate = rows.segments.flatten()[order] > 0
        order = torch.cat([order[~is_candidate], order[is_candidate]])
    length = rows.input_ids.size(1)
    padding = -(-max(2, len(order)) // multiple) * multiple - len(order)  # 2: something to predict, and from what

    def packed(values: Tensor, fill: int = 0) -> Tensor:
        return F.pad(values.flatten()[order], (0, padding), value=fill)[None]

    first_token = int(rows.input_ids[0, 0])

    place = torch.zeros(rows.real.numel(), dtype=torch.long, device=order.device)
    place[order] = torch.arange(len(order), device=order.device)
    # A score at t is of token t + 1: from there to where that token went
    row, column = rows.token_index // (length - 1), rows.token_index % (length - 1)
    return Rows(
        input_ids=packed(rows.input_ids, first_token),
        labels=packed(rows.labels, -100),
        real=packed(rows.real),
        positions=packed(rows.positions),
        segments=packed(rows.segments),
        token_mask=rows.token_mask,
        token_index=(place[row * length + column + 1] - 1).masked_fill(~rows.token_mask, 0),
        weights=packed(rows.weights),
        lists=packed(torch.arange(len(rows.real), device=order.device)[:, None].expand_as(rows.real)),
    )


def candidate_rows(batch: Batch, pad_to_multiple_of: int | None = None) -> Rows:
    """
    What [`shared_prompt_rows`] has after the prompt, for a prompt that is kept outside the rows.

    Args:
        batch: As [`DataCollatorForCandidateLists`] makes it, not cut at the start.
        pad_to_multiple_of: The length of the rows is padded to a multiple of this.
    """
    return _shared_rows(batch, pad_to_multiple_of or 1, with_prompt=False)


def prompt_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """
    The prompts without their last tokens: what goes before [`candidate_rows`].

    Args:
        batch: As [`DataCollatorForCandidateLists`] makes it, not cut at the start.

    Returns:
        Tokens, int64, padded with the first one, and which of them are real, bool, both `(batch, prompt_length - 1)`
        with at least one column.
    """
    lengths = batch["prompt_mask"].sum(dim=1) - 1
    length = max(1, int(lengths.max()))
    real = torch.arange(length, device=lengths.device) < lengths[:, None]
    prompt_ids = batch["prompt_ids"][:, :length]
    return torch.where(real, prompt_ids, prompt_ids[:, :1]), real


def extend(rows: Rows, position: int, columns: int = 1) -> Rows:
    """
    Rows with more padding at the end, at a given position.

    Some models work out their position embeddings from the largest position in a call. This padding makes it the same
    in all calls of a batch.

    Args:
        rows: The rows.
        position: Position of the new columns.
        columns: How many there are.
    """
    length = rows.input_ids.size(1)
    row, column = rows.token_index // (length - 1), rows.token_index % (length - 1)

    def extended(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(len(values), columns)], dim=1)

    def repeated(column: Tensor) -> Tensor:
        return column.expand(-1, columns)

    return Rows(
        input_ids=torch.cat([rows.input_ids, repeated(rows.input_ids[:, :1])], dim=1),
        labels=torch.cat([rows.labels, repeated(torch.full_like(rows.labels[:, :1], -100))], dim=1),
        real=extended(rows.real),
        positions=torch.cat([rows.positions, repeated(torch.full_like(rows.positions[:, :1], position))], dim=1),
        segments=torch.cat([rows.segments, repeated(rows.segments[:, -1:])], dim=1),
        token_mask=rows.token_mask,
        token_index=(row * (length - 1 + columns) + column).masked_fill(~rows.token_mask, 0),
        weights=extended(rows.weights),
        lists=None if rows.lists is None else torch.cat([rows.lists, repeated(rows.lists[:, -1:])], dim=1),
    )


def _shared_rows(batch: Batch, multiple: int, with_prompt: bool) -> Rows:
    exists = batch["candidate_mask"]
    batch_size, list_size = exists.shape
    shared = (batch["prompt_mask"].sum(dim=1) - 1).clamp(min=0)
    lengths = (sequence_lengths(batch) - shared[:, None]).masked_fill(~exists, 0)
    every_list = torch.arange(batch_size, device=exists.device)
    every_candidate = torch.arange(list_size, device=exists.device).expand(batch_size, -1)
    return _build(
        batch,
        multiple,
        list_of_row=every_list,
        candidate_of_segment=every_candidate,
        segment_lengths=torch.cat([shared[:, None] * with_prompt, lengths], dim=1),
        first=shared[:, None].expand(-1, list_size),
        row_of=every_list[:, None].expand(-1, list_size),
        segment_of=every_candidate + 1,
    )


def _build(
    batch: Batch,
    multiple: int,
    *,
    list_of_row: Tensor,  # (rows,)
    candidate_of_segment: Tensor,  # (rows, segments): segment s + 1 of a row belongs to this candidate
    segment_lengths: Tensor,  # (rows, 1 + segments)
    first: Tensor,  # (batch, list_size): position at which the candidate's segment begins
    row_of: Tensor,  # (batch, list_size)
    segment_of: Tensor,  # (batch, list_size)
) -> Rows:
    prompt_ids, completion_ids = batch["prompt_ids"], batch["completion_ids"]
    prompt_lengths, completion_lengths = batch["prompt_mask"].sum(dim=1), batch["completion_mask"].sum(dim=2)
    ends = segment_lengths.cumsum(dim=1)
    starts = ends - segment_lengths
    length = -(-max(2, int(ends[:, -1].max())) // multiple) * multiple  # 2: something to predict, and from what

    column = torch.arange(length, device=ends.device).expand(len(ends), -1).contiguous()
    real = column < ends[:, -1:]
    segments = torch.searchsorted(ends, column, right=True).clamp(max=ends.size(1) - 1)
    candidates = candidate_of_segment.gather(1, (segments - 1).clamp(min=0))
    lists = list_of_row[:, None]
    offset = column - starts.gather(1, segments)
    positions = offset + torch.where(segments > 0, first[lists, candidates], 0)
    positions = positions.masked_fill(~real, 0)
    in_completion = positions - prompt_lengths[lists]
    input_ids = torch.where(
        in_completion < 0,
        prompt_ids[lists, positions.clamp(max=prompt_ids.size(1) - 1)],
        completion_ids[lists, candidates, in_completion.clamp(0, completion_ids.size(2) - 1)],
    )
    input_ids = torch.where(real, input_ids, prompt_ids[lists, torch.zeros_like(lists)])
    # What a segment begins with has nothing before it that could predict it
    scored = real & (segments > 0) & (in_completion >= 0) & (offset > 0)
    if "scored_mask" in batch:
        scored &= batch["scored_mask"][lists, candidates, in_completion.clamp(0, completion_ids.size(2) - 1)]

    token = torch.arange(completion_ids.size(2), device=ends.device)
    place = prompt_lengths[:, None, None] + token - first[..., None]  # in its segment
    token_mask = batch["candidate_mask"][..., None] & (token < completion_lengths[..., None]) & (place > 0)
    if "scored_mask" in batch:
        token_mask &= batch["scored_mask"]
    token_index = row_of[..., None] * (length - 1) + starts[row_of, segment_of][..., None] + place - 1
    num_candidates = batch["candidate_mask"].sum(dim=1)[lists]
    return Rows(
        input_ids=input_ids,
        labels=input_ids.masked_fill(~scored, -100),
        real=real,
        positions=positions,
        segments=segments,
        token_mask=token_mask,
        token_index=token_index.masked_fill(~token_mask, 0),
        weights=torch.where(segments == 0, num_candidates, 1).masked_fill(~real, 0),
    )


def sequence_lengths(batch: Batch) -> Tensor:
    """Prompt plus completion in tokens, `(batch, list_size)`."""
    return batch["prompt_mask"].sum(dim=1)[:, None] + batch["completion_mask"].sum(dim=2)


def count_tokens(batch: Batch, shared_prompt: bool = False) -> Tensor:
    """Tokens that are no padding, in separate rows or in [`shared_prompt_rows`]. A scalar."""
    exists = batch["candidate_mask"]
    lengths = sequence_lengths(batch) - batch.get("first_position", 0)
    shared = (batch["prompt_mask"].sum(dim=1) - 1).clamp(min=0) if shared_prompt else 0
    return (lengths * exists).sum() - (shared * (exists.sum(dim=1) - 1)).sum()
