"""Lets the candidates of a list share their prompt: which models can, the masks, and the prompt's keys and values."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..layers import state_obstacle
from .token_rows import KeysAndValues, Rows
from .two_part_attention import TwoParts
from .variable_length import VariableLengths, enable_variable_lengths, uses_variable_lengths

_PREFIX = "larpo_"  # of the attention implementations registered here

_MASKABLE = ("sdpa", "eager", "flex_attention")


def sharing_obstacle(model: PreTrainedModel) -> str | None:
    """
    Why the candidates of a list cannot share a row with their prompt in this model, as far as that is known in advance.

    Sharing needs attention layers alone, a mask that may be any relation between tokens or sequences with more keys
    than queries, and positions that may be given. Whether the model then computes the same is measured on itself, by
    [`trl_larpo.training.proof`]; here stands what two short lists would not show.

    Args:
        model: The model, bare or as a `PeftModel`.

    Returns:
        The reason, to be read after "because"; `None` if nothing is known.
    """
    if is_peft_model(model):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return "prompt-learning PEFT puts virtual tokens in front of each row"
        model = model.get_base_model()
    config = model.config.get_text_config()
    implementation = (config._attn_implementation or "eager").removeprefix(_PREFIX)
    if implementation not in _MASKABLE and not uses_variable_lengths(model):
        return f"attn_implementation={implementation!r} takes neither a mask nor variable lengths; 'sdpa' does"
    if (obstacle := state_obstacle(model)) is not None:
        return obstacle
    if sliding_window(model) is None and not getattr(config, "layer_types", None):
        for name, value in config.to_dict().items():
            is_window = "window" in name and not name.startswith("use_") and "layer" not in name
            if is_window and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return f"{type(model).__name__} may count its window ({name}={value}) in places of the row"
    return None


def positions_depend_on_length(model: PreTrainedModel) -> bool:
    """Whether position embeddings depend on the largest position in a call (LongRoPE, dynamic NTK)."""
    config = model.config.get_text_config()
    return any(
        _names_rope_type(getattr(config, name, None), {"dynamic", "longrope", "su"})
        for name in ("rope_scaling", "rope_parameters")
    )


def _names_rope_type(parameters, kinds: set[str]) -> bool:
    """Whether RoPE parameters, which may be a dictionary of them for each type of layer, name one of some kinds."""
    if not isinstance(parameters, dict):
        return False
    if kinds & {value for name in ("rope_type", "type") if isinstance(value := parameters.get(name), str)}:
        return True
    return any(_names_rope_type(value, kinds) for value in parameters.values())


def sliding_window(model: PreTrainedModel) -> int | None:
    """The window of the model's sliding-window layers in tokens, `None` if it has none."""
    config = model.config.get_text_config()
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        base_model = model.get_base_model() if is_peft_model(model) else model
        if hasattr(sys.modules[type(base_model.base_model).__module__], "create_sliding_window_causal_mask"):
            return getattr(config, "sliding_window", None)
    return None


def visible(rows: Rows, window: int | None = None, prompt_real: Tensor | None = None) -> Tensor:
    """
    Which tokens a token sees.

    Args:
        rows: The rows.
        window: Size of the attention window in tokens (sliding-window attention). `None`: no window.
        prompt_real: bool `(rows, prompt_length)`, where a prompt that is kept outside the rows has tokens. Its keys
            stand in front of the row's, and all of the row sees them.

    Returns:
        bool `(rows, length, prompt_length + length)`, `[row, query, key]`. Padding sees itself alone, so that no
        softmax is over nothing.
    """
    index = torch.arange(rows.input_ids.size(1), device=rows.input_ids.device)
    query, key = rows.segments[:, :, None], rows.segments[:, None, :]
    seen = ((key == 0) | (key == query)) & (index[:, None] >= index) & rows.real[:, None, :]
    if window is not None:
        seen &= rows.positions[:, :, None] - rows.positions[:, None, :] < window
    seen |= torch.eye(len(index), dtype=torch.bool, device=index.device)
    if prompt_real is None:
        return seen
    seen_of_prompt = prompt_real[:, None, :] & rows.real[:, :, None]
    if window is not None:
        position = torch.arange(prompt_real.size(1), device=index.device)
        seen_of_prompt &= rows.positions[:, :, None] - position < window
    return torch.cat([seen_of_prompt, seen], dim=2)


@dataclass
class SplitRows:
    """
    Shared rows taken apart for attention: prompts, which are causal, and candidates, each after its prompt.

    A mask over whole rows makes attention look at every pair of tokens, also of two different candidates. Taken apart,
    it sees no more than separate rows do.

    Attributes:
        columns: int64 `(rows * list_size * segment_length,)`, where candidates' tokens stand in the flattened rows.
        places: int64 `(rows, length)`, where the result for each token stands after those for prompts and candidates
            are put behind one another.
        mask: bool `(rows * list_size, 1, segment_length, prompt_length + segment_length)`, what candidates see.
    """

    columns: Tensor
    places: Tensor
    mask: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """Those whose sizes change from batch to batch."""
        return [self.columns, self.places, self.mask]

    @property
    def prompt_length(self) -> int:
        """Length of the longest prompt, of which every row's first columns are taken."""
        return self.mask.size(3) - self.mask.size(2)

    def attend(self, attention, module, query: Tensor, key: Tensor, value: Tensor, prompts, *args, **kwargs):
        """SDPA over prompts and candidates, which are both in the rows."""
        return _attend_in_parts(module, query, key, value, self, *args, **kwargs), None


