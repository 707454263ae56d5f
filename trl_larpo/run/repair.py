"""
Finds what is damaged or incomplete in the folder of a run before it resumes, so that it is done again.

Files of a run appear whole or not at all. But disks fail, power goes, and copies of a folder are interrupted. What the
rest of the run reads is checked: damaged lines are dropped and computed again, a damaged file that can be made again
is, and whatever was made of it. Adapters name their base where it is now.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from accelerate.logging import get_logger

from ..candidates import CandidatePool
from ..errors import DataError
from ..prompts import Row
from ..rewards.scorer import saved_scores_of_row
from ..set_aside import set_aside_in
from ..storage import read_json, reopen, whole_rows, write_json, write_jsonl
from ..training.checkpoints import checkpoints, damage_of, damage_of_checkpoint
from .folder import RunFolder
from .stages import STAGES, is_done
from .timings import TIMINGS, WORK

logger = get_logger(__name__)

_MAX_NAMED = 3

_OF_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tekken.json")  # of which each has one

_OF_SELECTION = ("selection.json", "lists.jsonl", "ref_logps.jsonl", "trainer")  # made of rewards, up to the training


def repair(folder: RunFolder) -> None:
    """
    Makes outputs that are damaged or lack prompts outputs that are done again. Called by one process, before any stage.

    Args:
        folder: With the prompts prepared.
    """
    _drop_damaged_lines(folder.path / TIMINGS)
    for name in (WORK, "progress.json", "tracking.json"):
        _drop_if_damaged(folder.path / name)
    last = folder.options.num_iterations
    for iteration in reversed(range(last + 1)):  # what one reads of an earlier one, once it is known what is done again
        path = folder.iteration(iteration)
        if not path.is_dir():
            continue
        for name in ("selection", "evaluation", "health", "monitor", "statistics"):
            _drop_if_damaged(path / f"{name}.json")
        _drop_damaged_lines(path / "training_log.jsonl")
        is_start = iteration == last or not (folder.iteration(iteration + 1) / "model").exists()
        if is_start:  # what the next training begins with
            _drop_damaged_model(path / "model", "adapter_config.json" if folder.keeps_adapter else "config.json")
        if (path / "model").exists():
            shutil.rmtree(path / "trainer", ignore_errors=True)  # left by a kill just after a training
        is_done, next_is_done = (_is_done(folder, number) for number in (iteration, iteration + 1))
        if iteration and not is_done and not (path / "model").exists():
            _repair_lists(folder, iteration)
        if not is_done or not next_is_done or iteration == 0:  # evaluations compare with the first one and the last
            _repair_held_out(folder, path)
        if iteration and folder.options.memory != "none" and (is_done or (path / "model").exists()):
            _reopen_if_incomplete(path / "rewarded.jsonl", (), saved_scores_of_row)
        if folder.keeps_adapter:
            _set_base(path, folder.model_path(0))


def _is_done(folder: RunFolder, iteration: int) -> bool:
    stages = [stage for stage in STAGES.values() if iteration or stage.at_start]
    return all(is_done(folder.path, stage, iteration, folder.options.num_iterations) for stage in stages)


def _repair_lists(folder: RunFolder, iteration: int) -> None:
    """From samples to log-probabilities under the reference. What is made of a file that changes is made again."""
    path = folder.iteration(iteration)
    asides = {name: {row["prompt_id"] for row in rows} for name, rows in set_aside_in(path).items()}
    sampled = {prompt.id: prompt.text for prompt in folder.prompts_of(iteration)}
    sampled = {name: text for name, text in sampled.items() if name not in asides.get("samples", ())}
    rewarded = {name: text for name, text in sampled.items() if name not in asides.get("rewarded", ())}
    changed = _reopen_if_incomplete(path / "unrelated_samples.jsonl", ())
    changed |= _reopen_if_incomplete(path / "samples.jsonl", sampled, _as_sampled)
    changed |= _reopen_if_incomplete(path / "rewarded.jsonl", rewarded, saved_scores_of_row)
    if changed or _lists_are_damaged(path):
        for name in _OF_SELECTION:
            _remove(path / name)
    if _logps_are_damaged(folder, path):
        for name in ("ref_logps.jsonl", "trainer"):
            _remove(path / name)
    for checkpoint in checkpoints(path / "trainer"):
        problem = damage_of_checkpoint(checkpoint)
        if problem is not None:
            logger.warning(f"{checkpoint} is not whole ({problem}): it is deleted.")
            shutil.rmtree(checkpoint)


def _repair_held_out(folder: RunFolder, path: Path) -> None:
    asides = set_aside_in(path)
    sampled, rewarded = (
        {row["prompt_id"] for name in names for row in asides.get(name, [])}
        for names in (["held_out_samples"], ["held_out_samples", "held_out"])
    )
    prompts = {prompt.id: prompt.text for prompt in folder.held_out}
    expected = {name: text for name, text in prompts.items() if name not in sampled}
    changed = _reopen_if_incomplete(path / "held_out_samples.jsonl", expected)
    expected = {name: text for name, text in prompts.items() if name not in rewarded}
    if changed | _reopen_if_incomplete(path / "held_out.jsonl", expected, saved_scores_of_row):
        _remove(path / "evaluation.json")


def _as_sampled(row: Row) -> Row:
    """Without the negatives that are added from other prompts, once all are sampled."""
    pool = CandidatePool.from_row(row)
    return pool.with_candidates([c for c in pool.candidates if c.of_prompt is None]).to_row()


def _reopen_if_incomplete(
    path: Path, expected: dict[str, str] | tuple, as_grown: Callable[[Row], Row] = lambda row: row
) -> bool:
    """
    Lets a file grow again that has damaged lines or lacks prompts.

    Args:
        path: The file. If there is none, nothing happens.
        expected: Prompts that it must have, by name.
        as_grown: What a row was while the file grew.

    Returns:
        Whether it did.
    """
    if not path.exists():
        return False
    damaged: list[str] = []
    found = {row.get("prompt_id") for row in whole_rows(path, damaged)}
    missing = [name for name in expected if name not in found]
    if not damaged and not missing:
        return False
    what = f"{damaged[0]} {len(damaged)} damaged lines are dropped. " if damaged else ""
    if missing and isinstance(expected, dict):
        named = [repr(expected[name][:60]) for name in missing[:_MAX_NAMED]] + ["..."] * (len(missing) > _MAX_NAMED)
        what += f"{path} lacks {len(missing)} of {len(expected)} prompts: {', '.join(named)}. "
    logger.warning(f"{what}What is missing is done again.")
    reopen(path, map(as_grown, whole_rows(path, [])))
    return True


def _lists_are_damaged(path: Path) -> bool:
    """Whether the lists are not all that was made of the rewards."""
    if not (path / "selection.json").exists() or not (path / "rewarded.jsonl").exists():
        return False
    if not (path / "lists.jsonl").exists():
        return True
    made, damaged = _ids(path / "lists.jsonl")
    return damaged or made != _ids(path / "rewarded.jsonl")[0]


def _logps_are_damaged(folder: RunFolder, path: Path) -> bool:
    logps = path / "ref_logps.jsonl"
    if not logps.exists() or folder.training.reference_free or not (path / "lists.jsonl").exists():
        return False
    found, damaged = _ids(logps)
    return damaged or not found >= _ids(path / "lists.jsonl", lambda row: row["problem"] is None)[0]


def _ids(path: Path, condition: Callable[[Row], bool] = lambda row: True) -> tuple[set[str], bool]:
    """Names of the prompts in the lines that are whole, and whether others are not."""
    damaged: list[str] = []
    rows: Iterable[Row] = whole_rows(path, damaged)
    found = {row["prompt_id"] for row in rows if condition(row)}
    if damaged:
        logger.warning(f"{damaged[0]} It is made again.")
    return found, bool(damaged)


def _drop_damaged_model(path: Path, config: str) -> None:
    if not path.is_dir():
        return
    problem = damage_of(path, config)
    if problem is None and not any((path / name).is_file() for name in _OF_TOKENIZERS):
        problem = "it has no tokenizer"
    if problem is None and not any(path.glob("*.safetensors")):
        problem = "it has no weights"
    if problem is not None:
        logger.warning(f"{path} is damaged ({problem}): it is deleted, and trained again.")
        shutil.rmtree(path)


def _set_base(path: Path, base: str) -> None:
    """Adapters of an iteration are loaded with the base that they name, which may have moved."""
    for config in (*path.glob("model/adapter_config.json"), *path.glob("trainer/*/adapter_config.json")):
        with contextlib.suppress(DataError):  # of an iteration whose adapter is not needed any more
            settings = read_json(config)
            if settings["base_model_name_or_path"] != base:
                write_json(config, settings | {"base_model_name_or_path": base})


def _drop_if_damaged(path: Path) -> None:
    if path.exists():
        try:
            read_json(path)
        except DataError as error:
            logger.warning(f"{error} It is made again.")
            path.unlink()


def _drop_damaged_lines(path: Path) -> None:
    """Of a file that cannot be made again."""
    damaged: list[str] = []
    rows = list(whole_rows(path, damaged)) if path.exists() else []
    if damaged:
        logger.warning(f"{damaged[0]} {len(damaged)} damaged lines are dropped.")
        write_jsonl(path, rows)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
