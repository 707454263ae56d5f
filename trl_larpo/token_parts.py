"""
Tokenizes texts that begin with the same prompt, without tokenizing the prompt for each.

Tokenizers of the tokenizers library cut a text at its added tokens, such as `<|im_end|>`, before anything else, and
treat the pieces between them separately. So a text may be cut in front of an added token: the tokens of both parts,
one after the other, are those of the whole. What follows begins with that token, so that a tokenizer which treats the
beginning of a text in its own way (SentencePiece's `▁`) sees none.
"""

import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

# Arguments of `apply_chat_template` that act on its tokens
_OF_TOKENS = {
    "max_length", "padding", "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs",
    "truncation",
}  # fmt: skip


def is_text_enough(template_kwargs: dict[str, Any]) -> bool:
    """Whether the tokens of a conversation are those of its text: no argument of the chat template acts on tokens."""
    return not _OF_TOKENS & template_kwargs.keys()


def can_take_parts(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, template_kwargs: dict[str, Any] | None = None
) -> bool:
    """Whether texts may be tokenized by parts: by a tokenizer of the tokenizers library, and only as texts."""
    # Processors have no such attribute
    return getattr(processing_class, "is_fast", False) and is_text_enough(template_kwargs or {})


def encode_by_parts(tokenizer: PreTrainedTokenizerBase, texts: list[str], is_plain: bool) -> list[list[int]]:
    """
    Token ids of a prompt and of texts that begin with it. They are worth a comparison with whole texts now and then.

    Args:
        tokenizer: One of the tokenizers library (`is_fast`).
        texts: The prompt, then the others.
        is_plain: Whether the tokenizer adds special tokens; chat templates have rendered them.
    """
    place = place_to_cut(tokenizer, texts, is_plain) if len(texts) > 1 else None
    if place is None:
        return encode_texts(tokenizer, texts, add_special_tokens=is_plain)
    [prompt_ids] = encode_texts(tokenizer, texts[:1], add_special_tokens=is_plain)
    first, *others = encode_texts(tokenizer, [text[place:] for text in texts], add_special_tokens=False)
    if prompt_ids[-len(first) :] != first:
        return encode_texts(tokenizer, texts, add_special_tokens=is_plain)
    before = prompt_ids[: -len(first)]
    return [prompt_ids, *(before + ids for ids in others)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of whole texts, in one call, which the tokenizers library answers with several threads."""
    return tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]


def place_to_cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], is_plain: bool) -> int | None:
    """
    Where the last added token begins that a prompt shares with all texts after it, if they can be cut there.

    Args:
        tokenizer: One of the tokenizers library.
        texts: The prompt, then the others.
        is_plain: Whether the tokenizer adds special tokens.
    """
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
        and encode_texts(tokenizer, [text], add_special_tokens=False)[0] == [tokenizer.convert_tokens_to_ids(text)]
    )


@lru_cache(maxsize=1)
def _adds_an_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer appends special tokens to a text, and does not only put some in front."""
    whole, alone = (encode_texts(tokenizer, ["a"], add_special_tokens=added)[0] for added in (True, False))
    return not alone or whole[-len(alone) :] != alone


def forget_tokenizers() -> None:
    """Before a data set is tokenized: a tokenizer may have got further tokens since the last one."""
    for function in (_added_tokens, _is_always_cut_off, _adds_an_end):
        function.cache_clear()
