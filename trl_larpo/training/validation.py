"""
Validates a user's dataset rows, and brings them into one form.

Rows come as ranked lists (`prompt`, `completions` and, unless the completions stand best first, `rewards`) or as TRL's
preference pairs (`chosen`, `rejected`, with or without `prompt`), in standard (strings) or conversational (messages)
form. A column `finished` tells which completions of a list were cut off: those are trained on without an end token.
[`check_dataset`] validates every row of a map-style dataset before a model is loaded; [`canonical_row`] turns a row of
any of these forms into one.
"""

import json
import math
import operator
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from trl import extract_prompt

from ..errors import DataError
from ..prompts import message_problem, prompt_problem, says_something, text_problem
from .datasets import column_names

Row = dict[str, Any]
RowFormat = Literal["list", "pair"]
logger = get_logger(__name__)


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

_OPTIONAL_COLUMNS = ("rewards", "finished", "completion_ids", "ref_logps")

_NUM_PEEKED_ROWS = 16  # of a stream, which cannot be read twice cheaply

_NUM_ROWS_NAMED = 4  # bad rows named in one error

_LARGEST_REWARD = float(np.finfo(np.float32).max) / 2**20
"""So that sums over lists of them are numbers of float32."""


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


def check_dataset(
    dataset: Dataset | IterableDataset, where: str, truncated_completions: str = "rank_last"
) -> ListSummary:
    """
    Validates every list or pair of a dataset (the first few of a stream), and refuses it if one is unusable.

    Args:
        dataset: Raw dataset of lists, or of pairs.
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


def canonical_row(
    row: Row, index: int, where: str, truncated_completions: str = "rank_last", min_candidates: int = 2
) -> Row:
    """
    One list in the only form the rest of the package knows, or an error that says what is wrong with it.

    Args:
        row: Row with `prompt`, `completions` and perhaps `rewards`, `finished`, `completion_ids`, `ref_logps`; or with
            `chosen`, `rejected` and perhaps `prompt`.
        index: Its number, for the error message.
        where: Name of the dataset, for the error message.
        truncated_completions: `"rank_last"`: completions with `finished` false get one relevance below all others, and
            may have no reward; `"by_reward"`: their relevance is their reward; `"drop"`: they are taken out.
        min_candidates: Fewest completions of a list. To train on, 2; to score, 1.

    Returns:
        A row with these entries, each list with an element for each completion that stays:

        - `prompt`: str or messages;
        - `completions`: str or messages;
        - `relevance`: float that float32 represents exactly. The rewards, rounded, where given; else it falls from
          m - 1 for the first completion to 0 for the last;
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
        raise fail("completions", f"is {kind}; give a list of at least {min_candidates} completions.")
    for position, completion in enumerate(completions):
        problem = _completion_problem(completion, conversational)
        if problem:
            raise fail("completions", f"entry {position} {problem}")
    if len(completions) < min_candidates:
        raise fail(
            "completions", f"has {len(completions)} of the {min_candidates} entries a list needs; remove the row."
        )
    _check_ref_logps(row, len(completions), fail)

    count = len(completions)
    finished = _finished(row, count, fail)
    canonical: Row = {
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
    """The relevance of each completion: of its reward, or of its place."""
    rewards: list[float | None]
    if "rewards" in row:
        rewards = _rewards(row, finished, truncated_completions, fail)
    else:
        rewards = [float(rank) for rank in reversed(range(len(finished)))]
    return ranked_relevance(rewards, finished, truncated_completions)


def ranked_relevance(rewards: list[float | None], finished: list[bool], truncated_completions: str) -> list[float]:
    """
    What the losses see as ground truth.

    Ranked last, all cut-off completions get one value below the others: lower than the worst by the mean distance of
    two neighbours among them, by 1 where they do not differ.

    Args:
        rewards: Of the completions of a list; `None` for cut-off ones alone, where their rewards do not count.
        finished: Whether each of them ended on its own.
        truncated_completions: As in [`canonical_row`].

    Returns:
        The relevance of each completion, rounded to float32, which batches hold.
    """
    rewards = [None if reward is None else float(np.float32(reward)) for reward in rewards]
    if truncated_completions == "rank_last" and not all(finished):
        by_completion = zip(rewards, finished, strict=True)
        of_finished = [value for value, ended in by_completion if ended and value is not None]
        lowest, spread = (min(of_finished), max(of_finished) - min(of_finished)) if of_finished else (0.0, 0.0)
        last = lowest - (spread / (len(of_finished) - 1) if spread > 0 else 1.0)
        below = float(np.nextafter(np.float32(lowest), np.float32(-np.inf)))
        last = min(last, below)  # also where rounding swallows the difference
        last = float(np.float32(max(last, -_LARGEST_REWARD)))
        rewards = [value if ended else last for value, ended in zip(rewards, finished, strict=True)]
    return [0.0 if value is None else value for value in rewards]  # None: dropped


def _rewards(row: Row, finished: list[bool], truncated_completions: str, fail) -> list[float | None]:
    """The rewards of a row; `None` is for cut-off completions alone, where their rewards do not count."""
    rewards = _as_list(row["rewards"])
    if not isinstance(rewards, list):
        kind = "None" if rewards is None else f"of type {type(rewards).__name__}"
        raise fail(
            "rewards",
            f"is {kind}; give one number per completion (or drop the column if completions stand best first).",
        )
    if len(rewards) != len(finished):
        raise fail("rewards", f"has {len(rewards)} numbers for {len(finished)} completions; give one for each.")
    for position, (reward, ended) in enumerate(zip(rewards, finished, strict=True)):
        if reward is None and not ended and truncated_completions != "by_reward":
            continue
        if reward is None or not isinstance(reward, Real):
            problem = f"entry {position} is {reward!r}, not a number; score it or remove the completion."
            raise fail("rewards", problem)
        try:
            number = float(reward)
        except OverflowError:  # an integer
            number = sys.float_info.max
        if not math.isfinite(number):
            raise fail("rewards", f"entry {position} is {reward}; give a finite number or remove the completion.")
        if abs(number) > _LARGEST_REWARD:
            raise fail(
                "rewards",
                f"entry {position} is beyond {_LARGEST_REWARD:.3g}, too large for sums in float32; divide all rewards "
                "by a constant.",
            )
    return [None if reward is None else float(reward) for reward in rewards]


def _rows(dataset: Dataset | IterableDataset, where: str) -> Iterator[tuple[int, Row]]:
    if isinstance(dataset, IterableDataset):
        yield from enumerate(dataset.take(_NUM_PEEKED_ROWS))
        return
    known = ("prompt", "completions", "chosen", "rejected", *_OPTIONAL_COLUMNS)
    columns = [name for name in known if name in dataset.column_names]
    batches = dataset.with_format(None).select_columns(columns).iter(batch_size=1000)
    quiet = not PartialState().is_local_main_process
    with tqdm(total=len(dataset), desc=f"Checking {where}", unit=" rows", delay=2, disable=quiet) as progress:
        index = 0
        for batch in batches:
            for values in zip(*batch.values(), strict=True):
                yield index, dict(zip(batch, values, strict=True))
                index += 1
            progress.update(index - progress.n)


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
    if not isinstance(found, list) or any(isinstance(x, bool) for x in found) or min(tokens) < 0:
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
        if not isinstance(logp, Real) or not math.isfinite(logp) or float(logp) > 0:
            raise fail(
                "ref_logps", f"entry {position} is {logp!r}; give a finite number of at most 0, or drop the column."
            )


def _canonical_pair(row: Row, fail) -> Row:
    for column in ("chosen", "rejected"):
        if not isinstance(row.get(column), str | list):
            raise fail(column, f"is {row.get(column)!r}; give a string or a list of messages.")
    if row.get("prompt") is None:
        row = extract_prompt(row)
    are_messages = {name: isinstance(row[name], list) for name in ("prompt", "chosen", "rejected")}
    if are_messages["chosen"] != are_messages["rejected"]:
        raise fail("rejected", "and `chosen` are a string and messages; give both as strings or both as messages.")
    if are_messages["prompt"] and not are_messages["chosen"]:
        raise fail("prompt", "holds messages, and `chosen` a string; give both as strings or both as messages.")
    if are_messages["chosen"] and not are_messages["prompt"]:
        fix = "write it as [{'role': 'user', 'content': ...}]"
        if len(row["chosen"]) > 1:
            fix = "remove the column, so that the prompt is taken from them: `dataset.remove_columns('prompt')`"
        raise fail("prompt", f"is a string, and `chosen` holds messages; {fix}.")
    return {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "relevance": [1.0, 0.0]}


def _as_list(value: Any) -> Any:
    """Lists stay; tuples, arrays and tensors become lists; anything else stays what it is."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


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
        problem = message_problem(completion)
        if problem is None and not says_something(completion[-1]):
            problem = "is empty; remove it, together with its reward."
        return problem
    if isinstance(completion, str) and not completion.strip():
        return "is empty; remove it, together with its reward."
    return text_problem(completion)
