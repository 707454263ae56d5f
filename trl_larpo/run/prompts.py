"""Loads prompts, and chooses those of each iteration and those to evaluate on."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from ..generation.in_process import encode_prompt
from ..prompts import (
    Content,
    Prompt,
    Row,
    changed_columns,
    checked_columns,
    columns_of,
    prompt_id,
    prompt_problem,
    without_none,
)
from ..storage import rows_as_written
from ..training.datasets import load_splits
from .negatives import OTHER_PROMPTS
from .options import PromptOptions, RunConfig

logger = logging.getLogger(__name__)


@dataclass
class ChosenPrompts:
    """
    The prompts of a run.

    Attributes:
        prompts: Those to train on, in the order of their use.
        held_out: Those to evaluate on.
        counts: What became of all that were read: `read`, `duplicates`, `too_long`, `also_held_out`, `unused`; where
            each iteration has prompts of its own, `slices`, how many each has.
    """

    prompts: list[Prompt]
    held_out: list[Prompt]
    counts: dict[str, Any]


def choose_prompts(
    options: RunConfig, tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int | None
) -> ChosenPrompts:
    """
    Loads all prompts of a run and decides on their use. The order depends on the seed and their content alone.

    Args:
        options: Where they come from and how many are wanted.
        tokenizer: Of the policy.
        seed: Seed of the run.
        max_length: Longest prompt plus completion of the training, in tokens.

    Raises:
        ConfigError: If there are too few.
        DataError: If one cannot be used.
    """
    counts: dict[str, Any] = {"read": 0, "duplicates": 0, "too_long": 0, "also_held_out": 0, "unused": 0}
    limit = options.max_prompt_length
    if limit is None and max_length is not None:
        limit = max_length - 1  # room for one token of the completion

    def num_tokens(prompt: Prompt, path: str) -> int:
        try:
            return len(encode_prompt(tokenizer, prompt.content, options.template_kwargs))
        except DataError as error:
            raise DataError(f"{path!r}: {error}") from error

    def load(path: str, split: str, known: dict[str, Prompt], file_of: dict[type, str]) -> list[Prompt]:
        prompts = []
        config = options.prompts_config if path in options.prompt_sources else None
        for prompt in load_prompts(path, options, config, split):
            counts["read"] += 1
            file_of.setdefault(type(prompt.content), path)
            if len(file_of) > 1:
                raise DataError(
                    f"The prompts in {file_of[str]!r} are texts, and those in {file_of[list]!r} are conversations. Set "
                    "`prompts_as_messages: true`, which makes conversations of the texts."
                )
            if prompt.id in known:
                counts["duplicates"] += 1
                others.extend([prompt] if changed_columns(known[prompt.id], prompt) else [])
            elif limit is not None and num_tokens(prompt, path) > limit:
                counts["too_long"] += 1
            else:
                prompts.append(prompt)
            known.setdefault(prompt.id, prompt)
        return prompts

    known: dict[str, Prompt] = {}
    others: list[Prompt] = []
    file_of: dict[type, str] = {}  # form of prompts: a file that has it
    sources = [load(path, options.prompts_split, known, file_of) for path in options.prompt_sources]
    if options.prompt_schedule != "fresh":
        sources = [[prompt for prompts in sources for prompt in prompts]]
    for prompts in sources:
        prompts.sort(key=lambda prompt: hashlib.sha256(f"{seed}/{prompt.id}".encode()).digest())
    if options.held_out_prompts is None:
        shares = [options.num_held_out // len(sources)] * len(sources)
        shares[0] += options.num_held_out - sum(shares)
        held_out = [prompt for prompts, share in zip(sources, shares, strict=True) for prompt in prompts[:share]]
        sources = [prompts[share:] for prompts, share in zip(sources, shares, strict=True)]
    else:
        held_out = load(options.held_out_prompts, options.held_out_split, {}, {})[: options.num_held_out]
        ids = {prompt.id for prompt in held_out}
        counts["also_held_out"] = sum(prompt.id in ids for prompts in sources for prompt in prompts)
        sources = [[prompt for prompt in prompts if prompt.id not in ids] for prompts in sources]
    warn_of_other_columns(others)
    if len(held_out) < options.num_held_out:
        raise ConfigError(
            f"`num_held_out` is {options.num_held_out}, but there are only {len(held_out)} prompts to hold out."
            f"{_about_length(counts, limit)}"
        )
    slices = _slices(options, sources, len(held_out), seed, _about_length(counts, limit))
    used = {prompt.id for prompts in slices for prompt in prompts}
    counts["unused"] = sum(map(len, sources)) - len(used)
    if options.prompt_schedule != "same":
        counts["slices"] = list(map(len, slices))
    return ChosenPrompts([prompt for prompts in slices for prompt in prompts], held_out, counts)


def warn_of_other_columns(others: list[Prompt]) -> None:
    """Says that of rows with the same prompt the first counts, if there are others that differ from it."""
    if others:
        logger.warning(
            f"{len(others)} rows have the prompt of an earlier row with other columns, and are not used. The first: "
            f"{others[0].text[:60]!r}."
        )


def _about_length(counts: dict[str, Any], limit: int | None) -> str:
    """A sentence about prompts that are too long, if any are."""
    if not counts["too_long"]:
        return ""
    return (
        f" {counts['too_long']} of the {counts['read']} that were read are left out, as they have more than {limit} "
        "tokens: raise `max_prompt_length` or `max_length`."
    )


def _slices(
    options: RunConfig, sources: list[list[Prompt]], num_held_out: int, seed: int, hint: str
) -> list[list[Prompt]]:
    """Prompts of each iteration; where all have the same, one slice. If they are too few, the hint is said too."""
    size, fresh = options.prompts_per_iteration, options.prompt_schedule == "fresh"
    num_prompts = sum(map(len, sources))
    if options.prompt_schedule == "drawn":
        [prompts] = sources
        size = size or len(prompts) // options.num_iterations
        sources = [_drawn(prompts, seed, iteration) for iteration in range(1, options.num_iterations + 1)]
    if fresh and len(sources) == 1:
        [prompts] = sources
        size = size or len(prompts) // options.num_iterations
        sources = [prompts[i * size : (i + 1) * size] for i in range(options.num_iterations)]
    for number, prompts in enumerate(sources, start=1):
        if len(prompts) < (size or 1):
            raise ConfigError(
                f"There are {num_prompts} prompts beside the {num_held_out} held out, too few for "
                f"{f'the {size or 1} of iteration {number}' if fresh else size or 1}. Give more prompts, or lower "
                f"`prompts_per_iteration` or `num_held_out`.{hint}"
            )
    slices = [prompts[:size] for prompts in sources]
    if set(OTHER_PROMPTS) & set(options.negatives) and min(map(len, slices)) < 2:
        raise ConfigError("`negatives` from other prompts need at least 2 prompts in an iteration.")
    return slices


def _drawn(prompts: list[Prompt], seed: int, iteration: int) -> list[Prompt]:
    """All prompts in an order of the iteration's own, of which it takes the first (paper, Algorithm 1)."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}/{iteration}/{prompt.id}".encode()).digest())


