"""Reads files of candidates: this package's own, RLHFlow's, SimPO's and UltraFeedback's."""

import math
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..prompts import prompt_id, prompt_problem
from ..storage import read_jsonl
from ..training.datasets import load_splits

Row = dict[str, Any]


_PROMPT_COLUMNS = ("prompt", "instruction", "question")


_COMPLETION_COLUMNS = {"completions": "file", "responses": "rlhflow", "all_generated_responses": "simpo"}
"""Column of the completions: where it comes from."""


_REWARD_COLUMNS = ("rewards", "all_rm_scores")


_KEPT = ("reward_id", "reward_parts")

_REPLACED = ("prompt_id", "columns", "left_out", "problem")
"""Columns of this package's files that are read from, or made again. In files of others these are the user's."""


def read_candidate_rows(path: str, as_messages: bool = False) -> list[Row]:
    """
    Rows of completions, whichever of the known shapes they come in.

    Args:
        path: A JSONL, JSON or Parquet file, a folder, or a hub id. Known shapes of a row: `prompt` and `completions`
            (with `rewards`, `finished`, `candidates`, if they are there); RLHFlow's `prompt`, `responses`, `rewards`;
            UltraFeedback's `instruction` and `completions`, each with `response` and `overall_score`; SimPO's `prompt`,
            `all_generated_responses`, `all_rm_scores`. Without `finished` all completions count as finished.
        as_messages: Makes text prompts and their completions the messages of a conversation.

    Returns:
        Rows with `prompt_id`, `prompt`, `completions` (texts or messages), `rewards` (one for each, `None` where
        unknown), `candidates` (source, iteration, ... of each), `columns` (other columns by name) and, if they are
        there, `reward_id` and `reward_parts`.

    Raises:
        DataError: Names the file, the row and what is wrong with it.
    """
    if Path(path).suffix == ".jsonl" and "://" not in path:
        raw = read_jsonl(path)  # also rows that do not all have the same columns
    else:
        raw = [dict(row) for row in next(iter(load_splits(path).values()))]
    if not raw:
        raise DataError(f"{path!r} is empty.")
    rows: dict[tuple, Row] = {}
    for number, row in enumerate(raw):
        new = _canonical(row, f"{path!r} row {number}", as_messages)
        first = rows.setdefault((new["prompt_id"], new.get("reward_id")), new)
        if first is not new:  # the same prompt once more
            for name in ("completions", "rewards", "candidates"):
                first[name] = first[name] + new[name]
            first.pop("reward_parts", None)
    return list(rows.values())


def _canonical(row: Row, where: str, as_messages: bool) -> Row:
    name = next((name for name in _PROMPT_COLUMNS if name in row), None)
    if name is None:
        raise DataError(f"{where} has no column `prompt`. Its columns: {', '.join(row)}.")
    prompt = row[name]
    if problem := prompt_problem(prompt):
        raise DataError(f"{where}, column `{name}`: {problem}")
    column = next((column for column in _COMPLETION_COLUMNS if column in row), None)
    completions = row.get(column)
    if not isinstance(completions, list) or not completions:
        raise DataError(f"{where} has no list of completions; give a column `completions` or `responses`.")
    reward_column = next((column for column in _REWARD_COLUMNS if column in row), "rewards")
    rewards, source = row.get(reward_column), _COMPLETION_COLUMNS[column]
    if all(isinstance(completion, dict) and "response" in completion for completion in completions):
        source = "ultrafeedback"
        rewards = [_score(completion, where) for completion in completions] if rewards is None else rewards
        completions = [completion["response"] for completion in completions]
    for position, completion in enumerate(completions):
        if not isinstance(completion, str | list):
            raise DataError(f"{where}, column `{column}`: entry {position} is {type(completion).__name__}, not a text.")
    if rewards is None:
        rewards = [None] * len(completions)
    if len(rewards) != len(completions):
        raise DataError(
            f"{where}, column `{reward_column}`: has {len(rewards)} numbers for {len(completions)} completions."
        )
    for position, reward in enumerate(rewards):
        if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
            raise DataError(f"{where}, column `{reward_column}`: entry {position} is {reward!r}, not a finite number.")
    if as_messages and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        completions = [
            [{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in completions
        ]
    finished = [True] * len(completions) if row.get("finished") is None else list(row["finished"])
    if [type(x) for x in finished] != [bool] * len(completions):
        raise DataError(
            f"{where}, column `finished`: give true or false for each of the {len(completions)} completions."
        )
    candidates = row.get("candidates")
    if candidates is None:
        candidates = [{}] * len(completions)
    if len(candidates) != len(completions):
        raise DataError(
            f"{where}, column `candidates`: has {len(candidates)} entries for {len(completions)} completions."
        )
    if not all(isinstance(about, dict) for about in candidates):
        raise DataError(
            f"{where}, column `candidates`: each entry describes a completion by `source`, `iteration`, ..."
        )
    is_ours = all("source" in about for about in candidates) and isinstance(row.get("columns") or {}, dict)
    defaults = {"iteration": 0, "source": source, "temperature": None, "num_tokens": None}
    candidates = [defaults | {"finished": ended} | about for ended, about in zip(finished, candidates, strict=True)]
    if (of_completions := row.get("completion_ids")) is not None and len(of_completions) == len(completions):
        of_completions = [list(map(int, ids.split())) if isinstance(ids, str) else ids for ids in of_completions]
        candidates = [
            ({"token_ids": ids} if ids else {}) | about for ids, about in zip(of_completions, candidates, strict=True)
        ]
    known = {name, column, reward_column, "finished", "completion_ids", "candidates"}
    columns, kept = {}, {}
    if is_ours:
        known |= {*_KEPT, *_REPLACED}
        columns, kept = row.get("columns") or {}, {k: row[k] for k in _KEPT if k in row}
    return kept | {
        "columns": columns | {k: v for k, v in row.items() if k not in known},
        "prompt_id": prompt_id(prompt),
        "prompt": prompt,
        "completions": completions,
        "rewards": rewards,
        "candidates": candidates,
    }


def _score(completion: Row, where: str) -> float | None:
    """UltraFeedback's overall score, a number or the text of one."""
    value = completion.get("overall_score")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise DataError(f"{where}: `overall_score` is {value!r}, not a number.") from None
    return value
