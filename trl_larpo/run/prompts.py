"""Loads prompts."""

from typing import Any

from ..errors import DataError
from ..prompts import prompt_id, prompt_problem
from ..training.datasets import load_splits
from .options import PromptOptions

Row = dict[str, Any]


def load_prompts(path: str, options: PromptOptions, config: str | None = None, split: str = "train") -> list[Row]:
    """
    Rows with a prompt and any other columns.

    Args:
        path: A JSONL, JSON, Parquet or CSV file, a folder, or a hub id.
        options: Which column the prompt is, and what is put around it.
        config: Configuration of a hub dataset.
        split: Its split.

    Returns:
        Rows with `prompt_id`, `prompt` and `columns`, the other columns by name, in the order of the file.

    Raises:
        DataError: Names the file, the row and what is wrong with it.
    """
    splits = load_splits(path, config)
    if split not in splits:
        raise DataError(f"{path!r} has no split {split!r}, only: {', '.join(splits)}.")
    dataset, column = splits[split], options.prompt_column
    if column not in dataset.column_names:
        raise DataError(
            f"{path!r} has no column `{column}`. Its columns: {', '.join(dataset.column_names)}. Name the one that "
            "holds the prompts in `prompt_column`."
        )
    if "tools" in dataset.column_names:
        raise DataError(f"{path!r} has a column `tools`, with which completions cannot be sampled yet. Remove it.")
    rows = []
    for number, row in enumerate(dataset):
        prompt = row.pop(column)
        if problem := prompt_problem(prompt):
            raise DataError(f"{path!r} row {number}, column `{column}`: {problem}")
        if isinstance(prompt, list):  # datasets fills in keys that only other messages have
            prompt = [{k: v for k, v in message.items() if v is not None} for message in prompt]
        else:
            if options.prompt_template is not None:
                prompt = options.prompt_template.replace("{prompt}", prompt)
            if options.prompts_as_messages:
                prompt = [{"role": "user", "content": prompt}]
        row.pop("prompt", None)  # of another form, where it is not the column asked for
        if isinstance(row.get("columns"), dict) and row.get("prompt_id") == prompt_id(prompt):  # a file of ours
            row = row["columns"]
        rows.append({"prompt_id": prompt_id(prompt), "prompt": prompt, "columns": _jsonable(row, path, number)})
    return rows


def _jsonable(row: Row, path: str, number: int) -> Row:
    for column, value in row.items():
        if not _is_plain(value):
            raise DataError(
                f"{path!r} row {number}, column `{column}`: holds {type(value).__name__}; prompts may have text, "
                "numbers "
                "and lists of them. Remove the column."
            )
    return row


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
