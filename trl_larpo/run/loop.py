"""
`larpo run`: Algorithm 1 of the paper, from prompts to aligned models, in a folder from which a killed run resumes.

Each iteration samples completions from the current policy, rewards them, builds candidate lists, trains on them with
the policy that starts the iteration as reference, and evaluates on held-out prompts. The next iteration starts from
the result.
"""

import dataclasses
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.logging import get_logger
from trl import ModelConfig

from ..errors import ConfigError, DataError, LarPOError, ProcessError
from ..full_disk import explain_full_disk
from ..lifetime import end_family, exit_status
from ..locks import exclusive_lock
from ..report.numbers import with_error
from ..report.page import write_report
from ..report.statistics import sample_statistics
from ..set_aside import set_aside_files, set_aside_in
from ..storage import read_json, read_jsonl, write_json
from ..training.config import LarPOConfig
from . import candidate_stages, evaluation_stages, training_stages  # noqa: F401 - what they lack is an error now
from .checks import check_run
from .context import RunContext
from .disk import warn_of_little_space
from .folder import RunFolder
from .health import Check, check_iteration
from .hidden import environment_of_stages
from .loading import tokenizer_of
from .mirror import Mirror
from .notify import Notifier
from .options import RunConfig
from .plan import plan
from .repair import repair
from .stages import STAGES, Stage, is_done, run_stage
from .status import forget_warnings, keep_warnings, note_stage
from .timings import note_timing
from .tracking import Tracking

logger = get_logger(__name__)

_SECONDS_TO_APPEAR = 10  # that a network file system may take to show what another machine has made

_SECONDS_OF_RETRIES = 300.0  # for which a store out of reach is tried again, where the run has to wait for it

_FIRST_PAUSE = 5.0  # seconds between two of these tries; each further one is twice as long


def run(options: RunConfig, training: LarPOConfig, model: ModelConfig) -> Path:
    """
    Runs all iterations, or resumes where an earlier call stopped.

    Args:
        options: What the loop does.
        training: How the trainer trains; `output_dir` is the folder of the run.
        model: The initial model, and LoRA.

    Returns:
        Path of the report page.

    Raises:
        LarPOError: If the input is invalid; nothing computed is lost.
    """
    options.check()
    folder = RunFolder(options, training, model)
    notifier = Notifier(None if options.dry_run else options.notify_command, folder.path)
    with notifier.of_failure():
        return _run_in(folder, notifier)


def _run_in(folder: RunFolder, notifier: Notifier) -> Path:
    options, mirror = folder.options, None
    if options.mirror:
        mirror = Mirror(folder.path, options.mirror)
        if not options.dry_run:
            with exclusive_lock(folder.path), explain_full_disk(folder.path):
                _fetch(mirror)
    of_models = check_run(folder)
    tokenizer = tokenizer_of(folder.model)
    if options.dry_run:
        folder.prepare_prompts(tokenizer, save=False)
        warn_of_little_space(folder, of_models)
        print(plan(folder, tokenizer))
        return folder.path / "report.html"
    with exclusive_lock(folder.path), explain_full_disk(folder.path):
        folder.prepare_prompts(tokenizer)
        folder.save_configuration()
        repair(folder)
        warn_of_little_space(folder, of_models)
        print(plan(folder, tokenizer))
        context = RunContext(folder)
        try:
            with notifier.of_failure():  # before servers are closed: a command that is told to stop has seconds
                page = _run_all(context, mirror)
        finally:
            context.close()
        notifier.tell("finished", f"The report is {page}.")
        return page


