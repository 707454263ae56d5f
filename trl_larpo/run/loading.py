"""How the models of a run are loaded: by the training, and where its policy is sampled."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_quantization_config

from ..errors import ConfigError
from ..training.config import LarPOConfig


def model_init_kwargs(model: ModelConfig, args: LarPOConfig) -> dict[str, Any]:
    """Arguments for `from_pretrained`."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype or ("auto" if model.use_peft else "float32"),
    } | (args.model_init_kwargs or {})


def quantization_of(model: ModelConfig, args: LarPOConfig) -> BitsAndBytesConfig | None:
    """
    How a base is quantized; it computes in the precision of the training, unless `dtype` says otherwise. Samples come
    from the same base: log-probabilities of another one would be those of another policy.
    """
    config = get_quantization_config(model)
    if config is not None and model.load_in_4bit and model.dtype is None:
        config.bnb_4bit_compute_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return config


def check_model_path(path: str | None) -> None:
    """
    Raises:
        ConfigError: If there is no path, or one that can only be a folder and is none.
    """
    if not path:
        raise ConfigError("No model: give `model_name_or_path`, a folder or a hub id.")
    if path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(path)):
        raise ConfigError(f"`model_name_or_path` is {path!r}, and there is no such folder.")


def config_of(model: ModelConfig, **kwargs: Any) -> PretrainedConfig:
    """
    That of the initial model.

    Args:
        model: Which one.
        kwargs: Further arguments of `from_pretrained`.

    Raises:
        ConfigError: If there is no such model.
    """
    with _no_such_model(model):
        return AutoConfig.from_pretrained(model.model_name_or_path, **{"revision": model.model_revision} | kwargs)


def tokenizer_of(model: ModelConfig) -> PreTrainedTokenizerBase:
    """
    That of the initial model.

    Raises:
        ConfigError: If there is no such model, or it has none.
    """
    with _no_such_model(model):
        return AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)


@contextlib.contextmanager
def _no_such_model(model: ModelConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:300]
        raise ConfigError(f"`model_name_or_path`: {model.model_name_or_path!r} cannot be loaded: {cause}") from None


def empty_model(config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """
    A model without memory for its weights, which need not be there: as of a hub id.

    Raises:
        Exception: Of many kinds, as some architectures compute with weights when they are made.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **kwargs)
