"""How the models of a run are loaded: by the training, and where its policy is sampled."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_quantization_config

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


def tokenizer_of(model: ModelConfig) -> PreTrainedTokenizerBase:
    """That of the initial model."""
    return AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)


def empty_model(config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """
    A model without memory for its weights, which need not be there: as of a hub id.

    Raises:
        Exception: Of many kinds, as some architectures compute with weights when they are made.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **kwargs)