def _run_all(context: RunContext, mirror: Mirror | None) -> Path:
    folder, options, started = context.folder, context.folder.options, time.monotonic()
    tracking = Tracking(folder)
    page, warnings = folder.path / "report.html", keep_warnings(folder.path)
    try:
        for iteration in range(options.num_iterations + 1):
            worked, last = False, iteration == options.num_iterations
            for stage in STAGES.values():
                if iteration or stage.at_start:
                    ran = _run_stage(context, stage, iteration)
                    worked |= ran
                    if stage.name == "train" and ran:
                        _warn_of_kept_weights(folder.iteration(iteration) / "monitor.json", iteration)
                    if stage.name == "held_out_samples" and options.server_command and not last:
                        # With the servers that are there, rather than with new ones of the same model
                        worked |= _run_stage(context, STAGES["generate"], iteration + 1)
                    elif stage.name == "held_out_samples" and last:
                        context.close()  # nothing is sampled any more
                    _push(mirror)
            checks = []
            if iteration:
                checks = _check_health(folder, iteration, worked)
                _announce(folder, iteration, checks, is_new=worked)
                _track(tracking, iteration, checks)
            bad = [c for c in checks if not c.ok]
            stops = [c for c in bad if c.name in options.stop_on or "any" in options.stop_on]
            stops = [] if "none" in options.stop_on else stops
            ends = bool(stops) or last
            if worked or ends:
                _write_page(folder, with_plots=ends)
                _push(mirror)
            stopped = ""
            if stops:
                stopped = (
                    f"Stopped after iteration {iteration}, as `stop_on` asks: {stops[0].name}. {stops[0].meaning} See "
                    f"{page}. Best model so far: {_best_model(folder, iteration)}. To continue anyway, run the same "
                    "command with `--stop_on none`."
                )
            if ends:
                _catch_up(mirror, folder, stopped)
            if stops:
                raise LarPOError(stopped)
    finally:
        forget_warnings(warnings)
    minutes = (time.monotonic() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes. Model: {folder.model_path(options.num_iterations)}\nReport: {page}")
    for line in _what_was_set_aside(folder):
        print(line)
    return page


def _warn_of_kept_weights(monitor: Path, iteration: int) -> None:
    """Says why a training did not end with its last weights, also where other processes have trained."""
    explanation = read_json(monitor).get("explanation") if monitor.exists() else None
    if explanation is not None:
        logger.warning(f"Iteration {iteration}: {explanation}")


def _what_was_set_aside(folder: RunFolder) -> list[str]:
    """A line for each stage that left out prompts."""
    lines = []
    for iteration in range(folder.options.num_iterations + 1):
        for name, rows in set_aside_in(folder.iteration(iteration)).items():
            first = rows[0]
            lines.append(
                f"Set aside in iteration {iteration} ({name}): {len(rows)} prompts, e.g. {first['prompt'][:60]!r}: "
                f"{first['reason'][:200]} All: {set_aside_files(folder.iteration(iteration) / name)}"
            )
    return lines


def _best_model(folder: RunFolder, iteration: int) -> str:
    """Path of the model with the highest held-out reward, among those of iterations 0 to `iteration` that are there."""

    def reward(number: int) -> float:
        mean = read_json(folder.iteration(number) / "evaluation.json")["reward"]["mean"]
        return -math.inf if mean is None else mean

    there = [number for number in range(iteration + 1) if number == 0 or Path(folder.model_path(number)).exists()]
    return folder.model_path(max(there, key=reward))


def _write_page(folder: RunFolder, with_plots: bool) -> None:
    """The page of the run so far. Whatever goes wrong with it, the run goes on."""
    try:
        write_report(folder.path, with_plots)
    except Exception as error:
        logger.warning(
            f"The report could not be written ({type(error).__name__}: {error}). The run is not affected; "
            f"`larpo report {folder.path}` tries again."
        )


def _run_stage(context: RunContext, stage: Stage, iteration: int) -> bool:
    """Runs a stage, unless it is done. Returns whether it ran."""
    folder, options = context.folder, context.options
    if is_done(folder.path, stage, iteration, options.num_iterations):
        return False
    resumed_at, started = note_stage(folder.path, iteration, stage), time.monotonic()
    num_processes = stage.num_processes(options)
    in_processes = num_processes > 1 or (stage.sharded and (options.train_launcher or options.accelerate_config))
    try:
        if in_processes and not (iteration == 0 and stage.name == "evaluate"):  # which runs no model
            context.leave_devices_to(None)
            _launch_stage(folder, stage, iteration, num_processes)
        else:
            run_stage(context, stage, iteration)
    finally:  # also when it is stopped: the call that resumes it does the rest alone
        note_timing(folder.path, iteration, stage.name, time.monotonic() - started, resumed_at)
    return True


def _launch_stage(folder: RunFolder, stage: Stage, iteration: int, num_processes: int) -> None:
    """Runs a stage in several processes."""
    options = folder.options
    words = ["stage", "--folder", str(folder.path), "--stage", stage.name, "--iteration", str(iteration)]
    log, message = (folder.path / "logs" / f"iteration_{iteration}_{stage.name}.{kind}" for kind in ("log", "message"))
    if stage.sharded and options.train_launcher:
        command = shlex.split(options.train_launcher.replace("{stage}", shlex.join(["-m", "trl_larpo", *words])))
    else:
        command = [sys.executable, "-m", "trl_larpo", "launch", "--num_processes", str(num_processes)]
        command += ["--log", str(log), "--message", str(message)]
        if stage.sharded and options.accelerate_config:
            precision = "bf16" if folder.training.bf16 else "fp16" if folder.training.fp16 else "no"
            command += ["--accelerate_config", options.accelerate_config, "--mixed_precision", precision]
        command += words
    log.parent.mkdir(parents=True, exist_ok=True)
    message.unlink(missing_ok=True)
    # Ctrl-C reaches this process alone, which ends that one. Reading from the terminal would stop it for good
    environment = os.environ | environment_of_stages(folder)
    process = subprocess.Popen(command, process_group=0, stdin=subprocess.DEVNULL, env=environment)
    try:
        process.wait()
    except BaseException:
        end_family(process.pid)
        raise
    if process.returncode != 0:
        said = message.read_text(encoding="utf-8") if message.exists() else "its message is above."
        raise ProcessError(
            f"The stage {stage.name!r} of iteration {iteration} failed. {said} What was saved so far is kept; run the "
            "same command again to resume.",
            exit_status(process.returncode),
        )
    if not _appears(output := stage.path(folder, iteration)):
        option = "`train_launcher`" if stage.sharded and options.train_launcher else "The launcher"
        raise LarPOError(
            f"The stage {stage.name!r} of iteration {iteration}: {option} ended without an error and without making "
            f"{output}. It must wait until the work has ended (`srun`, or `sbatch --wait`), and its processes must see "
            "the same folder as this one."
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while path.name not in _names_in(path.parent):  # a network file system may answer `exists` from its cache
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _check_health(folder: RunFolder, iteration: int, has_changed: bool) -> list[Check]:
    path = folder.iteration(iteration)
    if not has_changed and (path / "health.json").exists():
        return [Check(**check) for check in read_json(path / "health.json")]
    checks = check_iteration(
        samples=sample_statistics(path),
        first_samples=sample_statistics(folder.iteration(1)),
        selection=read_json(path / "selection.json"),
        training_log=read_jsonl(path / "training_log.jsonl"),
        start=read_json(folder.iteration(0) / "evaluation.json"),
        evaluations=[read_json(folder.iteration(i) / "evaluation.json") for i in range(1, iteration + 1)],
        monitor=read_json(path / "monitor.json") if (path / "monitor.json").exists() else None,
        beta=folder.training.beta,
        reference_free=folder.training.reference_free,
    )
    write_json(path / "health.json", [dataclasses.asdict(check) for check in checks])
    return checks


def _announce(folder: RunFolder, iteration: int, checks: list[Check], is_new: bool) -> None:
    """A few lines for a person at the end of an iteration, or of one that earlier calls have done."""
    start, now = (read_json(folder.iteration(i) / "evaluation.json") for i in (0, iteration))
    print(
        f"\nIteration {iteration}: held-out reward {with_error(now['reward'])}, at the start "
        f"{with_error(start['reward'])}; gain {with_error(now['gain'], '+')}; {now['tokens']:.0f} tokens, at the "
        "start "
        f"{start['tokens']:.0f}"
    )
    for check in checks:
        if not check.ok:
            say = logger.warning if is_new else print  # what is kept of an earlier call was kept by it
            said = f"{check.value:.3g}, should be {check.limit}. {check.meaning}"
            say(f"WARNING {check.name} in iteration {iteration}: {said}")


def _fetch(mirror: Mirror) -> None:
    def fetch() -> int:
        count = mirror.fetch()
        mirror.check_is_not_newer()
        return count

    is_restart = (mirror.folder / "run.yaml").exists()  # of a run that nobody may be watching
    try:
        count = _retry(fetch) if is_restart else fetch()
    except ConfigError:
        raise
    except Exception as error:  # of any store's
        raise ConfigError(f"`mirror`: {mirror.url} cannot be read: {type(error).__name__}: {error}") from error
    if count:
        print(f"Fetched {count} files of the run from {mirror.url}")


def _retry(work: Callable[[], int]) -> int:
    """Does something with a store, again and again for some minutes where the store is out of reach."""
    pause, deadline = _FIRST_PAUSE, time.monotonic() + _SECONDS_OF_RETRIES
    while True:
        try:
            return work()
        except (ConfigError, DataError, PermissionError, FileNotFoundError):  # time changes nothing about these
            raise
        except Exception as error:  # of any store's
            if time.monotonic() + pause > deadline:
                raise
            logger.warning(f"`mirror`: {type(error).__name__}: {error} Trying again in {pause:.0f} s.")
            time.sleep(pause)
            pause *= 2


def _push(mirror: Mirror | None) -> None:
    """A store that is out of reach does not stop the run; the next stage tries again."""
    if mirror is None:
        return
    try:
        mirror.push()
        mirror.lags = False
    except Exception as error:  # of any store's
        say = print if mirror.lags else logger.warning  # once, of all the stages of a night
        say(f"`mirror`: {type(error).__name__}: {error} The run continues, and {mirror.url} lags behind.")
        mirror.lags = True


def _catch_up(mirror: Mirror | None, folder: RunFolder, stopped: str) -> None:
    """
    Copies at the end of a run what the last pushes could not: nothing comes later that would.

    Args:
        mirror: The run's mirror, if it has one.
        folder: The run.
        stopped: Why the run was stopped, if it was: an error here says that first.

    Raises:
        LarPOError: If the store stays out of reach.
    """
    if mirror is None or not mirror.lags:
        return
    try:
        _retry(mirror.push)
        mirror.lags = False
    except Exception as error:  # of any store's
        raise LarPOError(
            f"{stopped or 'The run has ended.'} But the newest files are not in the mirror {mirror.url} "
            f"({type(error).__name__}: {error}). They are in {folder.path}. Run the same command again to copy them."
        ) from error


def _track(tracking: Tracking, iteration: int, checks: list[Check]) -> None:
    """A tracker that is out of reach at three in the morning does not stop the run."""
    try:
        tracking.log(iteration, checks)
    except Exception as error:  # of any tracker's, the network's
        path = tracking.folder.path
        logger.warning(f"`report_to`: {type(error).__name__}: {error} The same numbers are in {path}.")
