"""Prompts are tokenized once for a list, and the tokens are those of whole texts, whatever the tokenizer."""

import random

import pytest
import tiny
from accelerate import PartialState
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trl_larpo import token_parts
from trl_larpo.training import sequences, tokenization
from trl_larpo.training.tokenization import tokenize_dataset

PartialState()  # which logging needs

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]", "[UNK]"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Why is the sky blue? Because of Rayleigh scattering, of course!",
    "A list of things:\n\n1. one\n2. two\n\n    def f(x):\n        return x  # indented\nÜber naïve cafés: 12345 € ﬁne",
    "user assistant system in the middle of it all, again and again   with   blanks",
]

PIECES = [
    "The quick", " brown fox", "fox", " ", "  ", "\n", "\n\n", "\t", "é", "Ü", "ﬁ", "123", "▁", "Why", "?", "!!",
    "<|im_end|>", "<|im_start|>", "<|im_end|>\n", "<|im_", "[SEP]", "[CLS]", " [SEP] ", "<think>", " </think>", "<",
    "assistant", "user",
]  # fmt: skip


def trained(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    return tokenizer


def byte_level(**options):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    return trained(
        models.BPE(), trainer, pre_tokenizer=pre_tokenizers.ByteLevel(**options), decoder=decoders.ByteLevel()
    )


def metaspace(scheme, unigram=False):
    kind = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    trainer = kind(vocab_size=300, special_tokens=SPECIAL, unk_token="[UNK]")
    return trained(
        models.Unigram() if unigram else models.BPE(unk_token="[UNK]"),
        trainer,
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme != "first"),
    )


