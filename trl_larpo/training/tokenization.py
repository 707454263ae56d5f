"""From validated rows to token ids: `prompt_ids`, `completion_ids`, `relevance`."""

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc
import tokenizers
import transformers
import trl
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .. import token_parts
from ..errors import ConfigError, DataError
from . import sequences, validation
from .datasets import column_names
from .sequences import PartsDiffer, Source, encode, tokenizer_of
from .trl_compat import prepare_multimodal_messages
from .validation import canonical_row

logger = get_logger(__name__)
Row = dict[str, Any]

_FEATURES = {
    "prompt_ids": Sequence(Value("int32")),  # tokens take most of the space on disk, and of what is mapped into memory
    "completion_ids": Sequence(Sequence(Value("int32"))),
    "relevance": Sequence(Value("float64")),
}

_CODE = Hasher.hash(
    [inspect.getsource(module) for module in (sys.modules[__name__], sequences, token_parts, validation)]
    + [library.__version__ for library in (tokenizers, transformers, trl)]
)
"""Stands for what makes tokens of rows: what another version of it has left in the cache of datasets is not found."""

_warned_of: set[tuple[str, str]] = set()  # data set and kind of trouble, of the data set that is being tokenised


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    where: str,
    eos_token: str | None,
    max_length: int | None,
    truncation_mode: str,
    num_proc: int | None = None,
    length_column: str = "length",
    truncated_completions: str = "rank_last",
    min_candidates: int = 2,
) -> Dataset | IterableDataset:
    """
    Adds the columns `prompt_ids`, `completion_ids`, `relevance` and a length to a dataset of lists or pairs.

    Tokens are those that `DPOTrainer` would see: the chat template for conversations, the end-of-sequence token
    appended to plain strings. A completion that is not `finished` stops where its text does: no end-of-sequence token,
    and nothing of what the chat template puts after a message. Where a column `completion_ids` has the tokens that were
    sampled, those are taken, unless they are another tokenizer's.

    The prompt of a list is tokenized once where that gives the same tokens (see `token_parts`), which is checked on
    some of the rows; where it does not, and in streams, each completion is tokenized with its prompt.

    As in TRL, a list whose prompt alone fills `max_length` is dropped when the start is kept; how many were is logged.

    Args:
        dataset: Raw dataset.
        processing_class: Tokenizer or processor.
        where: Name of the dataset in messages.
        eos_token: Appended to plain-text completions that do not end with it; `None` is for conversations only.
        max_length: Longest prompt plus completion, in tokens. `None`: no limit.
        truncation_mode: `"keep_start"` or `"keep_end"`.
        num_proc: Processes to use on a map-style dataset.
        length_column: Name of the column for the tokens of a list, its prompt counted once, by which batches can be
            grouped. A column of that name that is there already stays.
        truncated_completions, min_candidates: As in [`canonical_row`].

    Returns:
        The dataset with four more columns. With `truncated_completions="drop"`, lists of which fewer than two
        completions are left are dropped.

    Raises:
        DataError: If a row is unusable, or no row is left.
        ConfigError: If completions are plain text, and the tokenizer has no end-of-sequence token.
    """
    _warned_of.clear()
    token_parts.forget_tokenizers()
    # Nothing but plain values is handed to `map` and `filter`, so that datasets can find their results in its cache
    map_kwargs: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        features = Features({length_column: Value("int64")} | dataset.features | _FEATURES)
        map_kwargs = {"num_proc": num_proc, "desc": f"Tokenizing {where}", "features": features}
    fn_kwargs = {
        "processing_class": processing_class,
        "eos_token": eos_token,
        "where": where,
        "length_column": length_column,
        "truncated_completions": truncated_completions,
        "min_candidates": min_candidates,
        "by_parts": isinstance(dataset, Dataset),  # rows of a stream are gone when a later one shows a difference
        "code": _CODE,
    }
    try:
        dataset = dataset.map(_tokenize_row, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)
    except PartsDiffer:
        logger.warning(
            f"{where}: this tokenizer treats parts of a text differently from the whole. So prompts are tokenized "
            "again for each completion, which takes longer."
        )
        fn_kwargs["by_parts"] = False
        dataset = dataset.map(_tokenize_row, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)
    # The first row of a stream need not have all columns
    if truncated_completions == "drop" and (
        "finished" in column_names(dataset) or isinstance(dataset, IterableDataset)
    ):
        reason, remedy = "fewer than 2 of their completions are finished", "Set `truncated_completions` to 'rank_last'."
        dataset = _drop(dataset, _has_two_candidates, {}, where, reason, remedy)
    if max_length is None or truncation_mode != "keep_start":
        return dataset
    reason = f"their prompt alone has at least `max_length={max_length}` tokens"
    remedy = "Raise `max_length` or shorten the prompts."
    dataset = _drop(dataset, _prompt_fits, {"max_length": max_length}, where, reason, remedy)
    if isinstance(dataset, Dataset):
        num_cut, num_candidates = _count_cut_completions(dataset, max_length)
        if num_cut:
            logger.warning(
                f"{where}: {num_cut} of {num_candidates} completions are cut at `max_length={max_length}` tokens and "
                "lose their end."
            )
    return dataset


