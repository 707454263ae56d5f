"""Samples several completions per prompt from a model, in this process."""

import contextlib
import hashlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from ..prompts import Content, prompt_text
from .continuous_batching import Job, sample

_HALF = "\ufffd"  # what half a character is decoded to


@dataclass(frozen=True)
class Sample:
    """
    One sampled completion.

    Attributes:
        text: The completion, without special tokens.
        num_tokens: Tokens generated, an end token included.
        finished: Whether the model ended it on its own; `False` where `max_new_tokens` cut it off.
        token_ids: Its tokens, an end token included, where they are known.
    """

    text: str
    num_tokens: int
    finished: bool
    token_ids: list[int] | None = None


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Content],
    *,
    num_samples: int,
    temperature: float | Sequence[float] = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    keys: list[str] | None = None,
    description: str = "Sampling",
    progress: tqdm | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[Sample]]:
    """
    Samples `num_samples` completions for each prompt.

    Conversations are rendered with the tokenizer's chat template, exactly as in training. A prompt runs through the
    model once for all of its samples, and the batch is kept full while samples end at different lengths. The random
    numbers of a sample depend on `seed`, the prompt's key and the number of the sample, and on nothing else.

    Args:
        model: Causal language model. Its mode (train or eval) is restored afterwards.
        tokenizer: Its tokenizer.
        prompts: Strings or conversations (lists of messages).
        num_samples: Completions per prompt, at least 1.
        temperature: Sampling temperature, one for all or one for each of the `num_samples`; 0 decodes greedily.
        top_p: Nucleus sampling threshold, in (0, 1].
        max_new_tokens: Longest completion, in tokens.
        batch_size: Completions generated at the same time.
        seed: Seed of the sampling. The same call gives the same samples.
        keys: A name for each prompt, by which its random numbers are found. By default its place in `prompts`.
        description: What the progress bar says.
        progress: A bar of the caller's to advance, in completions, instead of one of this function's own.
        chat_template_kwargs: Arguments of the chat template.

    Returns:
        For each prompt, in the order given, its samples.

    Raises:
        ConfigError: If several samples are asked for at temperature 0, where all would be the same, or `num_samples` or
            `temperature` is out of range.
        DataError: If a prompt has no tokens.
    """
    temperatures = check_sampling(num_samples, temperature, top_p, max_new_tokens)
    prompt_ids = [encode_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    for number, ids in enumerate(prompt_ids):
        if not ids:
            raise DataError(f"Prompt {number} has no tokens; give it some text, or leave it out.")
    keys = [str(number) for number in range(len(prompts))] if keys is None else keys
    jobs = [
        Job(ids, temperatures, _uniform_numbers(seed, key, num_samples, max_new_tokens))
        for ids, key in zip(prompt_ids, keys, strict=True)
    ]
    end_ids = end_token_ids(model.generation_config, tokenizer)
    own_bar = progress is None
    bar: Any = progress  # `num_tokens` is an attribute of ours
    if bar is None:
        bar = tqdm(total=len(prompts) * num_samples, desc=description, unit=" completions")
    num_tokens = getattr(bar, "num_tokens", 0)

    def show(ids: list[int]) -> None:
        nonlocal num_tokens
        num_tokens += len(ids)
        bar.num_tokens = num_tokens
        bar.set_postfix_str(f"{num_tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
        bar.update()

    was_training = model.training
    model.eval()
    try:
        sample(
            model,
            # Longest first: the batch that needs most memory comes at once, or never
            sorted(jobs, key=lambda job: len(job.prompt_ids), reverse=True),
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            end_ids=end_ids,
            pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            top_p=top_p,
            on_completion=show,
        )
    finally:
        model.train(was_training)
        if own_bar:
            bar.close()
    return [[_as_sample(ids, end_ids, tokenizer) for ids in job.results] for job in jobs]


def check_sampling(
    num_samples: int, temperature: float | Sequence[float], top_p: float, max_new_tokens: int
) -> list[float]:
    """
    Refuses settings that cannot be sampled with.

    Returns:
        The temperature of each of the `num_samples` completions.

    Raises:
        ConfigError: Names the setting and what it must be.
    """
    if num_samples < 1:
        raise ConfigError(f"`num_samples` is {num_samples}; ask for at least 1 completion per prompt.")
    temperatures = [temperature] * num_samples if isinstance(temperature, int | float) else list(temperature)
    if len(temperatures) != num_samples:
        raise ConfigError(f"`temperature` has {len(temperatures)} numbers for {num_samples} samples; give one or each.")
    for value in temperatures:
        if value < 0:
            raise ConfigError(f"`temperature` is {value}; it must be 0 (greedy) or more.")
        if math.isinf(value):
            raise ConfigError(f"`temperature` is {value}, with which all tokens are equally likely.")
    if temperatures.count(0) > 1:
        raise ConfigError(
            f"`temperature=0` decodes greedily, so all {temperatures.count(0)} samples of a prompt would be the same. "
            "Raise `temperature`, or ask for one sample."
        )
    if not 0 < top_p <= 1:
        raise ConfigError(f"`top_p` is {top_p}; it must be greater than 0 and at most 1.")
    if max_new_tokens < 1:
        raise ConfigError(f"`max_new_tokens` is {max_new_tokens}; it must be at least 1.")
    return [float(value) for value in temperatures]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Content, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """
    Tokens of a prompt: the chat template's for a conversation, up to where the assistant begins.

    Raises:
        DataError: If the chat template refuses the conversation.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    rendered = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    with _explain_refusal(prompt):
        return tokenizer.apply_chat_template(prompt, **(chat_template_kwargs or {}), **rendered)["input_ids"]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Content, chat_template_kwargs: dict[str, Any] | None = None
) -> str:
    """
    The text whose tokens [`encode_prompt`] gives.

    Raises:
        DataError: If the chat template refuses the conversation.
    """
    if isinstance(prompt, str):
        return prompt
    rendered = {"add_generation_prompt": True, "tokenize": False}
    with _explain_refusal(prompt):
        return tokenizer.apply_chat_template(prompt, **(chat_template_kwargs or {}), **rendered)


@contextlib.contextmanager
def _explain_refusal(prompt: Content) -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        text = textwrap.shorten(prompt_text(prompt), 60)
        raise DataError(
            f"The chat template refuses the prompt {text!r}: {str(error).rstrip('.')}. Change the prompt or remove it."
        ) from error


def with_half_character(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Sample:
    """
    A sample of a server, with the text of all its tokens.

    Servers such as vLLM leave out of the text half a character at the end of a completion that was cut off. Then its
    tokens would not be taken for those of the text, and would not be trained on.
    """
    if sample.finished or not sample.token_ids:
        return sample
    text = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    return replace(sample, text=text) if text.rstrip(_HALF) == sample.text.rstrip(_HALF) else sample


def end_token_ids(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a completion: those of the model's generation settings, and the tokenizer's."""
    configured = settings.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def _uniform_numbers(seed: int, key: str, num_samples: int, max_new_tokens: int) -> np.ndarray:
    """A row of random numbers for each sample. More samples, or longer ones, leave the others' numbers as they are."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    bits = int.from_bytes(digest[:16], "little")
    generators = [np.random.Generator(np.random.Philox(key=bits, counter=[0, 0, 0, i])) for i in range(num_samples)]
    return np.stack([generator.random(max_new_tokens) for generator in generators])


def _as_sample(ids: list[int], end_ids: set[int], tokenizer: PreTrainedTokenizerBase) -> Sample:
    finished = ids[-1] in end_ids
    text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
    return Sample(text=text, num_tokens=len(ids), finished=finished, token_ids=ids)