def llama_2():
    """The mark of a blank is put in front by a normalizer, and nothing is split before the model sees it."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL)
    return trained(models.BPE(unk_token="[UNK]"), trainer, normalizer=normalizer)


def normalizing(*steps):
    return trained(
        models.BPE(unk_token="[UNK]"),
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL),
        normalizer=normalizers.Sequence(list(steps)),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"),
    )


def word_piece():
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )


def adding(tokenizer, template):
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def with_tokens(tokenizer, *tokens):
    tokenizer.add_tokens(list(tokens))
    return tokenizer


# Each with whether a conversation's prompt is tokenized once
TOKENIZERS = {
    "byte-level": (lambda: byte_level(add_prefix_space=False), True),
    "byte-level, prefix space": (lambda: byte_level(add_prefix_space=True), True),
    "byte-level, no pattern": (lambda: byte_level(add_prefix_space=False, use_regex=False), True),
    "metaspace, first": (lambda: metaspace("first"), True),
    "metaspace, always": (lambda: metaspace("always"), True),
    "metaspace, never": (lambda: metaspace("never"), True),
    "unigram, first": (lambda: metaspace("first", unigram=True), True),
    "llama 2": (llama_2, True),
    "normalizer": (lambda: normalizing(normalizers.NFKC(), normalizers.Lowercase()), True),
    "normalizer, strips": (lambda: normalizing(normalizers.Strip(), normalizers.NFKC()), True),
    "word piece": (word_piece, True),
    "word piece, both ends": (lambda: adding(word_piece(), "[CLS] $A [SEP]"), True),
    "adds a beginning": (lambda: adding(metaspace("first"), "[CLS] $A"), True),
    "adds a beginning that is an end": (lambda: adding(byte_level(), "[CLS] $A [CLS]"), True),
    "takes blanks": (
        lambda: with_tokens(
            byte_level(add_prefix_space=False),
            AddedToken("<think>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("<|im_start|>", lstrip=True, rstrip=True, normalized=False),
        ),
        True,
    ),
    "blanks are tokens": (
        lambda: with_tokens(
            metaspace("first"), *(AddedToken(text, normalized=False) for text in ("\n", "\n\n", "  ", "<think>"))
        ),
        True,
    ),
    "tokens within tokens": (
        lambda: with_tokens(
            byte_level(),
            AddedToken("<|im_end|>\n<|im_start|>", normalized=False),
            AddedToken("x<|", normalized=False),
            AddedToken("\n<|im_start|>assistant\nfox", normalized=False),
            AddedToken("c<|im_end|>", normalized=False),
            AddedToken("[CLS]fox", normalized=False),
        ),
        False,
    ),
    "a longer token around": (
        lambda: with_tokens(byte_level(), AddedToken("\n<|im_start|>assistant\nfox", normalized=False)),
        True,
    ),
    "words alone": (
        lambda: with_tokens(
            byte_level(),
            AddedToken("<|im_start|>", normalized=False, single_word=True),
            AddedToken("<|im_end|>", normalized=False, single_word=True),
        ),
        False,
    ),
    "normalized tokens": (
        lambda: with_tokens(
            byte_level(), AddedToken("<|im_start|>", normalized=True), AddedToken("<|im_end|>", normalized=True)
        ),
        False,
    ),
}


def wrapped(tokenizer):
    roles = {"pad_token": "<|pad|>", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=tiny.CHAT_TEMPLATE, **roles)


def some_text(rng, count):
    return "".join(rng.choices(PIECES, k=count)) + rng.choice("abc")


def some_rows(conversational, count=12):
    rng = random.Random(0)
    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": some_text(rng, 8)}]
        completions = [[{"role": "assistant", "content": some_text(rng, 4)}] for _ in range(4)]
        if conversational and number % 3 == 0:
            prompt += [{"role": "assistant", "content": some_text(rng, 2)}]  # continued, or followed
        if number % 4 == 1:
            completions[0][0]["content"] = "fox"
        if not conversational:
            prompt = prompt[0]["content"] + ["", "[CLS]", "<|im_end|>", "<|im_start|>assistant\n"][number % 4]
            completions = [x[0]["content"] for x in completions]
        row = {"prompt": prompt, "completions": completions}
        if number % 2:
            row |= {"finished": [True, False, True, False], "completion_ids": [None, None, [7, 8], [7, 8]]}
        rows.append(row)
    return rows


def row_tokens(rows, tokenizer, by_parts):
    settings = {"processing_class": tokenizer, "eos_token": tokenizer.eos_token, "where": "d", "length_column": "n"}
    settings |= {"truncated_completions": "rank_last", "min_candidates": 2, "by_parts": by_parts, "code": ""}
    token_parts.forget_tokenizers()
    between_checks = range(sequences._FIRST_ROWS, sequences._EVERY)
    return [tokenization._tokenize_row(row, i, **settings) for i, row in zip(between_checks, rows, strict=False)]


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_parts_are_those_of_the_whole(name, conversational):
    tokenizer = wrapped(TOKENIZERS[name][0]())
    rows = some_rows(conversational, 16)
    assert row_tokens(rows, tokenizer, by_parts=True) == row_tokens(rows, tokenizer, by_parts=False)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_is_tokenized_once(name, monkeypatch):
    make, is_once = TOKENIZERS[name]
    tokenizer, texts = wrapped(make()), []
    encode = token_parts.encode_texts
    monkeypatch.setattr(token_parts, "encode_texts", lambda x, y, **options: texts.extend(y) or encode(x, y, **options))
    prompt = [{"role": "user", "content": "Why is the lazy dog blue?"}]
    row_tokens(
        [{"prompt": prompt, "completions": [[{"role": "assistant", "content": x}] for x in "abcd"]}], tokenizer, True
    )
    assert sum("lazy dog" in text for text in texts) == (1 if is_once else 5)


TEMPLATES = {
    "another generation prompt": tiny.CHAT_TEMPLATE.replace(
        "assistant\n' }}{% endif %}", "assistant\n[CLS]no [SEP]' }}{% endif %}"
    ),
    "another beginning": "{{ '[CLS]' ~ messages | length ~ '\n' }}" + tiny.CHAT_TEMPLATE,
    "nothing else": "{% if add_generation_prompt %}[CLS]{{ messages[0]['content'] }}{% else %}"
    "{{ messages[-1]['content'] }}[SEP]{% endif %}",
    "no added tokens": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_render_the_prompt_in_another_way_with_an_answer(name):
    tokenizer = wrapped(metaspace("first"))
    tokenizer.chat_template = TEMPLATES[name]
    rows = some_rows(True)
    assert row_tokens(rows, tokenizer, by_parts=True) == row_tokens(rows, tokenizer, by_parts=False)


@pytest.mark.parametrize("row", [0, 7, 12])
def test_a_tokenizer_whose_parts_differ_gets_whole_texts(row, caplog, monkeypatch):
    """Another token in the middle of the data: also the lists before it get the tokens of whole texts."""
    tokenizer = wrapped(byte_level(add_prefix_space=False))
    dataset = Dataset.from_list(some_rows(True, 16))
    settings = {"where": "d", "eos_token": tokenizer.eos_token, "max_length": None, "truncation_mode": "keep_start"}
    monkeypatch.setattr(sequences, "_EVERY", 4)
    right = tokenize_dataset(dataset, tokenizer, **settings)
    by_parts, asked = token_parts.encode_by_parts, []

    def wrong_from_a_row_on(*args):
        asked.append(args)
        return [[*ids, 5] for ids in by_parts(*args)] if len(asked) > row else by_parts(*args)

    monkeypatch.setattr(sequences, "encode_by_parts", wrong_from_a_row_on)
    monkeypatch.setattr(tokenization, "_CODE", f"wrong from {row} on")  # not what is in the cache
    with caplog.at_level("WARNING", logger="trl_larpo"):
        found = tokenize_dataset(dataset, tokenizer, **settings)
    assert found.to_list() == right.to_list()
    assert len(asked) == row + 1
    assert [x.message for x in caplog.records if "parts of a text" in x.message]
