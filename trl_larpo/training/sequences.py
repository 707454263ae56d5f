"""The token ids of a list's prompt and of the prompt with each completion."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..token_parts import can_take_parts, encode_by_parts
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


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """That of a processor. Some tokenizers have an attribute `tokenizer`, too, which is none of transformers'."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


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
    if not by_parts or not all(can_take_parts(processing_class, source.template_kwargs) for source in sources):
        return [_encode_whole(processing_class, source) for source in sources]
    texts: list[str] = [
        source.content
        if isinstance(source.content, str)
        else processing_class.apply_chat_template(source.content, tokenize=False, **source.template_kwargs)
        for source in sources
    ]
    is_plain = isinstance(sources[0].content, str) and not sources[0].is_rendered
    ids = encode_by_parts(processing_class, texts, is_plain)
    if (index < _FIRST_ROWS or index % _EVERY == 0) and ids != encode(processing_class, sources, False, index):
        raise PartsDiffer
    return ids


def _encode_whole(processing_class: PreTrainedTokenizerBase | ProcessorMixin, source: Source) -> list[int]:
    if source.is_rendered:
        tokenizer = tokenizer_of(processing_class)
        return tokenizer(source.content, add_special_tokens=False)["input_ids"]
    return tokenize(processing_class, source.content, **source.template_kwargs)["input_ids"]
