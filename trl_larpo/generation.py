"""Samples several completions per prompt from a model, in this process."""

from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .errors import ConfigError

_TOKENS_BETWEEN_REARRANGEMENTS = 8

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """
    One sampled completion.

    Attributes:
        text: The completion, without special tokens.
        num_tokens: Tokens generated, an end token included.
        finished: Whether the model ended it by itself; `False` where `max_new_tokens` cut it off.
    """

    text: str
    num_tokens: int
    finished: bool


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    num_samples: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    description: str = "Sampling",
) -> list[list[Sample]]:
    """
    Samples `num_samples` completions for each prompt.

    Conversations are rendered with the tokenizer's chat template, exactly as in training. Prompts of similar length
    share a batch; a prompt runs through the model once for all of its samples.

    Args:
        model: Causal language model. Its mode (train or eval) is restored afterwards.
        tokenizer: Its tokenizer.
        prompts: Strings or conversations (lists of messages).
        num_samples: Completions per prompt, at least 1.
        temperature: Sampling temperature; 0 decodes greedily.
        top_p: Nucleus sampling threshold, in (0, 1].
        max_new_tokens: Longest completion, in tokens.
        batch_size: Completions generated at the same time.
        seed: Seed of the sampling. The same call gives the same samples.
        description: What the progress bar says.

    Returns:
        For each prompt, in the order given, its samples.

    Raises:
        ConfigError: If several samples are asked for at temperature 0, where all would be the same, or `num_samples` or
            `temperature` is out of range.
    """
    if num_samples < 1:
        raise ConfigError(f"`num_samples` is {num_samples}; ask for at least 1 completion per prompt.")
    if temperature < 0:
        raise ConfigError(f"`temperature` is {temperature}; it must be 0 (greedy) or more.")
    if temperature == 0 and num_samples > 1:
        raise ConfigError(
            f"`temperature=0` decodes greedily, so all {num_samples} samples of a prompt would be the same. Raise "
            "`temperature`, or ask for one sample."
        )
    prompt_ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    # Longest first: the batch that needs most memory comes at once, or never
    order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]), reverse=True)
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    options["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompts_per_batch = max(1, batch_size // num_samples)
    end_ids = _end_token_ids(model, tokenizer)
    samples: list[list[Sample]] = [[] for _ in prompts]
    num_tokens = 0
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=_cuda_devices(model)),
            tqdm(total=len(prompts) * num_samples, desc=description, unit=" completions") as progress,
        ):
            torch.manual_seed(seed)
            for start in range(0, len(order), prompts_per_batch):
                owners = order[start : start + prompts_per_batch]
                inputs = tokenizer.pad(
                    {"input_ids": [prompt_ids[i] for i in owners]}, padding_side="left", return_tensors="pt"
                ).to(model.device)
                completions = _complete_batch(model, inputs, num_samples, max_new_tokens, end_ids, options)
                for row, ids in enumerate(completions):
                    sample = _as_sample(ids, end_ids, tokenizer)
                    samples[owners[row // num_samples]].append(sample)
                    num_tokens += sample.num_tokens
                speed = num_tokens / max(progress.format_dict["elapsed"], 1e-9)
                progress.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                progress.update(len(completions))
    finally:
        model.train(was_training)
    return samples


def _complete_batch(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    num_samples: int,
    max_new_tokens: int,
    end_ids: set[int],
    options: dict[str, Any],
) -> list[list[int]]:
    """
    Token ids of `num_samples` completions of each left-padded prompt, prompt by prompt.

    The prompt runs through the model once, not once per sample; and every few tokens the completions that have ended
    leave the batch. Both need a cache that can be rearranged; models without one run through `generate` in one piece.
    """
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    cache = None
    if bool(attention_mask[:, -2:].all()) and input_ids.size(1) > 1:  # no prompt of a single token
        # All but the last token, which `generate` then takes as its input. The token it samples here is not used.
        prefill = model.generate(
            input_ids[:, :-1],
            attention_mask=attention_mask[:, :-1],
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=options["pad_token_id"],
            return_dict_in_generate=True,
        )
        cache = getattr(prefill, "past_key_values", None)
    input_ids, attention_mask = (t.repeat_interleave(num_samples, dim=0) for t in (input_ids, attention_mask))
    if not isinstance(cache, DynamicCache):
        output = model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **options)
        return output[:, input_ids.size(1) :].tolist()

    cache.batch_repeat_interleave(num_samples)
    rows = torch.arange(input_ids.size(0), device=input_ids.device)
    completions: list[list[int]] = [[] for _ in rows]
    ends = torch.tensor(sorted(end_ids), device=input_ids.device)
    for start in range(0, max_new_tokens, _TOKENS_BETWEEN_REARRANGEMENTS):
        output = model.generate(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            max_new_tokens=min(_TOKENS_BETWEEN_REARRANGEMENTS, max_new_tokens - start),
            return_dict_in_generate=True,
            **options,
        )
        new_ids = output.sequences[:, input_ids.size(1) :]
        for row, ids in zip(rows.tolist(), new_ids.tolist(), strict=True):
            completions[row] += ids
        unfinished = (~torch.isin(new_ids, ends).any(dim=1)).nonzero().squeeze(1)
        if unfinished.numel() == 0:
            break
        cache = output.past_key_values
        cache.batch_select_indices(unfinished)
        rows, input_ids = rows[unfinished], output.sequences[unfinished]
        attention_mask = torch.cat([attention_mask, torch.ones_like(new_ids)], dim=1)[unfinished]
    return completions


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def _as_sample(ids: list[int], end_ids: set[int], tokenizer: PreTrainedTokenizerBase) -> Sample:
    end = next((position for position, token in enumerate(ids) if token in end_ids), None)
    kept = ids if end is None else ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Sample(text=text, num_tokens=len(kept) + (end is not None), finished=end is not None)


def _cuda_devices(model: PreTrainedModel) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
