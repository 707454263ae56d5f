"""
From a user's dataset rows to tokenised candidate lists.

Rows come as ranked lists (`prompt`, `completions` and, unless the completions stand best first, `rewards`) or as TRL's
preference pairs (`chosen`, `rejected`, with or without `prompt`), in standard (strings) or conversational (messages)
form. A column `finished` tells which completions of a list were cut off: those are trained on without an end token.
[`check_dataset`] validates every row of a map-style dataset before a model is loaded; [`tokenize_dataset`] turns rows
of any of these forms into one: `prompt_ids`, `completion_ids`, `relevance`.
"""

import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import extract_prompt
from trl.data_utils import _tokenize, common_prefix_length, prepare_multimodal_messages

from .errors import DataError

logger = get_logger(__name__)

Row = dict[str, Any]
RowFormat = Literal["list", "pair"]

KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})

# Columns under which other tools keep what we call `completions`
_OTHER_NAMES = (
    "responses",
    "response",
    "completion",
    "outputs",
    "generations",
    "candidates",
    "all_generated_responses",
)

_FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

_OPTIONAL_COLUMNS = ("rewards", "finished", "completion_ids", "ref_logps")

_NUM_PEEKED_ROWS = 16  # of a stream, which cannot be read twice cheaply
_NUM_ROWS_NAMED = 4  # bad rows named in one error


@dataclass
class ListSummary:
    """
    What a pass over all rows found.

    Attributes:
        num_lists: Rows validated.
        num_candidates: Completions in all of them.
        num_tied: Lists whose rewards are all equal: kept, but without any effect on training.
        num_conflicting: Lists in which the same completion occurs with different rewards.
        num_truncated: Completions that were cut off.
    """

    num_lists: int = 0
    num_candidates: int = 0
    num_tied: int = 0
    num_conflicting: int = 0
    num_truncated: int = 0

    def add(self, row: Row) -> None:
        self.num_lists += 1
        self.num_candidates += len(row["completions"])
        self.num_truncated += row["finished"].count(False)
        self.num_tied += len(row["relevance"]) > 1 and len(set(row["relevance"])) == 1
        rewards_of: dict[str, set[float]] = {}
        for completion, reward in zip(row["completions"], row["relevance"], strict=True):
            key = completion if isinstance(completion, str) else json.dumps(completion, sort_keys=True, default=str)
            rewards_of.setdefault(key, set()).add(reward)
        self.num_conflicting += any(len(rewards) > 1 for rewards in rewards_of.values())