def load_prompts(path: str, options: PromptOptions, config: str | None = None, split: str = "train") -> list[Prompt]:
    """
    The prompts of a file, with its other columns.

    Args:
        path: A JSONL, JSON, Parquet or CSV file, a folder, or a hub id.
        options: Which column the prompt is, and what is put around it.
        config: Configuration of a hub dataset.
        split: Its split.

    Returns:
        The prompts in the order of the file.

    Raises:
        ConfigError: If `prompt_template` or `system_prompt` is not for prompts of this form.
        DataError: Names the file, the row and what is wrong with it.
    """
    names, rows = _read(path, config, split)
    column = options.prompt_column
    if column not in names:
        raise DataError(
            f"{path!r} has no column `{column}`. Its columns: {', '.join(names)}. Name the one that holds the prompts "
            "in `prompt_column`."
        )
    no_tools = DataError(f"{path!r} has a column `tools`, with which completions cannot be sampled yet. Remove it.")
    if "tools" in names:
        raise no_tools
    prompts, answered = [], []
    for number, row in enumerate(rows):
        prompt = row.pop(column)
        if problem := prompt_problem(prompt):
            raise DataError(f"{path!r} row {number}, column `{column}`: {problem}")
        prompt = without_none(prompt) if isinstance(prompt, list) else prompt
        row.pop("prompt", None)  # of another form, where it is not the column asked for
        columns = columns_of(row)
        if columns is not None and row.get("prompt_id") == prompt_id(prompt):  # a file of ours
            row = columns
            if row.get("tools") is not None:
                raise no_tools
        if isinstance(prompt, list):
            if options.prompt_template is not None and not options.prompts_as_messages:
                raise ConfigError(
                    f"`prompt_template` is for texts, and {path!r} row {number} is a conversation. Leave it out, and "
                    "write its text into the messages, or into `system_prompt`. Where texts and conversations are "
                    "mixed, set `prompts_as_messages`: then it is for the texts alone."
                )
            answered += [number] if prompt[-1]["role"] == "assistant" else []
        else:
            if options.prompt_template is not None:
                prompt = options.prompt_template.replace("{prompt}", prompt)
            if options.prompts_as_messages:
                prompt = [{"role": "user", "content": prompt}]
        if options.system_prompt is not None:
            prompt = _with_system_prompt(prompt, options.system_prompt)
        prompts.append(Prompt.of(prompt, checked_columns(row, f"{path!r} row {number}")))
    if answered:
        logger.warning(
            f"{path!r}: {len(answered)} of {len(prompts)} prompts end with a message of the assistant (first: row "
            f"{answered[0]}). It counts as a complete answer, and completions are sampled as a further one. Remove the "
            "message if completions are to take its place; the beginning of an answer cannot be continued yet."
        )
    return prompts