def split_rows(rows: Rows) -> SplitRows | None:
    """Takes shared rows apart. `None` where there is nothing to gain, because no prompt has a token to share."""
    num_rows, length = rows.input_ids.shape
    num_segments = int(rows.segments.max())
    of_prompt = rows.real & (rows.segments == 0)
    prompt_lengths = of_prompt.sum(dim=1)
    prompt_length = int(prompt_lengths.max())
    if prompt_length == 0 or num_segments == 0:
        return None
    column = torch.arange(length, device=rows.segments.device).expand(num_rows, -1)
    # Segments follow one another without gaps
    segment_lengths = torch.zeros(num_rows, num_segments + 1, dtype=torch.long, device=column.device)
    segment_lengths.scatter_add_(1, rows.segments, rows.real.long())
    starts = segment_lengths.cumsum(dim=1) - segment_lengths
    segment_length = int(segment_lengths[:, 1:].max())

    offset = torch.arange(segment_length, device=column.device)
    real = offset < segment_lengths[:, 1:, None]  # (rows, list_size, segment_length)
    columns = (starts[:, 1:, None] + offset).masked_fill(~real, 0)
    columns = columns + length * torch.arange(num_rows, device=column.device)[:, None, None]
    sees_prompt = torch.arange(prompt_length, device=column.device) < prompt_lengths[:, None]
    sees_prompt = sees_prompt[:, None, None, :].expand(-1, num_segments, segment_length, -1)
    sees_itself = (offset[:, None] >= offset).expand(num_rows, num_segments, -1, -1)
    mask = torch.cat([sees_prompt, sees_itself], dim=3)

    in_segment = column - starts.gather(1, rows.segments)
    places = torch.where(
        rows.segments == 0, column, prompt_length + (rows.segments - 1) * segment_length + in_segment
    ).masked_fill(~rows.real, 0)
    return SplitRows(columns.flatten(), places, mask.flatten(0, 1)[:, None])


def attention_masks(
    model: PreTrainedModel, rows: Rows, prompt_real: Tensor | None = None
) -> "Tensor | BlockMask | dict[str, Tensor | BlockMask]":
    """
    The mask to pass as `attention_mask` so that candidates see their prompt and themselves.

    Args:
        model: The model, bare or as a `PeftModel`, without [`sharing_obstacle`].
        rows: The rows.
        prompt_real: As in [`visible`].

    Returns:
        `(rows, 1, length, prompt_length + length)`, bool for SDPA and additive for eager attention; a block mask for
        FlexAttention, without `prompt_real`. A dictionary of one for each type of layer where a model has several.
    """
    config = model.config.get_text_config()

    def mask(window: int | None) -> Tensor | BlockMask:
        if uses_blocks(model):
            return _block_mask(rows, window)
        seen = visible(rows, window, prompt_real)[:, None]
        if config._attn_implementation.endswith("eager"):
            return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(
                ~seen, torch.finfo(model.dtype).min
            )
        return seen

    window = sliding_window(model)
    layer_types = set(getattr(config, "layer_types", None) or [])
    if len(layer_types) > 1:
        return {"full_attention": mask(None), "sliding_attention": mask(window)}
    return mask(window)


def what_masks_depend_on(model: PreTrainedModel) -> tuple[Any, ...]:
    """Of a model, to tell whether two of the same class can do with the same ones."""
    config = model.config.get_text_config()
    layer_types = tuple(getattr(config, "layer_types", None) or ())
    return config._attn_implementation, sliding_window(model), layer_types, model.dtype


def _block_mask(rows: Rows, window: int | None) -> BlockMask:
    """What [`visible`] says, as FlexAttention wants it. Padding sees the padding before it."""
    lists = rows.segments.new_zeros(rows.segments.shape) if rows.lists is None else rows.lists
    lists = torch.where(rows.real, lists, -1)
    segments, positions = rows.segments, rows.positions

    def sees(row, head, query, key):
        same_list = lists[row, query] == lists[row, key]
        reachable = (segments[row, key] == 0) | (segments[row, key] == segments[row, query])
        seen = same_list & reachable & (query >= key)
        if window is not None:
            seen = seen & (positions[row, query] - positions[row, key] < window)
        return seen

    num_rows, length = rows.input_ids.shape
    return create_block_mask(sees, num_rows, None, length, length, device=rows.input_ids.device)


