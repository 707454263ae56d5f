"""Reads files of candidates: this package's own, RLHFlow's, SimPO's and UltraFeedback's."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from ..candidates import Candidate, CandidatePool
from ..errors import DataError
from ..pools import StoredPools
from ..prompts import (
    NOT_UNICODE,
    Prompt,
    Row,
    columns_of,
    completion_for,
    form_problem,
    is_unicode,
    prompt_problem,
    without_none,
)
from ..storage import StoredRows, rows_as_written
from ..training.datasets import load_splits

logger = logging.getLogger(__name__)

_PROMPT_COLUMNS = ("prompt", "instruction", "question")

_COMPLETION_COLUMNS = {"completions": "file", "responses": "rlhflow", "all_generated_responses": "simpo"}
"""Column of the completions: where it comes from."""

_FORMS = (*_COMPLETION_COLUMNS.values(), "ultrafeedback")

_REWARD_COLUMNS = ("rewards", "all_rm_scores")

_NO_SCORE = ("", "n/a", "na", "none", "null", "nan")

_OURS = ("prompt_id", "columns", "left_out", "problem", "reward_id", "reward_parts", "ref_logps")
"""Columns of this package's files that are read from, or made again. In files of others these are the user's."""


def read_candidate_pools(path: str, as_messages: bool = False) -> StoredPools:
    """
    Prompts and their completions, whichever of the known shapes they come in.

    Args:
        path: A JSONL, JSON or Parquet file, a folder, or a hub id. Known shapes of a row: `prompt` and `completions`
            (with `rewards`, `finished`, `candidates`, if they are there); RLHFlow's `prompt`, `responses`, `rewards`;
            UltraFeedback's `instruction` and `completions`, each with `response` and `overall_score`; SimPO's `prompt`,
            `all_generated_responses`, `all_rm_scores`. Without `finished` all completions count as finished.
        as_messages: Makes text prompts and their completions the messages of a conversation.

    Returns:
        One pool for each prompt, and for each of the rewards that scored its completions; other columns are the
        prompt's. All rows are checked now, and read again when their pool is asked for. Rows without completions give
        pools without candidates, and completions that are null are empty; warnings count them and name the first.

    Raises:
        DataError: Names the file, the row and what is wrong with it.
    """
    file = None if "://" in path else Path(path).expanduser()
    if file is not None and file.suffix == ".jsonl":
        raw: Sequence[Row] = StoredRows([file])  # also rows that do not all have the same columns
    else:
        raw = (file and rows_as_written(file)) or next(iter(load_splits(path).values()))
    if not len(raw):
        raise DataError(f"{path!r} is empty.")

    def pool(number: int) -> CandidatePool:
        return _pool(dict(raw[number]), f"{path!r} row {number}", as_messages)

    lacking: dict[str, list[int]] = {}
    first_columns: dict[str, int] = {}  # hashes
    groups: dict[tuple[str, str | None], list[int]] = {}
    for number in range(len(raw)):
        row = dict(raw[number])
        new = _pool(row, f"{path!r} row {number}", as_messages)
        judge = new.candidates[0].scored_by if new.candidates else None
        groups.setdefault((new.prompt.id, judge), []).append(number)
        columns = hash(json.dumps(new.prompt.columns, sort_keys=True, default=str))
        for what in _lacks(row):
            lacking.setdefault(what, []).append(number)
        if first_columns.setdefault(new.prompt.id, columns) != columns:
            lacking.setdefault("have the prompt of an earlier row, whose columns count, with others", []).append(number)
    for what, numbers in lacking.items():
        logger.warning(f"{path!r}: {len(numbers)} of {len(raw)} rows {what} (first: row {numbers[0]}).")
    rows_of = list(groups.values())

    def merged(place: int) -> CandidatePool:
        first, *others = map(pool, rows_of[place])
        return first.with_candidates([c for each in (first, *others) for c in each.candidates])

    return StoredPools([prompt_id for prompt_id, _ in groups], merged)


def _lacks(row: Row) -> Iterator[str]:
    """What a row lacks without being refused, to be read after the number of such rows."""
    completions = next(row[column] for column in _COMPLETION_COLUMNS if column in row)
    if not completions:
        yield "have no completions and are left out"
        return
    feedback = [each for each in completions if isinstance(each, dict)]
    if None in completions or any(each["response"] is None for each in feedback):
        yield "have completions that are null, which count as empty"
    if any(each.get("overall_score") is not None and _score(each, "") is None for each in feedback):
        yield "have an `overall_score` that says there is none, and completions without a reward"


def _pool(row: Row, where: str, as_messages: bool) -> CandidatePool:
    name = next((name for name in _PROMPT_COLUMNS if name in row), None)
    if name is None:
        raise DataError(f"{where} has no column `prompt`. Its columns: {', '.join(row)}.")
    prompt = row[name]
    if problem := prompt_problem(prompt):
        raise DataError(f"{where}, column `{name}`: {problem}")
    column = next((column for column in _COMPLETION_COLUMNS if column in row), None)
    completions = [] if column is None or row[column] is None else row[column]
    if column is None or not isinstance(completions, list):
        raise DataError(f"{where} has no list of completions; give a column `completions` or `responses`.")
    reward_column = next((column for column in _REWARD_COLUMNS if column in row), "rewards")
    rewards, source = row.get(reward_column), _COMPLETION_COLUMNS[column]
    if any(isinstance(each, dict) for each in completions) and all(
        each is None or (isinstance(each, dict) and "response" in each) for each in completions
    ):
        source = "ultrafeedback"
        completions = [each or {"response": None} for each in completions]
        rewards = [_score(completion, where) for completion in completions] if rewards is None else rewards
        completions = [completion["response"] for completion in completions]
    completions = ["" if completion is None else completion for completion in completions]
    for position, completion in enumerate(completions):
        if not isinstance(completion, str | list):
            raise DataError(f"{where}, column `{column}`: entry {position} is {type(completion).__name__}, not a text.")
        problem = form_problem(completion) if isinstance(completion, list) else None
        if problem is None and not is_unicode(completion):
            problem = NOT_UNICODE
        if problem:
            raise DataError(f"{where}, column `{column}`: entry {position} {problem}")
    rewards = _for_each(rewards, reward_column, completions, where, "numbers") or [None] * len(completions)
    for position, reward in enumerate(rewards):
        if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
            raise DataError(f"{where}, column `{reward_column}`: entry {position} is {reward!r}, not a finite number.")
    if isinstance(prompt, list):
        prompt = without_none(prompt)
    elif as_messages:
        prompt = [{"role": "user", "content": prompt}]
    completions = [completion_for(prompt, text) if isinstance(text, str) else text for text in completions]
    finished = _for_each(row.get("finished"), "finished", completions, where) or [True] * len(completions)
    if not all(isinstance(ended, bool) for ended in finished):
        raise DataError(
            f"{where}, column `finished`: give true or false for each of the {len(completions)} completions."
        )
    candidates = _for_each(row.get("candidates"), "candidates", completions, where) or [{}] * len(completions)
    if not all(isinstance(about, dict) for about in candidates):
        raise DataError(
            f"{where}, column `candidates`: each entry describes a completion by `source`, `iteration`, ..."
        )
    columns = columns_of(row)
    is_ours = all("source" in about for about in candidates) and (columns is not None or not row.get("columns"))
    token_ids = row.get("completion_ids")
    if token_ids is not None and not isinstance(token_ids, list):
        raise DataError(f"{where}, column `completion_ids`: is {token_ids!r}; give a list, or drop the column.")
    if token_ids is None or len(token_ids) != len(completions):
        token_ids = [None] * len(completions)
    token_ids = [_token_ids(ids, f"{where}, column `completion_ids`: entry {i}") for i, ids in enumerate(token_ids)]
    judge = row.get("reward_id") if is_ours else None
    if judge is None and any(reward is not None for reward in rewards):
        # Of files of one form the same one, as far as is known; lists of earlier versions tell what form they came from
        origin = candidates[0].get("source") if is_ours and candidates else None
        judge = origin if origin in _FORMS else source
    defaults = {"iteration": 0, "source": source}
    made = [
        Candidate.from_row(
            completion,
            reward,
            defaults | {"finished": ended, "token_ids": ids} | about,
            scored_by=judge,
        )
        for completion, reward, ended, ids, about in zip(
            completions, rewards, finished, token_ids, candidates, strict=True
        )
    ]
    known = {name, column, reward_column, "finished", "completion_ids", "candidates", *(_OURS if is_ours else ())}
    others = {k: v for k, v in row.items() if k not in known}
    return CandidatePool(Prompt.of(prompt, others | (columns or {} if is_ours else {})), made)


def _for_each(values: Any, column: str, completions: list[Any], where: str, what: str = "entries") -> list[Any] | None:
    """
    Values of a column, one for each completion; `None` without the column.

    Raises:
        DataError: If they are no list, or another number.
    """
    if values is not None and not isinstance(values, list):
        raise DataError(
            f"{where}, column `{column}`: is {values!r}; give a list with one entry for each of the "
            f"{len(completions)} completions."
        )
    if values is not None and len(values) != len(completions):
        raise DataError(f"{where}, column `{column}`: has {len(values)} {what} for {len(completions)} completions.")
    return values


def _token_ids(ids: Any, where: str) -> list[int] | None:
    """
    Tokens from a list of ids or a text of ids; `None` where there are none.

    Raises:
        DataError: If they are anything else.
    """
    found = ids.split() if isinstance(ids, str) else ids
    if not found and (found is None or isinstance(found, list)):
        return None
    if isinstance(ids, str) and all(each.isdecimal() for each in found):
        return list(map(int, found))
    if isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids):
        return ids
    raise DataError(f"{where} is {ids!r}; give a list of token ids, or null if unknown.")


def _score(completion: Row, where: str) -> float | None:
    """UltraFeedback's overall score, a number or the text of one; `None` without one."""
    value = completion.get("overall_score")
    if isinstance(value, str):
        if value.strip().lower() in _NO_SCORE:
            return None
        try:
            value = float(value)
        except ValueError:
            raise DataError(f"{where}: `overall_score` is {value!r}, not a number.") from None
    return value
