"""[`tokens_beyond_text`]: the tokens of sampled completions that their texts alone do not give back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..prompts import Content
from .in_process import Sample, encode_prompt, render_prompt

_MAX_SEARCHES = 8  # prompts in which a border is searched for


@dataclass
class _Border:
    """
    A special token in the prompts at which tokenizers split a text before anything else. What follows it has the same
    tokens whatever comes before, so that a long prompt need not be tokenized with each of its completions.

    Attributes:
        token: Its text. `None`: not found.
        num_searches: Number of prompts in which it was searched for.
    """

    token: str | None = None
    num_searches: int = 0


# Of each tokenizer, by the kind of prompts and the arguments of the chat template
_borders: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[bool, str], _Border]] = WeakKeyDictionary()


def tokens_beyond_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Content,
    samples: Sequence[Sample],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int] | None]:
    """
    Tokens of those samples whose text alone does not give them back, `None` for the others.

    The text of a completion may be tokenised in another way than it was sampled, and one that was cut off may end
    within a word or a character.

    Args:
        tokenizer: The model's.
        prompt: Their prompt.
        samples: All of one prompt.
        chat_template_kwargs: Arguments of the chat template.
    """
    ended = [place for place, each in enumerate(samples) if each.token_ids and each.finished]
    kept = [each.token_ids for each in samples]
    if not ended:
        return kept
    kwargs = chat_template_kwargs or {}
    prompt_ids, *wholes = _tokenize(tokenizer, prompt, [samples[place].text for place in ended], kwargs)
    for place, whole in zip(ended, wholes, strict=True):
        sampled = prompt_ids + (samples[place].token_ids or [])
        if whole[: len(sampled)] == sampled:  # a chat template may put a line break behind
            kept[place] = None
    return kept


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: Content, completions: list[str], kwargs: dict[str, Any]
) -> list[list[int]]:
    """
    Tokens of a prompt, then of the prompt with each of its completions. From all of them the same tokens are left out
    that come before a border.
    """
    border = _borders.setdefault(tokenizer, {}).setdefault((isinstance(prompt, str), repr(kwargs)), _Border())
    if border.token is None and border.num_searches >= _MAX_SEARCHES:
        return _tokenize_whole(tokenizer, prompt, completions, kwargs)
    texts = _render(tokenizer, prompt, completions, kwargs)
    start = -1 if border.token is None else _place_of(border.token, texts)
    if start >= 0:
        return _encode(tokenizer, [text[start:] for text in texts], isinstance(prompt, str))
    whole = _tokenize_whole(tokenizer, prompt, completions, kwargs)
    if border.num_searches < _MAX_SEARCHES:  # also where one was found that was the user's own text
        border.num_searches += 1
        border.token = _find_border(tokenizer, texts, whole, isinstance(prompt, str)) or border.token
    return whole


def _tokenize_whole(
    tokenizer: PreTrainedTokenizerBase, prompt: Content, completions: list[str], kwargs: dict[str, Any]
) -> list[list[int]]:
    if isinstance(prompt, str):
        return tokenizer(_render(tokenizer, prompt, completions, kwargs))["input_ids"]
    conversations = [[*prompt, {"role": "assistant", "content": text}] for text in completions]
    whole = tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **kwargs)["input_ids"]
    return [encode_prompt(tokenizer, prompt, kwargs), *whole]


def _render(
    tokenizer: PreTrainedTokenizerBase, prompt: Content, completions: list[str], kwargs: dict[str, Any]
) -> list[str]:
    """The prompt as text, then the prompt with each of its completions."""
    if isinstance(prompt, str):
        return [prompt, *(prompt + text + (tokenizer.eos_token or "") for text in completions)]
    conversations = [[*prompt, {"role": "assistant", "content": text}] for text in completions]
    whole = tokenizer.apply_chat_template(conversations, tokenize=False, **kwargs)
    return [render_prompt(tokenizer, prompt, kwargs), *whole]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    settings = {"add_special_tokens": add_special_tokens, "return_attention_mask": False}
    return tokenizer(texts, **settings)["input_ids"]


def _find_border(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], whole: list[list[int]], add_special_tokens: bool
) -> str | None:
    """The last border of a prompt that has the same tokens behind it with and without what comes before."""
    if not tokenizer.is_fast:
        return None
    added = tokenizer.added_tokens_decoder
    for number in dict.fromkeys(reversed(whole[0])):
        token = added.get(number)
        if token is None or token.normalized or token.lstrip or token.rstrip or token.single_word:
            continue
        start = _place_of(token.content, texts)
        if start < 0 or not _stands_alone(token.content, (str(each.content) for each in added.values())):
            continue
        parts = _encode(tokenizer, [text[start:] for text in texts], add_special_tokens)
        parts = [part[part.index(number) :] if number in part else [-1] for part in parts]  # no token that comes first
        if all(ids[-len(part) :] == part for part, ids in zip(parts, whole, strict=True)):
            return token.content
    return None


def _stands_alone(token: str, tokens: Iterable[str]) -> bool:
    """Whether none of the added tokens can begin before a token, or where it does, and take a part of it."""
    return token == token.strip() and not any(
        (token in other and other != token) or any(other.endswith(token[:size]) for size in range(1, len(token)))
        for other in tokens
    )


def _place_of(token: str, texts: list[str]) -> int:
    """Where a token is for the last time in the part with which all texts begin; -1: nowhere."""
    start = texts[0].rfind(token)
    while start >= 0 and not all(text.startswith(texts[0][: start + len(token)]) for text in texts):
        start = texts[0].rfind(token, 0, start)
    return start