def uses_blocks(model: PreTrainedModel) -> bool:
    """Whether attention of the model leaves out what is masked (FlexAttention), so that lists may share a row."""
    return model.config.get_text_config()._attn_implementation == "flex_attention"


def splits_rows(model: PreTrainedModel) -> bool:
    """Whether attention of the model, after [`enable_sharing`], can be worked out in parts, by SDPA or in its place."""
    implementation = model.config.get_text_config()._attn_implementation
    return implementation == _PREFIX + "sdpa" and sliding_window(model) is None


def enable_sharing(model: PreTrainedModel) -> None:
    """
    Gives `model` an attention that knows shared prompts. Without the arguments below it computes what it did before.
    FlexAttention stays as it is; its block masks say all.

    - `split`: how to work out attention in parts: [`SplitRows`] or
      [`TwoParts`][trl_larpo.training.two_part_attention.TwoParts] for SDPA,
      [`VariableLengths`][trl_larpo.training.variable_length.VariableLengths] for FlashAttention.
    - `record`: an empty dictionary, which keeps the keys and values of this pass.
    - `recorded`: the dictionary after that pass; they stand in front of this pass's own, and the mask has room for
      them.

    Args:
        model: The model, bare or as a `PeftModel`, without [`sharing_obstacle`].
    """
    if uses_variable_lengths(model):
        enable_variable_lengths(model, _knowing_shared_prompts)
        return
    config = model.config.get_text_config()
    if _PREFIX + config._attn_implementation in _KNOWING_SHARED_PROMPTS:
        config._attn_implementation = _PREFIX + config._attn_implementation


def disable_sharing(model: PreTrainedModel) -> None:
    """Takes [`enable_sharing`] back."""
    config = model.config.get_text_config()
    config._attn_implementation = config._attn_implementation.removeprefix(_PREFIX)


@contextmanager
def without_sharing(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the model names the attention that it had before [`enable_sharing`]."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    disable_sharing(model)
    try:
        yield
    finally:
        config._attn_implementation = before


def _eager_attention_forward(module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _knowing_shared_prompts(attention):
    """Wraps an attention function of transformers."""

    def forward(
        module,
        query: Tensor,  # (rows, heads, length, head_size), as the keys and values
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args,
        split: SplitRows | VariableLengths | TwoParts | None = None,
        record: KeysAndValues | None = None,
        recorded: KeysAndValues | None = None,
        **kwargs,
    ):
        if record is not None:
            record.setdefault(module.layer_idx, (key, value))  # not again when it is recomputed for the backward pass
        prompts = recorded[module.layer_idx] if recorded else None
        if split is not None:
            return split.attend(attention, module, query, key, value, prompts, *args, **kwargs)
        if prompts is not None:
            key, value = torch.cat([prompts[0], key], dim=2), torch.cat([prompts[1], value], dim=2)
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    return forward


def _attend_in_parts(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    split: SplitRows,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> Tensor:
    """SDPA over prompts, then over candidates. Returns `(rows, length, heads, head_size)`."""
    num_rows = query.size(0)
    num_sequences, _, segment_length, _ = split.mask.shape

    def of_prompts(states: Tensor) -> Tensor:
        return states[:, :, : split.prompt_length]

    def of_candidates(states: Tensor) -> Tensor:
        tokens = states.transpose(1, 2).flatten(0, 1).index_select(0, split.columns)
        return tokens.unflatten(0, (num_sequences, segment_length)).transpose(1, 2)

    def with_prompts(states: Tensor) -> Tensor:
        prompts = of_prompts(states).repeat_interleave(num_sequences // num_rows, dim=0)
        return torch.cat([prompts, of_candidates(states)], dim=2)

    # Some models say in `is_causal` what follows from the mask that they were given
    options = kwargs | {"dropout": dropout, "scaling": scaling}
    options["is_causal"] = split.prompt_length > 1
    prompts, _ = sdpa_attention_forward(module, *map(of_prompts, (query, key, value)), None, **options)
    states = of_candidates(query), with_prompts(key), with_prompts(value)
    if query.device.type == "cpu":  # whose kernel takes fewer key heads than query heads together with a mask
        candidates = F.scaled_dot_product_attention(
            *states, attn_mask=split.mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
    else:
        candidates, _ = sdpa_attention_forward(module, *states, split.mask, **(options | {"is_causal": False}))
    parts = torch.cat([prompts, candidates.unflatten(0, (num_rows, -1)).flatten(1, 2)], dim=1)
    offsets = parts.size(1) * torch.arange(num_rows, device=parts.device)[:, None]
    return parts.flatten(0, 1).index_select(0, (split.places + offsets).flatten()).unflatten(0, (num_rows, -1))


_KNOWING_SHARED_PROMPTS = {
    _PREFIX + "sdpa": _knowing_shared_prompts(sdpa_attention_forward),
    _PREFIX + "eager": _knowing_shared_prompts(_eager_attention_forward),
}

for _name, _attention in _KNOWING_SHARED_PROMPTS.items():
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_name.removeprefix(_PREFIX)])