def load_splits(path: str, config_name: str | None = None, streaming: bool = False) -> Mapping[str, Any]:
    """
    Loads a dataset from a file, a folder or the hub.

    Args:
        path: A JSONL, JSON, Parquet or CSV file, also as a URL of fsspec's (s3://, gs://, https://, ...); a folder of
            such files or one written by `save_to_disk`; or a hub id.
        config_name: Configuration of a hub dataset.
        streaming: Read rows as they are needed, without loading all first.

    Returns:
        Datasets by the name of their split. A single file or dataset is the split `"train"`.

    Raises:
        DataError: If the file is missing, of an unknown kind, or cannot be read.
    """
    if "://" in path:
        return _load_url(path, streaming)
    local = Path(path).expanduser()
    if not local.exists() and (path.startswith((".", "/", "~")) or local.suffix in _FILE_BUILDERS):
        raise DataError(f"There is no file or folder {path!r}.")
    if local.is_file() and local.suffix not in _FILE_BUILDERS:
        raise DataError(f"{path!r} is none of the kinds that can be read: {', '.join(_FILE_BUILDERS)}.")
    try:
        if local.is_file():
            builder = _FILE_BUILDERS[local.suffix]
            return load_dataset(builder, data_files={"train": str(local)}, streaming=streaming)
        if local.is_dir() and any((local / name).exists() for name in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(str(local))
            return {"train": saved} if isinstance(saved, Dataset) else saved
        return load_dataset(path, name=config_name, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{path!r} cannot be read: {cause}") from error


def _load_url(url: str, streaming: bool) -> Mapping[str, Any]:
    builder = _FILE_BUILDERS.get(Path(url.split("?")[0]).suffix)
    if builder is None:
        raise DataError(f"{url!r} is none of the kinds that can be read: {', '.join(_FILE_BUILDERS)}.")
    try:
        return load_dataset(builder, data_files={"train": url}, streaming=streaming)
    except Exception as error:  # of any protocol's package
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{url!r} cannot be read: {cause}") from error


def dataset_format(dataset: Dataset | IterableDataset, where: str, losses_need_pairs: bool = False) -> RowFormat:
    """
    Tells lists from pairs by the names of the columns.

    Args:
        dataset: Raw dataset.
        where: Name of the dataset in error messages, e.g. `"train_dataset"`.
        losses_need_pairs: What to make of a dataset with the columns of both formats: pairs, as `DPOTrainer` does, or
            an error, because whichever is taken the other is ignored.

    Returns:
        `"list"` or `"pair"`.

    Raises:
        DataError: If columns are missing, or it is unclear which of the two formats is meant.
    """
    columns = column_names(dataset)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise DataError(f"{where} is empty; give at least one row.")
    pair = "chosen" in columns and "rejected" in columns
    if pair and losses_need_pairs:
        return "pair"
    if "completions" in columns:
        if pair:
            raise DataError(
                f"{where} has the columns of ranked lists (`completions`) and of pairs (`chosen`, `rejected`); keep "
                "one of the two, e.g. with `dataset.remove_columns(['chosen', 'rejected'])`."
            )
        if "prompt" not in columns:
            raise DataError(
                f"{where} has the column `completions` but no column `prompt`; lists need both. Its columns: "
                f"{', '.join(columns)}."
            )
        return "list"
    if pair:
        return "pair"
    other = next((name for name in _OTHER_NAMES if name in columns), None)
    if other is not None:
        fix = f"`dataset.rename_column({other!r}, 'completions')`, if each of its entries is a list of completions"
    else:
        fix = "add `prompt` and `completions` (ranked lists), or `chosen` and `rejected` (pairs)"
    raise DataError(f"{where} has no column `completions`; {fix}. Its columns: {', '.join(columns)}.")


def has_images(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows carry an `image` or `images`, as in TRL's vision datasets."""
    return not {"image", "images"}.isdisjoint(column_names(dataset))


def check_dataset(
    dataset: Dataset | IterableDataset, where: str, truncated_completions: str = "rank_last"
) -> ListSummary:
    """
    Looks at every list of a dataset (at the first few of a stream) and refuses it if one of them is unusable.

    Args:
        dataset: Raw dataset in list format.
        where: Name of the dataset in messages, e.g. `"train_dataset"`.
        truncated_completions: As in [`canonical_row`].

    Returns:
        Counts of what was seen; also logged, as a warning where it asks for attention.

    Raises:
        DataError: Names the first bad row, its column and how to fix it, and the numbers of further bad rows.
    """
    summary, first_error, further = ListSummary(), None, []
    for index, row in _rows(dataset, where):
        try:
            summary.add(canonical_row(row, index, where, truncated_completions))
        except DataError as error:
            if first_error is None:
                first_error = error
            else:
                further.append(str(index))
            if len(further) == _NUM_ROWS_NAMED - 1:
                break
    if first_error is not None:
        also = f" (Bad as well: row{'s' * (len(further) > 1)} {', '.join(further)}.)" if further else ""
        raise DataError(f"{first_error}{also}") from None
    if summary.num_truncated:
        logger.info(
            f"{where}: {summary.num_truncated} completions were cut off (truncated_completions="
            f"{truncated_completions!r})."
        )
    if summary.num_tied:
        logger.warning(
            f"{where}: in {summary.num_tied} of {summary.num_lists} lists all rewards are equal. They are kept and "
            "contribute nothing to the loss."
        )
    if summary.num_conflicting:
        logger.warning(
            f"{where}: {summary.num_conflicting} of {summary.num_lists} lists hold the same completion more than once, "
            "with different rewards. Check the reward, or drop the duplicates."
        )
    return summary


def canonical_row(row: Row, index: int, where: str, truncated_completions: str = "rank_last") -> Row:
    """
    One list in the only form the rest of the package knows, or an error that says what is wrong with it.

    Args:
        row: Row with `prompt`, `completions` and perhaps `rewards`, `finished`, `completion_ids`, `ref_logps`; or with
            `chosen`, `rejected` and perhaps `prompt`.
        index: Its number, for the error message.
        where: Name of the dataset, for the error message.
        truncated_completions: `"rank_last"`: completions with `finished` false get one relevance below all others, and
            may have no reward; `"by_reward"`: their relevance is their reward; `"drop"`: they are taken out.

    Returns:
        A row with these entries, each list with an element for each completion that stays:

        - `prompt`: str or messages;
        - `completions`: str or messages;
        - `relevance`: float. The rewards where given; else it falls from m - 1 for the first completion to 0 for the
          last;
        - `finished`: bool, all true without such a column;
        - `completion_ids`: list of int, or `None` where unknown;
        - `ref_logps`: float, if the row has them.

    Raises:
        DataError: If the row cannot be used.
    """

    def fail(column: str, problem: str) -> DataError:
        return DataError(f"{where} row {index}, column `{column}`: {problem}")

    if "completions" not in row:
        _check_ref_logps(row, 2, fail)
        ref_logps = {"ref_logps": row["ref_logps"]} if "ref_logps" in row else {}
        return _canonical_pair(row, fail) | {"finished": [True, True], "completion_ids": [None, None]} | ref_logps
    prompt = row.get("prompt")
    conversational = isinstance(prompt, list)
    if problem := prompt_problem(prompt):
        raise fail("prompt", problem)

    completions = _as_list(row["completions"])
    if not isinstance(completions, list):
        kind = "a string" if isinstance(completions, str) else f"of type {type(completions).__name__}"
        raise fail("completions", f"is {kind}; give a list of at least 2 completions.")
    for position, completion in enumerate(completions):
        problem = _completion_problem(completion, conversational)
        if problem:
            raise fail("completions", f"entry {position} {problem}")
    if len(completions) < 2:
        raise fail("completions", f"has {len(completions)} of the 2 entries a list needs; remove the row.")
    _check_ref_logps(row, len(completions), fail)

    count = len(completions)
    finished = _finished(row, count, fail)
    canonical = {
        "prompt": prompt,
        "completions": completions,
        "relevance": _relevance(row, finished, truncated_completions, fail),
        "finished": finished,
        "completion_ids": _completion_ids(row, count, fail),
    }
    if "ref_logps" in row:
        canonical["ref_logps"] = _as_list(row["ref_logps"])
    if truncated_completions == "drop":
        canonical = {
            name: values if name == "prompt" else [x for x, ended in zip(values, finished, strict=True) if ended]
            for name, values in canonical.items()
        }
    return canonical


def _relevance(row: Row, finished: list[bool], truncated_completions: str, fail) -> list[float]:
    """
    What the losses see as ground truth: rewards, or the order of the completions.

    Ranked last, all cut-off completions get one value below the others: lower than the worst by the mean distance of
    two neighbours among them, by 1 where they do not differ.
    """
    if "rewards" not in row:
        relevance = [float(rank) for rank in reversed(range(len(finished)))]
    else:
        relevance = _as_list(row["rewards"])
        if not isinstance(relevance, list):
            kind = "None" if relevance is None else f"of type {type(relevance).__name__}"
            raise fail(
                "rewards",
                f"is {kind}; give one number per completion (or drop the column if completions stand best first).",
            )
        if len(relevance) != len(finished):
            raise fail("rewards", f"has {len(relevance)} numbers for {len(finished)} completions; give one for each.")
        for position, (reward, ended) in enumerate(zip(relevance, finished, strict=True)):
            if reward is None and not ended and truncated_completions != "by_reward":
                continue
            if reward is None or not isinstance(reward, Real):
                problem = f"entry {position} is {reward!r}, not a number; score it or remove the completion."
                raise fail("rewards", problem)
            if not math.isfinite(reward):
                raise fail("rewards", f"entry {position} is {reward}; give a finite number or remove the completion.")
    if truncated_completions == "rank_last" and not all(finished):
        of_finished = [float(value) for value, ended in zip(relevance, finished, strict=True) if ended]
        lowest, spread = (min(of_finished), max(of_finished) - min(of_finished)) if of_finished else (0.0, 0.0)
        last = lowest - (spread / (len(of_finished) - 1) if spread > 0 else 1.0)
        last = min(last, math.nextafter(lowest, -math.inf))  # also where rounding swallows the difference
        relevance = [value if ended else last for value, ended in zip(relevance, finished, strict=True)]
    return [0.0 if value is None else float(value) for value in relevance]  # None: dropped


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    where: str,
    eos_token: str,
    max_length: int | None,
    truncation_mode: str,
    num_proc: int | None = None,
    length_column: str = "length",
    truncated_completions: str = "rank_last",
) -> Dataset | IterableDataset:
    """
    Adds the columns `prompt_ids`, `completion_ids`, `relevance` and a length to a dataset of lists or pairs.

    Tokens are those that `DPOTrainer` would see: the chat template for conversations, the end-of-sequence token
    appended to plain strings. A completion that is not `finished` stops where its text does: no end-of-sequence token,
    and nothing of what the chat template puts after a message. Where a column `completion_ids` has the tokens that were
    sampled, those are taken, unless they are another tokenizer's.

    As in TRL, a list whose prompt alone fills `max_length` is dropped when the start is kept; how many were is logged.

    Args:
        dataset: Raw dataset.
        processing_class: Tokenizer or processor.
        where: Name of the dataset in messages.
        eos_token: Appended to plain-text completions that do not end with it.
        max_length: Longest prompt plus completion, in tokens. `None`: no limit.
        truncation_mode: `"keep_start"` or `"keep_end"`.
        num_proc: Processes to use on a map-style dataset.
        length_column: Name of the column for the tokens of a list, its prompt counted once, by which batches can be
            grouped. A column of that name that is there already stays.
        truncated_completions: As in [`canonical_row`].

    Returns:
        The dataset with four more columns. With `truncated_completions="drop"`, lists of which fewer than two
        completions are left are dropped.

    Raises:
        DataError: If a row is unusable, or no row is left.
    """
    # Nothing but plain values is handed to `map` and `filter`, so that datasets can find their results in its cache
    map_kwargs: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        map_kwargs = {"num_proc": num_proc, "desc": f"Tokenizing {where}"}
    dataset = dataset.map(
        _tokenize_row,
        with_indices=True,
        fn_kwargs={
            "processing_class": processing_class,
            "eos_token": eos_token,
            "where": where,
            "length_column": length_column,
            "truncated_completions": truncated_completions,
        },
        **map_kwargs,
    )
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
    eos_token: str,
    where: str,
    length_column: str,
    truncated_completions: str,
) -> Row:
    ranked = canonical_row(row, index, where, truncated_completions)
    prompt = ranked["prompt"]
    template_kwargs = {}
    if isinstance(prompt, list):
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        template_kwargs = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        prompt_ids = _tokenize(processing_class, prompt, add_generation_prompt=True, **template_kwargs)["input_ids"]
    else:
        prompt_ids = _tokenize(processing_class, prompt)["input_ids"]
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    sequences = []
    of_completions = (ranked[name] for name in ("completions", "finished", "completion_ids"))
    for position, (completion, finished, ids) in enumerate(zip(*of_completions, strict=True)):
        if ids is not None and not _are_tokens_of(completion, ids, tokenizer):
            logger.warning_once(
                f"{where} row {index}, column `completion_ids`: entry {position} does not hold the tokens of the "
                "completion with this tokenizer, so its text is tokenised. Said once; other rows may be affected too."
            )
            ids = None
        if ids is not None:
            sequence = prompt_ids + ids
            if isinstance(prompt, str) and prompt_ids[-1:] == [tokenizer.eos_token_id]:  # added by the tokenizer
                sequence = prompt_ids[:-1] + ids
        elif isinstance(prompt, str):
            text = completion.removesuffix(eos_token)
            sequence = _tokenize(processing_class, prompt + text + eos_token * finished)["input_ids"]
        elif finished:
            sequence = _tokenize(processing_class, prompt + completion, **template_kwargs)["input_ids"]
        else:
            text = _render_up_to_end_of_content(processing_class, prompt + completion, template_kwargs)
            if text is None:
                raise DataError(
                    f"{where} row {index}, column `finished`: entry {position} is false, but its end cannot be found "
                    "in the rendered chat template. Give its tokens in a column `completion_ids`, or remove it."
                )
            sequence = tokenizer(text, add_special_tokens=False)["input_ids"]
        while not finished and len(sequence) > len(prompt_ids) + 1 and sequence[-1] == tokenizer.eos_token_id:
            sequence = sequence[:-1]  # some tokenizers add it on their own
        sequences.append(sequence)

    # A completion starts where prompt and prompt + completion part ways, which can be before the end of the prompt.
    # The candidates of a list share one prompt, so the earliest such place counts.
    prompt_length = min((common_prefix_length(prompt_ids, x) for x in sequences), default=len(prompt_ids))
    if prompt_length < len(prompt_ids):
        logger.warning_once(
            f"{where} row {index}: the tokenised prompt is not how the tokenised prompt with completion begins. The "
            f"prompt's end {processing_class.decode(prompt_ids[prompt_length:])!r} is left out of training, so the "
            "model will see another context when it generates. Use a chat template that renders the prompt alike in "
            "both, or end the prompt where a token ends. Said once; other rows may be affected too."
        )
    length = prompt_length + sum(len(sequence) - prompt_length for sequence in sequences)
    tokenized = {
        length_column: row.get(length_column, length),
        "prompt_ids": prompt_ids[:prompt_length],
        "completion_ids": [sequence[prompt_length:] for sequence in sequences],
        "relevance": ranked["relevance"],
    }
    return tokenized | ({"ref_logps": ranked["ref_logps"]} if "ref_logps" in ranked else {})


def _are_tokens_of(completion: str | list[Row], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokens are those of a completion. They are not where another tokenizer made them."""
    text = completion if isinstance(completion, str) else completion[-1].get("content")
    return max(ids) < len(tokenizer) and tokenizer.decode(ids, skip_special_tokens=True) == text


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


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a dataset, looked up in its first row where a stream does not know them."""
    columns = dataset.column_names
    return list(next(iter(dataset), {})) if columns is None else columns


def _rows(dataset: Dataset | IterableDataset, where: str) -> Iterator[tuple[int, Row]]:
    if isinstance(dataset, IterableDataset):
        yield from enumerate(dataset.take(_NUM_PEEKED_ROWS))
        return
    columns = [name for name in ("prompt", "completions", *_OPTIONAL_COLUMNS) if name in dataset.column_names]
    batches = dataset.with_format(None).select_columns(columns).iter(batch_size=1000)
    quiet = not PartialState().is_local_main_process
    with tqdm(total=len(dataset), desc=f"Checking {where}", unit=" lists", delay=2, disable=quiet) as progress:
        index = 0
        for batch in batches:
            for values in zip(*batch.values(), strict=True):
                yield index, dict(zip(batch, values, strict=True))
                index += 1
            progress.update(index - progress.n)


def prompt_problem(prompt: Any) -> str | None:
    """What is wrong with a prompt, to be read after its name; `None` if nothing is."""
    return _message_problem(prompt) if isinstance(prompt, list) else _text_problem(prompt)


def _finished(row: Row, num_completions: int, fail) -> list[bool]:
    finished = _as_list(row.get("finished"))
    if finished is None:  # a file whose rows do not all have the column
        return [True] * num_completions
    if not isinstance(finished, list) or len(finished) != num_completions:
        raise fail(
            "finished",
            f"is {finished!r}; give true or false for each of the {num_completions} completions (false: cut off before "
            "its end), or drop the column.",
        )
    for position, value in enumerate(finished):
        if not isinstance(value, bool | np.bool_):
            raise fail("finished", f"entry {position} is {value!r}; give true or false.")
    return list(map(bool, finished))


def _completion_ids(row: Row, num_completions: int, fail) -> list[list[int] | None]:
    of_completions = _as_list(row.get("completion_ids"))
    if of_completions is None:
        return [None] * num_completions
    if not isinstance(of_completions, list) or len(of_completions) != num_completions:
        raise fail(
            "completion_ids",
            f"does not have an entry for each of the {num_completions} completions; give the tokens of each, or None "
            "where they are unknown, or drop the column.",
        )
    return [_token_ids(ids, position, fail) for position, ids in enumerate(of_completions)]


def _token_ids(ids: Any, position: int, fail) -> list[int] | None:
    """Tokens from a list of ids or a text of ids; `None` where it is empty."""
    found = ids.split() if isinstance(ids, str) else _as_list(ids)
    if found is None or (isinstance(found, list) and not found):
        return None
    try:
        tokens = [operator.index(int(x) if isinstance(x, str) else x) for x in found]
    except (TypeError, ValueError):
        tokens = [-1]
    if any(isinstance(x, bool) for x in found) or min(tokens) < 0:
        raise fail("completion_ids", f"entry {position} is {ids!r}; give a list of token ids, or None if unknown.")
    return tokens


def _check_ref_logps(row: Row, num_completions: int, fail) -> None:
    if "ref_logps" not in row:
        return
    ref_logps = _as_list(row["ref_logps"])
    if not isinstance(ref_logps, list) or len(ref_logps) != num_completions:
        raise fail(
            "ref_logps",
            f"is {ref_logps!r}; give the reference's log-probability of each of the {num_completions} completions, or "
            "drop the column.",
        )
    for position, logp in enumerate(ref_logps):
        if not isinstance(logp, Real) or not math.isfinite(logp) or logp > 0:
            raise fail(
                "ref_logps", f"entry {position} is {logp!r}; give a finite number of at most 0, or drop the column."
            )


def _canonical_pair(row: Row, fail) -> Row:
    for column in ("chosen", "rejected"):
        if not isinstance(row.get(column), str | list):
            raise fail(column, f"is {row.get(column)!r}; give a string or a list of messages.")
    if row.get("prompt") is None:
        row = extract_prompt(row)
    return {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "relevance": [1.0, 0.0]}


def _as_list(value: Any) -> Any:
    """Lists stay; tuples, arrays and tensors become lists; anything else stays what it is."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _text_problem(text: Any) -> str | None:
    if text is None:
        return "is None; give a string or a list of messages."
    if not isinstance(text, str):
        return f"is of type {type(text).__name__}; give a string or a list of messages."
    if not text.strip():
        return "is empty; remove the row or fill it."
    return None


def _completion_problem(completion: Any, conversational: bool) -> str | None:
    if completion is None:
        return "is None; remove it, together with its reward."
    if isinstance(completion, dict):
        return f"is a single object with the keys {', '.join(map(repr, completion))}; give " + (
            "a list of messages, e.g. [{'role': 'assistant', 'content': ...}]." if conversational else "its text."
        )
    if conversational and isinstance(completion, str):
        return "is a string, but the prompt is a list of messages; wrap it: [{'role': 'assistant', 'content': ...}]."
    if not conversational and isinstance(completion, list):
        return "is a list of messages, but the prompt is a string; give both as strings or both as messages."
    if conversational:
        problem = _message_problem(completion)
        if problem is None and not _says_something(completion[-1]):
            problem = "is empty; remove it, together with its reward."
        return problem
    if isinstance(completion, str) and not completion.strip():
        return "is empty; remove it, together with its reward."
    return _text_problem(completion)


def _message_problem(messages: Any) -> str | None:
    if not isinstance(messages, list):
        return f"is of type {type(messages).__name__}; give a list of messages."
    if not messages:
        return "is an empty list of messages; remove it or fill it."
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            return f"holds {message!r}, which is no message; give {{'role': ..., 'content': ...}}."
        if message["role"] not in KNOWN_ROLES:
            return (
                f"has a message of the unknown role {message['role']!r}; use one of {', '.join(sorted(KNOWN_ROLES))}."
            )
    if not any(_says_something(message) for message in messages):
        return "is empty: no message has any content; remove it or fill it."
    return None


def _says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))
