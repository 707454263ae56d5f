"""Lets the candidates of a list share their prompt: which models can, the masks, and the prompt's keys and values."""

import inspect
import sys

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .layout import Rows

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Layer number → keys and values of prompts, each `(lists, heads, prompt_length, head_size)`."""

_RECORDING = "larpo_"  # prefix of the attention implementations that record
_MASKABLE = ("sdpa", "eager")
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def sharing_obstacle(model: PreTrainedModel) -> str | None:
    """
    Why the candidates of a list cannot share one row with their prompt in this model.

    Sharing needs attention layers alone, a mask that may be any relation between tokens, and positions that may be
    given. All of it is read from the model's configuration and code.

    Args:
        model: The model, bare or as a `PeftModel`.

    Returns:
        The reason, to be read after "because"; `None` if they can.
    """
    if is_peft_model(model):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return "prompt-learning PEFT puts virtual tokens in front of each row"
        model = model.get_base_model()
    config = model.config.get_text_config()
    name = type(model).__name__
    # A state that runs along the row would carry one candidate over into the next
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(model, "_is_stateful", False) or layer_types - _LAYER_TYPES:
        kinds = ", ".join(sorted(layer_types - _LAYER_TYPES)) or "recurrent"
        return f"{name} has layers of another kind than full or sliding attention ({kinds})"
    if getattr(config, "alibi", False):
        return f"{name} biases attention by the distance in the row (ALiBi)"
    backbone = model.base_model
    if "position_ids" not in inspect.signature(type(backbone).forward).parameters:
        return f"{name} takes no `position_ids`"
    if not hasattr(sys.modules[type(backbone).__module__], "create_causal_mask"):
        return f"{name} does not take its mask the way transformers' own models do"
    implementation = config._attn_implementation.removeprefix(_RECORDING)
    if implementation not in _MASKABLE:
        return f"attn_implementation={implementation!r} takes no mask of its own; 'sdpa' does"
    return None


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
        window: Only tokens fewer than so many positions back (sliding-window attention). `None`: all.
        prompt_real: bool `(rows, prompt_length)`, where a prompt that is kept outside the rows has tokens. Its keys
            stand in front of the row's, and all of the row sees them.

    Returns:
        bool `(rows, length, prompt_length + length)`, `[row, query, key]`. Padding sees itself alone, lest a softmax be
        over nothing.
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


def attention_masks(
    model: PreTrainedModel, rows: Rows, prompt_real: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """
    The mask to pass as `attention_mask` so that candidates see their prompt and themselves.

    Args:
        model: The model, bare or as a `PeftModel`, without [`sharing_obstacle`].
        rows: The rows.
        prompt_real: As in [`visible`].

    Returns:
        `(rows, 1, length, prompt_length + length)`, bool for SDPA and additive for eager attention; a dictionary of one
        for each type of layer where a model has several.
    """
    config = model.config.get_text_config()

    def mask(window: int | None) -> Tensor:
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


def enable_recording(model: PreTrainedModel) -> None:
    """
    Lets a pass through `model` keep its keys and values, and later passes put kept ones in front of their own.

    The first is called with an empty dictionary as `record`, the others with the same dictionary as `recorded`; they
    need a mask with room for the keys in front. Computes what it did before where neither is given.

    Args:
        model: Bare model, without a PEFT wrapper, without [`sharing_obstacle`].
    """
    config = model.config.get_text_config()
    if not config._attn_implementation.startswith(_RECORDING):
        config._attn_implementation = _RECORDING + config._attn_implementation


def _eager_attention_forward(module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _recording(attention):
    def forward(
        module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args,
        record: KeysAndValues | None = None,
        recorded: KeysAndValues | None = None,
        **kwargs,
    ):
        if record is not None:
            record.setdefault(module.layer_idx, (key, value))  # not again when it is recomputed for the backward pass
        if recorded:
            prompt_key, prompt_value = recorded[module.layer_idx]
            key, value = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    return forward


for _name, _attention in {"sdpa": sdpa_attention_forward, "eager": _eager_attention_forward}.items():
    AttentionInterface.register(_RECORDING + _name, _recording(_attention))
    AttentionMaskInterface.register(_RECORDING + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
