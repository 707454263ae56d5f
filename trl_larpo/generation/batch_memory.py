"""How many completions of a model are sampled at the same time: as many as its keys and values have memory for."""

import gc
import logging
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_FOR_CACHE = 0.8  # share of the free memory that keys and values may take

_limits: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
"""Completions at the same time, of models whose memory has run out with more."""

_told: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
"""The smallest batch that a warning has named: some calls have longer prompts than others."""


def lower_batch_size(model: PreTrainedModel, batch_size: int) -> None:
    """Memory ran out: keeps the batch of a model as small from now on, and frees what is not in use."""
    logger.warning(
        f"Completions are sampled {batch_size} at a time, fewer than `generation_batch_size`: memory ran out."
    )
    _limits[model] = batch_size
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def fitting_batch_size(model: PreTrainedModel, batch_size: int, length: int) -> int:
    """
    As many completions at the same time as are asked for, or as fit into the memory that is free.

    Args:
        model: The model.
        batch_size: Completions that are asked for.
        length: Tokens of the longest prompt and completion.
    """
    batch_size = min(batch_size, _limits.get(model, batch_size))
    free, of_token = _free_memory(model.device), _bytes_of_token(model)
    if free is None or of_token is None:
        return batch_size
    fitting = max(1, int(_FOR_CACHE * free / (of_token * length)))
    if fitting < _told.get(model, batch_size):
        logger.warning(
            f"Completions of up to {length} tokens, prompts included, are sampled {fitting} at a time, fewer than "
            f"`generation_batch_size`: more do not fit into the {free / 2**30:.1f} GiB of memory that are free."
        )
        _told[model] = fitting
    return min(fitting, batch_size)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that tensors may still take; `None` where that is not known, as on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _bytes_of_token(model: PreTrainedModel) -> int | None:
    """Bytes of the keys and values of a token in all layers; `None` if the model's configuration does not tell."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None)
    if size is None and getattr(config, "num_attention_heads", None) and getattr(config, "hidden_size", None):
        size = config.hidden_size // config.num_attention_heads
    layers = getattr(config, "num_hidden_layers", None)
    if not (isinstance(heads, int) and isinstance(size, int) and isinstance(layers, int)):
        return None
    return 2 * layers * heads * size * model.dtype.itemsize