def _read(path: str, config: str | None, split: str) -> tuple[list[str], Iterable[Row]]:
    """Names of the columns, and the rows, which all have them."""
    written = rows_as_written(Path(path).expanduser()) if "://" not in path and split == "train" else None
    if written is not None:
        names = list(dict.fromkeys(name for row in written for name in row))
        return names, ({name: row.get(name) for name in names} for row in written)
    splits = load_splits(path, config)
    if split not in splits:
        raise DataError(f"{path!r} has no split {split!r}, only: {', '.join(splits)}.")
    return splits[split].column_names, splits[split]


def load_random_prompts(options: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """
    The prompts of another set to which the negative `"random_prompt"` responds, without those longer than
    `max_prompt_length`.

    Raises:
        ConfigError: If all are longer.
        DataError: Names the file, the row and what is wrong with it.
    """
    path, limit = options.random_prompts, options.max_prompt_length
    assert path is not None
    column = options.random_prompts_column or options.prompt_column
    prompts = load_prompts(path, replace(options, prompt_column=column))
    if limit is None:
        return prompts
    kept = [each for each in prompts if len(encode_prompt(tokenizer, each.content, options.template_kwargs)) <= limit]
    if not kept:
        raise ConfigError(
            f"`random_prompts`: all {len(prompts)} prompts in {path!r} have more than {limit} tokens: raise "
            "`max_prompt_length`."
        )
    return kept


def _with_system_prompt(prompt: Content, text: str) -> Content:
    if isinstance(prompt, str):
        raise ConfigError(
            "`system_prompt` is for conversations, and the prompts are texts. Set `prompts_as_messages`, or write the "
            "text into `prompt_template`."
        )
    has_one = prompt[0]["role"] in ("system", "developer")
    return prompt if has_one else [{"role": "system", "content": text}, *prompt]
