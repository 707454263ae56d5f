"""[`tokens_beyond_text`]: the tokens of sampled completions that their texts alone do not give back."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..prompts import Content
from ..token_parts import can_take_parts, encode_texts, place_to_cut
from .in_process import Sample, encode_prompt, render_prompt

_NUM_CHECKED = 8  # prompts of which parts are compared with whole texts

# Of each tokenizer, how many prompts were compared; `None`: its parts are not the whole
_num_checked: WeakKeyDictionary[PreTrainedTokenizerBase, int | None] = WeakKeyDictionary()


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
    completions = [samples[place].text for place in ended]
    prompt_ids, *wholes = _tokenize(tokenizer, prompt, completions, chat_template_kwargs or {})
    for place, whole in zip(ended, wholes, strict=True):
        sampled = prompt_ids + (samples[place].token_ids or [])
        if whole[: len(sampled)] == sampled:  # a chat template may put a line break behind
            kept[place] = None
    return kept


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: Content, completions: list[str], kwargs: dict[str, Any]
) -> list[list[int]]:
    """
    Tokens of a prompt, then of the prompt with each of its completions; from all of them the same ones at the beginning
    may be left out.
    """
    num_checked = _num_checked.get(tokenizer, 0)
    if num_checked is None or not can_take_parts(tokenizer, kwargs):
        return _tokenize_whole(tokenizer, prompt, completions, kwargs)
    texts, is_plain = _render(tokenizer, prompt, completions, kwargs), isinstance(prompt, str)
    place = place_to_cut(tokenizer, texts, is_plain)
    if place is None:
        return _tokenize_whole(tokenizer, prompt, completions, kwargs)
    parts = encode_texts(tokenizer, [text[place:] for text in texts], add_special_tokens=False)
    if num_checked < _NUM_CHECKED:
        whole = _tokenize_whole(tokenizer, prompt, completions, kwargs)
        before = whole[0][: -len(parts[0])]
        _num_checked[tokenizer] = num_checked + 1 if whole == [before + part for part in parts] else None
        return whole
    return parts


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