def is_tokenized(dataset: Dataset | IterableDataset) -> bool:
    """Whether a dataset has the columns that [`tokenize_dataset`] adds, with their types."""
    features = dataset.features or {}
    return all(features.get(name) == feature for name, feature in _FEATURES.items())


def _drop(
    dataset: Dataset | IterableDataset,
    keeps: Callable[..., bool],
    arguments: dict[str, Any],
    where: str,
    reason: str,
    remedy: str,
) -> Dataset | IterableDataset:
    """
    Drops the lists for which `keeps` is false, and logs how many and why.

    Raises:
        DataError: If no list is left; says what to do.
    """
    if isinstance(dataset, IterableDataset):
        arguments = {
            "keeps": keeps,
            "arguments": arguments,
            "message": f"{where}: lists are dropped, because {reason}.",
        }
        return dataset.filter(_keeps_and_announces, fn_kwargs=arguments)
    kept = dataset.filter(keeps, fn_kwargs=arguments, desc=f"Filtering {where}")
    num_dropped = len(dataset) - len(kept)
    if len(kept) == 0:
        raise DataError(f"{where}: no list is left, because {reason}. {remedy}")
    if num_dropped:
        logger.warning(f"{where}: dropped {num_dropped} of {len(dataset)} lists, because {reason}.")
    return kept


def _keeps_and_announces(row: Row, keeps: Callable[..., bool], arguments: dict[str, Any], message: str) -> bool:
    kept = keeps(row, **arguments)
    if not kept:
        logger.warning_once(f"{message} Said once.")
    return kept


def _has_two_candidates(row: Row) -> bool:
    return len(row["completion_ids"]) >= 2


def _prompt_fits(row: Row, max_length: int) -> bool:
    return len(row["prompt_ids"]) < max_length


