"""What is known of the layers of a model."""

import inspect
import sys

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def state_obstacle(model: PreTrainedModel) -> str | None:
    """
    Why keys and values are not all that a bare model knows of earlier tokens, or its positions cannot be given.

    Returns:
        The reason, to be read after "because"; `None` if they are and can.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    # A state that runs along the row would carry one candidate over into the next
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(model, "_is_stateful", False) or layer_types - _LAYER_TYPES:
        kinds = ", ".join(sorted(layer_types - _LAYER_TYPES)) or "recurrent"
        return f"{name} has layers of another kind than full or sliding attention ({kinds})"
    if getattr(config, "alibi", False):
        return f"{name} biases attention by the distance in the row (ALiBi)"
    if "position_ids" not in inspect.signature(type(model.base_model).forward).parameters:
        return f"{name} takes no `position_ids`"
    return None


def layer_obstacle(model: PreTrainedModel) -> str | None:
    """As [`state_obstacle`], and why a bare model does not take any mask that it is given."""
    if (obstacle := state_obstacle(model)) is not None:
        return obstacle
    if not hasattr(sys.modules[type(model.base_model).__module__], "create_causal_mask"):
        return f"{type(model).__name__} does not take its mask the way transformers' own models do"
    return None


def cache_argument(model: PreTrainedModel) -> str:
    """What the forward pass of a model calls keys and values of earlier tokens; versions of transformers differ."""
    bare = model.get_base_model() if is_peft_model(model) else model
    return "cache" if "cache" in inspect.signature(bare.forward).parameters else "past_key_values"
