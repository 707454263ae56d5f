"""
`larpo run --try N`: the whole chain on a few of the user's own prompts, and what it tells of the run to come.

The trial has a folder of its own beside that of the run. Model, rewards, servers, processes and all options stay; it
is one iteration of N prompts and a few optimizer steps. What its stages took is extrapolated to the whole run, without
the time for loading models and starting servers, which every iteration has once.
"""

import copy
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from transformers import AutoConfig
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig

from ..errors import ConfigError, LarPOError
from ..locks import is_locked
from ..prompts import Prompt, Row
from ..set_aside import allowed_failures, set_aside_in
from ..storage import read_json, read_jsonl, write_json, write_jsonl
from ..training.config import LarPOConfig
from .checks import check_run
from .disk import bytes_of_models, existing_folder, size_text
from .evaluation_stages import MAX_KL_PROMPTS
from .folder import TRIAL, RunFolder
from .loading import tokenizer_of
from .loop import run
from .options import RunConfig
from .plan import list_size, num_steps, plan, times_of_prompts
from .stages import STAGES
from .status import duration
from .timings import TIMINGS

_NUM_STEPS = 4  # of the optimizer


def without_try(argv: list[str]) -> tuple[list[str], int | None]:
    """
    The arguments without `--try N`, and its number.

    Raises:
        ConfigError: If it has no number.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--try=") else [word])]
    if "--try" not in words:
        return argv, None
    place = words.index("--try")
    if not (number := "".join(words[place + 1 : place + 2])).isdigit():
        raise ConfigError("`--try` needs a number of prompts, e.g. `--try 20`.")
    return [*words[:place], *words[place + 2 :]], int(number)


def try_run(options: RunConfig, training: LarPOConfig, model: ModelConfig, num_prompts: int) -> Path:
    """
    Runs one short iteration on some of the prompts of a run, and prints what it tells of the whole run.

    Args:
        options: What the loop does.
        training: How the trainer trains. The folder of the trial is `output_dir` with `-try` appended; what an earlier
            trial left there is deleted.
        model: The initial model, and LoRA.
        num_prompts: How many prompts to train on, and at most how many to evaluate on.

    Returns:
        Path of the trial's report page.

    Raises:
        LarPOError: If the input is invalid, or the run would not work.
    """
    if num_prompts < 2:
        raise ConfigError(f"`--try` is {num_prompts}; try at least 2 prompts.")
    if options.dry_run:
        raise ConfigError("`--dry_run` runs nothing, and `--try` does: leave one of them out.")
    whole = RunFolder(options, training, model)
    check_run(whole)
    tokenizer = tokenizer_of(model)
    whole.prepare_prompts(tokenizer, save=False)
    trial = trial_of(whole, num_prompts)
    _make_folder(trial)
    page = run(trial.options, trial.training, trial.model)
    found = forecast(whole, trial)
    write_json(trial.path / TRIAL, found)
    print(f"\n{plan(whole, tokenizer)}\n\n{as_text(found)}\nSamples and lists of the trial: {page}")
    return page


def trial_of(whole: RunFolder, num_prompts: int) -> RunFolder:
    """The folder of the trial of a run, with its prompts; nothing is written."""
    prompts, held_out = whole.prompts_of(1)[:num_prompts], whole.held_out[: max(2, num_prompts)]
    options = replace(
        whole.options,
        num_iterations=1,
        prompt_schedule="same",
        prompts_per_iteration=None,
        temperature=whole.options.temperature[:1],
        num_held_out=len(held_out),
        stop_on=["none"],
        mirror=None,
        notify_command=None,
    )
    training = copy.copy(whole.training)  # made again, it would change what it has worked out
    training.output_dir = f"{str(training.output_dir).rstrip('/')}-try"
    training.max_steps = min(_NUM_STEPS, num_steps(whole, len(times_of_prompts(whole, 1))))
    training.report_to, training.save_strategy = [], SaveStrategy.NO
    trial = RunFolder(options, training, whole.model)
    trial.prompts, trial.held_out = prompts, held_out
    counts = dict.fromkeys(("duplicates", "too_long", "also_held_out", "unused"), 0)
    trial.prompt_counts = {"read": len(prompts) + len(held_out)} | counts
    return trial


def _make_folder(trial: RunFolder) -> None:
    """A new folder with the prompts of the trial, in place of that of an earlier trial."""
    path = trial.path
    if path.exists():
        if is_locked(path):
            raise LarPOError(f"Another process is running in {path}. Wait for it, or stop it.")
        if any(path.iterdir()) and not (path / TRIAL).exists():
            raise ConfigError(
                f"`--try` uses the folder {str(path)!r}, which holds something else than a trial. Move it away, or "
                "take another `output_dir`."
            )
        shutil.rmtree(path)
    path.mkdir(parents=True)
    write_json(path / TRIAL, {})
    trial.save_configuration()
    write_jsonl(path / "prompts.jsonl", map(Prompt.to_row, trial.prompts))
    write_jsonl(path / "held_out_prompts.jsonl", map(Prompt.to_row, trial.held_out))
    write_json(path / "prompts.json", trial.prompt_counts)


def forecast(whole: RunFolder, trial: RunFolder) -> Row:
    """
    What a trial tells of the whole run.

    Returns:
        `seconds` by stage, each `[in the trial, in the whole run]`; `disk`: bytes of `files` and `models` (`None` where
        not known), and those `free`; `prompts` and `lists` of the trial; `truncated` and `tied`, shares of its samples
        and prompts; `set_aside`, its prompts that failed, with the reason; `concerns`, what speaks against starting.
    """
    folder = trial.iteration(1)
    selection = read_json(folder / "selection.json")
    checks = {check["name"]: check for check in read_json(folder / "health.json")}
    failed = [set_aside_in(trial.iteration(number)) for number in (0, 1)]
    set_aside = {row["prompt_id"]: row for of_iteration in failed for rows in of_iteration.values() for row in rows}
    found: Row = {
        "prompts": len(trial.prompts),
        "lists": selection["lists"],
        "seconds": _seconds(whole, trial, selection["lists"] / len(trial.prompts)),
        "disk": _disk(whole, trial),
        "truncated": checks["truncated"]["value"],
        "tied": checks["tied_lists"]["value"],
        "set_aside": list(set_aside.values()),
    }
    concerns = [
        f"{name} is {check['value']:.3g}, should be {check['limit']}. {check['meaning']}"
        for name, check in checks.items()
        if not check["ok"]
    ]
    limit = whole.options.max_failed_share
    for name in sorted({name for of_iteration in failed for name in of_iteration}):
        tried, of_all = (len(x.held_out if name.startswith("held_out") else x.prompts_of(1)) for x in (trial, whole))
        share = max(len(of_iteration.get(name, [])) for of_iteration in failed) / tried
        if share * of_all > allowed_failures(of_all, limit):
            concerns.append(
                f"{share:.0%} of the prompts failed ({name.replace('_', ' ')}); with more than {limit:.0%} "
                "(`max_failed_share`) the run ends with an error."
            )
    needed = found["disk"]["files"] + (found["disk"]["models"] or 0)
    if needed > found["disk"]["free"]:
        concerns.append(f"The disk has too little space: {size_text(needed - found['disk']['free'])} more are needed.")
    return found | {"concerns": concerns}


def _seconds(whole: RunFolder, trial: RunFolder, list_share: float) -> dict[str, list[float]]:
    """Seconds of each stage in the trial and in the whole run; `list_share` is the share of prompts that make lists."""
    times = {(row["iteration"], row["stage"]): row for row in read_jsonl(trial.path / TIMINGS)}
    steps = [entry["step"] for entry in read_jsonl(trial.iteration(1) / "training_log.jsonl") if "step" in entry]
    seconds: dict[str, list[float]] = {}
    for number, stage in _stages(whole):
        row = times[(min(number, 1), stage)]
        work = row["work"] if "work" in row else row["seconds"]
        done = _amount(trial, min(number, 1), stage, list_share)
        if stage == "train":
            done *= max(steps, default=1) / trial.training.max_steps  # fewer where it was stopped
        of_all = seconds.setdefault(stage, [0.0, 0.0])
        of_all[0] += row["seconds"] if number < 2 else 0.0
        of_all[1] += row["seconds"] - work + work * _amount(whole, number, stage, list_share) / done
    return seconds


def _stages(folder: RunFolder) -> Iterator[tuple[int, str]]:
    for number in range(folder.options.num_iterations + 1):
        yield from ((number, stage.name) for stage in STAGES.values() if number or stage.at_start)


def _amount(folder: RunFolder, number: int, stage: str, list_share: float) -> float:
    """What there is to do in a stage, in a unit of its own."""
    if stage in ("held_out_samples", "held_out"):
        return len(folder.held_out)
    if stage == "evaluate":
        return min(MAX_KL_PROMPTS, len(folder.held_out)) if number else 1
    if stage in ("generate", "reward"):
        return len(folder.prompts_of(number))
    times = times_of_prompts(folder, number).values()
    if stage == "select":
        return sum(times)
    num_lists = max(1, round(len(times) * list_share))
    count = num_steps(folder, num_lists) if stage == "train" else num_lists
    # With memory a prompt has the candidates of several iterations
    options = folder.options
    pool = options.num_samples + options.num_negatives * len(options.negatives)
    return count * statistics.fmean(list_size(options, pool * each) for each in times)


def _disk(whole: RunFolder, trial: RunFolder) -> dict[str, float | None]:
    """Bytes that the run will need; `files` with what is there twice for a while, as in [`bytes_of_candidates`]."""
    sizes = {path.name: path.stat().st_size for path in trial.iteration(1).glob("*.jsonl")}
    sizes.pop("training_log.jsonl")
    held_out = sum(size for name, size in sizes.items() if name.startswith("held_out"))
    samples = sum(size for name, size in sizes.items() if "samples" in name and not name.startswith("held_out"))
    joined = sum(sizes.values()) - held_out - samples  # with memory, candidates of several iterations
    numbers = range(1, whole.options.num_iterations + 1)
    counts = [len(whole.prompts_of(number)) for number in numbers]
    times = [times_of_prompts(whole, number).total() for number in numbers]
    twice = max(samples * max(counts), sizes.get("lists.jsonl", 0) * max(times))
    config = AutoConfig.from_pretrained(whole.model.model_name_or_path, revision=whole.model.model_revision)
    return {
        "files": (samples * sum(counts) + joined * sum(times) + twice) / len(trial.prompts)
        + held_out / len(trial.held_out) * len(whole.held_out) * (len(numbers) + 1),
        "models": bytes_of_models(whole, config),
        "free": shutil.disk_usage(existing_folder(whole.path)).free,
    }


def as_text(found: Row) -> str:
    """The forecast for a person."""
    disk, of_all = found["disk"], sum(expected for _, expected in found["seconds"].values())
    until = datetime.now() + timedelta(seconds=of_all)
    models = "an unknown size" if disk["models"] is None else size_text(disk["models"])
    lines = [
        f"What the trial of {found['prompts']} prompts tells of the whole run:",
        f"  {'time':16} {'trial':>12} {'whole run':>14}",
        *(
            f"  {stage:16} {duration(tried):>12} {duration(expected):>14}"
            for stage, (tried, expected) in found["seconds"].items()
        ),
        f"  {'in all':16} {duration(sum(tried for tried, _ in found['seconds'].values())):>12} "
        f"{duration(of_all):>14}, until {until:%a %H:%M} if it started now",
        f"  disk       {size_text(disk['files'])} of samples and lists, {models} of models and checkpoints; "
        f"{size_text(disk['free'])} free",
        f"  lists      {found['lists']} of {found['prompts']} prompts; all samples tie for {found['tied']:.0%} of them",
        f"  truncated  {found['truncated']:.0%} of the samples",
        f"  set aside  {len(found['set_aside'])} prompts",
    ]
    lines += [f"    {row['prompt'][:60]!r}: {row['reason'][:200]}" for row in found["set_aside"][:3]]
    if not found["concerns"]:
        return "\n".join([*lines, "Nothing here speaks against starting the run."])
    return "\n".join([*lines, "Before you start the run:", *(f"  - {concern}" for concern in found["concerns"])])