def _tokenize_row(
    row: Row,
    index: int,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    eos_token: str | None,
    where: str,
    length_column: str,
    truncated_completions: str,
    min_candidates: int,
    by_parts: bool,
    code: str,  # for the cache alone
) -> Row:
    ranked = canonical_row(row, index, where, truncated_completions, min_candidates)
    prompt = ranked["prompt"]
    tokenizer = tokenizer_of(processing_class)
    template_kwargs = {}
    # Completions continue the beginning of an answer. Those that `larpo` has sampled, which these columns mark, do not:
    # they were sampled after a generation prompt
    ends_with_answer = isinstance(prompt, list) and prompt[-1]["role"] == "assistant"
    continues = ends_with_answer and not {"finished", "completion_ids"} & row.keys()
    if ends_with_answer and not continues:
        _warn_once(
            where,
            "answer",
            f"{where} row {index}, column `prompt`: ends with a message of the assistant. It counts as complete, and "
            "completions follow it as a further message, as `larpo` samples them. They continue it in datasets without "
            "`finished` and `completion_ids`. Said once; other rows may be affected too.",
        )
    if isinstance(prompt, list):
        given = (row.get(name) for name in ("tools", "chat_template_kwargs"))
        tools, further = (json.loads(value) if isinstance(value, str) else value for value in given)
        template_kwargs = {"tools": tools, **(further or {})}
        prompt_source = Source(prompt, template_kwargs | {"add_generation_prompt": True})
        if continues:
            text = _render_up_to_end_of_content(processing_class, prompt, template_kwargs)
            if text is None:
                raise DataError(
                    f"{where} row {index}, column `prompt`: it ends with the beginning of an answer, whose end cannot "
                    "be found in the rendered chat template. Move it into the completions."
                )
            prompt_source = Source(text, is_rendered=True)
    else:
        if eos_token is None:
            raise ConfigError(
                f"{where}: plain-text completions get an end-of-sequence token, but the tokenizer has none. "
                "Set `tokenizer.eos_token`."
            )
        prompt_source = Source(prompt)
    known_ids, sources = [], []  # the tokens of a completion, or what to make them of
    of_completions = (ranked[name] for name in ("completions", "finished", "completion_ids"))
    for position, (completion, finished, ids) in enumerate(zip(*of_completions, strict=True)):
        if ids is not None and not _are_tokens_of(completion, finished, ids, tokenizer):
            _warn_once(
                where,
                "tokens",
                f"{where} row {index}, column `completion_ids`: entry {position} does not hold the tokens of the "
                "completion with this tokenizer, so its text is tokenised. Said once; other rows may be affected too.",
            )
            ids = None
        known_ids.append(ids)
        if ids is not None:
            if finished and _end_within_text(completion, ids, tokenizer):
                _warn_once(
                    where,
                    "end",
                    f"{where} row {index}, column `completion_ids`: entry {position} has no end token, but counts as "
                    "finished, so the model does not learn to end there. If the completion was cut off, set "
                    "`finished` to false for it; if not, append its end token. Said once; other rows may be affected "
                    "too.",
                )
        elif isinstance(prompt, str):
            sources.append(Source(prompt + completion.removesuffix(eos_token) + eos_token * finished))
        elif finished:
            messages = _continued(prompt, completion) if continues else prompt + completion
            sources.append(Source(messages, template_kwargs))
        else:
            text = _render_up_to_end_of_content(processing_class, prompt + completion, template_kwargs)
            if text is None:
                raise DataError(
                    f"{where} row {index}, column `finished`: entry {position} is false, but its end cannot be found "
                    "in the rendered chat template. Give its tokens in a column `completion_ids`, or remove it."
                )
            sources.append(Source(text, is_rendered=True))

    prompt_ids, *others = encode(processing_class, [prompt_source, *sources], by_parts, index)
    eos_id = tokenizer.eos_token_id
    if isinstance(prompt, str) and prompt_ids[-1:] == [eos_id] and not prompt.endswith(str(eos_token)):
        prompt_ids = prompt_ids[:-1]  # added by the tokenizer
    encoded = iter(others)
    sequences = []
    for completion, finished, ids in zip(ranked["completions"], ranked["finished"], known_ids, strict=True):
        sequence = next(encoded) if ids is None else prompt_ids + ids
        ends_twice = isinstance(prompt, str) and finished and sequence[-2:] == 2 * [eos_id]
        if ids is None and ends_twice and not completion.removesuffix(eos_token).endswith(eos_token):
            sequence = sequence[:-1]  # some tokenizers add one on their own
        while not finished and len(sequence) > len(prompt_ids) + 1 and sequence[-1] == eos_id:
            sequence = sequence[:-1]  # some tokenizers add it on their own
        sequences.append(sequence)

    # A completion starts where prompt and prompt + completion part ways, which can be before the end of the prompt.
    # The candidates of a list share one prompt, so the earliest such place counts.
    prompt_length = min((_common_prefix_length(prompt_ids, x) for x in sequences), default=len(prompt_ids))
    if prompt_length < len(prompt_ids):
        _warn_once(
            where,
            "prompt",
            f"{where} row {index}: the tokenised prompt is not how the tokenised prompt with completion begins. The "
            f"prompt's end {processing_class.decode(prompt_ids[prompt_length:])!r} is left out of training, so the "
            "model will see another context when it generates. Use a chat template that renders the prompt alike in "
            "both, or end the prompt where a token ends. Said once; other rows may be affected too.",
        )
    length = prompt_length + sum(len(sequence) - prompt_length for sequence in sequences)
    tokenized = {
        length_column: row.get(length_column, length),
        "prompt_ids": prompt_ids[:prompt_length],
        "completion_ids": [sequence[prompt_length:] for sequence in sequences],
        "relevance": ranked["relevance"],
    }
    return tokenized | ({"ref_logps": ranked["ref_logps"]} if "ref_logps" in ranked else {})


