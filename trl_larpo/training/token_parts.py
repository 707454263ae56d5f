"""
Tokenizes the sequences of a list, which share their prompt, without tokenizing the prompt for each.

Tokenizers of the tokenizers library cut a text at its added tokens, such as `<|im_end|>`, before anything else, and
treat the pieces between them separately. So a text may be cut in front of an added token: the tokens of both parts,
one after the other, are those of the whole. What follows begins with that token, so that a tokenizer which treats the
beginning of a text in its own way (SentencePiece's `▁`) sees none.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .trl_compat import tokenize

_FIRST_ROWS, _EVERY = 8, 1000
"""Rows whose parts are compared with the whole: the first ones, and every so many."""


class PartsDiffer(Exception):
    """The tokens of the parts of a text are not those of the whole."""


@dataclass(frozen=True)
class Source:
    """
    What a sequence of tokens is made of.

    Attributes:
        content: Plain text, a conversation, or one that is rendered already.
        template_kwargs: Arguments of the chat template, for a conversation.
        is_rendered: Whether it is a rendered conversation: the tokenizer adds no special tokens.
    """

    content: str | list[dict[str, Any]]
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    is_rendered: bool = False


def encode(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, sources: Sequence[Source], by_parts: bool, index: int
) -> list[list[int]]:
    """
    Token ids of the sequences of a list.

    Args:
        processing_class: Tokenizer or processor.
        sources: The prompt, then those of its sequences to tokenize.
        by_parts: Tokenize what they share once, where the tokenizer allows it.
        index: Number of the row, which decides whether it is compared with whole texts.

    Raises:
        PartsDiffer: If the row is compared, and its parts are not the whole.
    """
    if not by_parts or not getattr(processing_class, "is_fast", False):  # processors have no such attribute
        return [_encode_whole(processing_class, source) for source in sources]
    ids = _encode_by_parts(processing_class, sources)
    if (index < _FIRST_ROWS or index % _EVERY == 0) and ids != encode(processing_class, sources, False, index):
        raise PartsDiffer
    return ids


def _encode_whole(processing_class: PreTrainedTokenizerBase | ProcessorMixin, source: Source) -> list[int]:
    if source.is_rendered:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        return tokenizer(source.content, add_special_tokens=False)["input_ids"]
    return tokenize(processing_class, source.content, **source.template_kwargs)["input_ids"]


def _encode_by_parts(tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]) -> list[list[int]]:
    texts: list[str] = [
        source.content
        if isinstance(source.content, str)
        else tokenizer.apply_chat_template(source.content, tokenize=False, **source.template_kwargs)
        for source in sources
    ]
    is_plain = isinstance(sources[0].content, str) and not sources[0].is_rendered
    place = _place_to_cut(tokenizer, texts, is_plain) if len(texts) > 1 else None
    if place is None:
        return _encode_texts(tokenizer, texts, add_special_tokens=is_plain)
    [prompt_ids] = _encode_texts(tokenizer, texts[:1], add_special_tokens=is_plain)
    first, *others = _encode_texts(tokenizer, [text[place:] for text in texts], add_special_tokens=False)
    if prompt_ids[-len(first) :] != first:
        return _encode_texts(tokenizer, texts, add_special_tokens=is_plain)
    before = prompt_ids[: -len(first)]
    return [prompt_ids, *(before + ids for ids in others)]


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """In one call, which the tokenizers library answers with several threads."""
    return tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]


def _place_to_cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], is_plain: bool) -> int | None:
    """Where the last added token begins that the first text shares with all others, if it can be cut there."""
    if is_plain and _adds_an_end(tokenizer):
        return None
    prompt, *others = texts
    for found in reversed(list(_added_tokens(tokenizer)[0].finditer(prompt))):
        shared = prompt[: found.end()]
        if _is_always_cut_off(tokenizer, found.group()) and all(text.startswith(shared) for text in others):
            return found.start()
    return None


@lru_cache(maxsize=1)
def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], dict[str, bool]]:
    """A pattern that finds added tokens; those which are found before a text is normalized, and if only as a word."""
    tokens = {x.content: x.single_word for x in tokenizer.added_tokens_decoder.values() if not x.normalized}
    alternatives = [re.escape(text) for text in sorted(tokens, key=len, reverse=True) if text]
    return re.compile("|".join(alternatives) or r"(?!)"), tokens


@lru_cache(maxsize=64)
def _is_always_cut_off(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """
    Whether an added token is one token wherever its text stands.

    Matches are the leftmost, and of these the longest. So no other one may contain it, or end with its beginning.
    Others may take the blanks around them.
    """
    tokens = _added_tokens(tokenizer)[1]
    beginnings = tuple(text[:length] for length in range(1, len(text)))
    return (
        text == text.strip()
        and not tokens[text]
        and not any(other != text and text in other for other in tokens)
        and not any(beginnings and other.endswith(beginnings) for other in tokens)
        and _encode_texts(tokenizer, [text], add_special_tokens=False)[0] == [tokenizer.convert_tokens_to_ids(text)]
    )


@lru_cache(maxsize=1)
def _adds_an_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer appends special tokens to a text, and does not only put some in front."""
    whole, alone = (_encode_texts(tokenizer, ["a"], add_special_tokens=added)[0] for added in (True, False))
    return not alone or whole[-len(alone) :] != alone


def forget_tokenizers() -> None:
    """Before a data set is tokenized: a tokenizer may have got further tokens since the last one."""
    for function in (_added_tokens, _is_always_cut_off, _adds_an_end):
        function.cache_clear()