def _warn_once(where: str, kind: str, message: str) -> None:
    """Warns of a kind of trouble in the first row that has it; the message may name the row."""
    if (where, kind) not in _warned_of:
        _warned_of.add((where, kind))
        logger.warning(message)


def _common_prefix_length(ids: list[int], other_ids: list[int]) -> int:
    if other_ids[: len(ids)] == ids:  # nearly always, and much faster
        return len(ids)
    return next(
        (place for place, (a, b) in enumerate(zip(ids, other_ids, strict=False)) if a != b),
        min(len(ids), len(other_ids)),
    )


def _continued(prompt: list[Row], completion: list[Row]) -> list[Row]:
    """The conversation; a completion goes on in the last message where that is the beginning of an answer."""
    first, last = completion[0], prompt[-1]
    beginning, rest = last.get("content"), first.get("content")
    is_answer = last["role"] == first["role"] == "assistant"
    if not is_answer or not isinstance(beginning, str) or not isinstance(rest, str):
        return prompt + completion
    return [*prompt[:-1], last | first | {"content": beginning + rest}, *completion[1:]]


def _are_tokens_of(
    completion: str | list[Row], finished: bool, ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether tokens are those of a completion. They are not where another tokenizer made them."""
    text = _text_of(completion)
    if max(ids) >= len(tokenizer):
        return False
    # The last one of a completion that ended has no text: an end token, even if the tokenizer does not know it as such
    return text in (
        tokenizer.decode(part, skip_special_tokens=True) for part in ((ids, ids[:-1]) if finished else (ids,))
    )


def _end_within_text(completion: str | list[Row], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last one of a completion's tokens has a part of its text, and is no end token."""
    whole, shorter = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[:-1]))
    return whole == _text_of(completion) != shorter


def _text_of(completion: str | list[Row]) -> str | None:
    return completion if isinstance(completion, str) else completion[-1].get("content")


def _render_up_to_end_of_content(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, messages: list[Row], template_kwargs: dict[str, Any]
) -> str | None:
    """
    A conversation as text that ends where the content of its last message does.

    What the chat template puts there (an end token, a line break, anything else) is found by a mark at the end of the
    content, which also keeps blanks that the template would strip. `continue_final_message` of transformers loses them,
    and refuses templates that change the text.

    Returns:
        The text; `None` if the last message has no text, or the template does not show its end.
    """
    if isinstance(processing_class, ProcessorMixin):
        messages = prepare_multimodal_messages(messages)
    mark = "ENDOFCONTENT"
    while mark in str(messages):
        mark += "X"
    last = dict(messages[-1])
    if isinstance(last.get("content"), str):
        last["content"] += mark
    elif isinstance(last.get("content"), list) and isinstance((part := last["content"][-1]).get("text"), str):
        last["content"] = [*last["content"][:-1], part | {"text": part["text"] + mark}]
    else:
        return None
    rendered = processing_class.apply_chat_template([*messages[:-1], last], tokenize=False, **template_kwargs)
    text, found, _ = rendered.partition(mark)  # the first, where a template shows a message twice
    return text if found else None


def _count_cut_completions(dataset: Dataset, max_length: int) -> tuple[int, int]:
    """How many completions do not fit into `max_length` after their prompt, and how many there are."""
    num_cut = num_candidates = 0
    columns = dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow")
    for table in columns.iter(batch_size=1000):
        completions = table["completion_ids"].combine_chunks()
        prompt_lengths = pc.list_value_length(table["prompt_ids"].combine_chunks())
        lengths = pc.add(
            pc.take(prompt_lengths, pc.list_parent_indices(completions)),
            pc.list_value_length(pc.list_flatten(completions)),
        )
        num_cut += pc.sum(pc.greater(lengths, max_length)).as_py() or 0
        num_candidates += len(lengths)
    return num_cut, num_candidates
