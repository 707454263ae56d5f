"""Logs what happens across the iterations of a run to W&B, trackio, TensorBoard, or wherever `report_to` says."""

import contextlib
import importlib.util
import inspect
import itertools
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from ..candidates import CandidateList
from ..errors import ConfigError
from ..storage import iter_jsonl, read_json, write_json
from .folder import RunFolder
from .health import Check

_MAX_TABLE_ROWS = 1000  # of candidates, for each iteration

_WITHOUT_KEY = ("offline", "dryrun", "disabled")  # modes of W&B
_WITH_KEY = ("online", "run", "shared")

logger = get_logger(__name__)


class Tracking:
    """
    One tracker run for the loop, beside those that the trainer makes for each iteration; all are of one group.

    It is opened when an iteration has ended and closed again, so that the trainer's runs and a restart do not disturb
    it.

    Args:
        folder: Folder of the run, whose trackers [`check_trackers`] has checked.

    Attributes:
        path: Its file: the run's name at W&B, and which trackers have the numbers of which iterations.
    """

    def __init__(self, folder: RunFolder):
        self.folder, self.path = folder, folder.path / "tracking.json"
        known = {str(kind.value) for kind in LoggerType}  # the trainer knows some more
        self.names = [name for name in _as_list(folder.training.report_to) if name in known - {"all"}]
        self.group = folder.training.run_name or folder.path.resolve().name
        os.environ.setdefault("WANDB_RUN_GROUP", self.group)  # of the trainer's runs

    def log(self, iteration: int, checks: list[Check]) -> None:
        """Numbers and the candidate table of one iteration, for the trackers that do not have them yet."""
        record = {"run_id": uuid.uuid4().hex[:12], "logged": {}} | (read_json(self.path) if self.path.exists() else {})
        names = [name for name in self.names if name not in record["logged"].get(str(iteration), [])]
        if not names:
            return
        write_json(self.path, record)  # the run at W&B is the same for all iterations, also after a restart
        finish_trainer_runs()
        try:
            self._log(iteration, checks, names, record["run_id"])
        finally:
            AcceleratorState._reset_state()  # without mixed precision; the next stage has its own
        record["logged"].setdefault(str(iteration), []).extend(names)
        write_json(self.path, record)

    def _log(self, iteration: int, checks: list[Check], names: list[str], run_id: str) -> None:
        training, name = self.folder.training, f"{self.group}-loop"
        project = getattr(training, "project", None) or os.environ.get("WANDB_PROJECT", "larpo")
        settings = {name: str(value) for name, value in self.folder.configuration().items()}
        init = {
            "wandb": {
                "group": os.environ["WANDB_RUN_GROUP"],
                "name": name,
                "id": run_id,
                "resume": "allow",
            },
            "trackio": {"group": self.group, "name": name, "resume": "allow"},
        }
        accelerator = Accelerator(log_with=names, project_dir=str(self.folder.path / "tracking"), cpu=training.use_cpu)
        accelerator.init_trackers(project, settings, {k: v for k, v in init.items() if k in names})
        accelerator.log(self.numbers(iteration, checks), step=iteration)
        for tracker in accelerator.trackers:
            columns, rows = self.candidate_table(iteration)
            if tracker.name == "trackio":
                import trackio

                table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))
                tracker.log({"candidates": table}, step=iteration)
            elif hasattr(tracker, "log_table"):
                tracker.log_table("candidates", columns=columns, data=rows, step=iteration)
            tracker.finish()

    def numbers(self, iteration: int, checks: list[Check]) -> dict[str, float]:
        path = self.folder.iteration(iteration)
        evaluation, selection = read_json(path / "evaluation.json"), read_json(path / "selection.json")
        values = {
            "held_out/reward": evaluation["reward"]["mean"],
            "held_out/gain": evaluation["gain"]["mean"],
            "held_out/tokens": evaluation["tokens"],
            "held_out/finished": evaluation["finished"],
            **{f"held_out/best_of_{n}": value for n, value in enumerate(evaluation["best_of_n"], start=1)},
            **{f"selection/{name}": value for name, value in selection.items()},
            **{f"health/{check.name}": check.value for check in checks},
        }
        return {name: float(value) for name, value in values.items() if value is not None}

    def candidate_table(self, iteration: int) -> tuple[list[str], list[list[Any]]]:
        columns = ["iteration", "prompt", "completion", "reward", "rank", "source", "from_iteration"]
        lists = map(CandidateList.from_row, iter_jsonl(self.folder.iteration(iteration) / "lists.jsonl"))
        rows = (
            [iteration, made.prompt.text, c.text, c.reward, c.rank, c.source, c.iteration]
            for made in lists
            for c in made.selected
        )
        return columns, list(itertools.islice(rows, _MAX_TABLE_ROWS))


def check_trackers(report_to: str | list[str] | None) -> None:
    """
    Checks the trackers of a run, without a network.

    Args:
        report_to: Their names, as the trainer's options have them.

    Raises:
        ConfigError: If one is unknown, its package is missing, or W&B has no API key.
    """
    for name in _as_list(report_to):
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"`report_to` names {name!r}; the trackers are {', '.join(INTEGRATION_TO_CALLBACK)}, or 'all' or "
                "'none' alone."
            )
        if name in {str(kind.value) for kind in LoggerType} and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"`report_to` names {name!r}, and that package is not installed: pip install {name}. Or set "
                "`report_to: none`."
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()  # as the trainer makes it, hours later
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"`report_to` names {name!r}, which cannot be used: {error}") from None
        if name == "wandb":
            _check_wandb()


def _check_wandb() -> None:
    """
    Without a key W&B asks for one, or ends the run, where the first training begins.

    Raises:
        ConfigError: If there is no API key, or no valid one.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in (*_WITHOUT_KEY, *_WITH_KEY):
        raise ConfigError(f"WANDB_MODE is {mode!r}; it must be one of {', '.join((*_WITHOUT_KEY, *_WITH_KEY))}.")
    if wandb.run is not None or mode in _WITHOUT_KEY:
        return
    with contextlib.suppress(ImportError, AttributeError, ValueError):  # of versions that keep it elsewhere
        from wandb.sdk import wandb_setup

        if wandb_setup.singleton().settings.mode in _WITHOUT_KEY:  # by `wandb offline`
            return
    try:
        if "prompt" in inspect.signature(wandb.login).parameters:
            has_key = wandb.login(prompt=False, verify=False)
        else:
            has_key = bool(wandb.api.api_key)
    except (wandb.Error, ValueError) as error:  # ValueError: of a setting such as WANDB_MODE
        cause = " ".join(str(error).split())
        raise ConfigError(f"`report_to` names 'wandb', which cannot be used: {cause}") from None
    if not has_key:
        raise ConfigError(
            "`report_to` names 'wandb', and there is no API key: run `wandb login`, set the environment variable "
            "WANDB_API_KEY, or set WANDB_MODE=offline and upload the run later with `wandb sync`. To go without, set "
            "`report_to: none`; WANDB_DISABLED has no effect any more."
        )


def guard_trackers(callbacks: list[TrainerCallback], folder: Path) -> None:
    """
    Makes a warning of the first error of each of a trainer's trackers, which then logs no more in this training.

    Args:
        callbacks: All of the trainer's; those that are no trackers stay as they are.
        folder: Where the same numbers are, for the warning.
    """
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    for callback in callbacks:
        if type(callback) in names:
            guarded = _guard(names[type(callback)], folder)
            for event in dir(callback):
                if event.startswith("on_"):
                    setattr(callback, event, guarded(getattr(callback, event)))


def _guard(name: str, folder: Path) -> Callable[[Callable], Callable]:
    """What makes of a tracker's methods ones that do not fail; all of them are silent after the first error of one."""
    has_failed = False

    def guarded(method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_failed
            if has_failed:
                return None
            try:
                return method(*args, **kwargs)
            except Exception as error:  # of any tracker's, the network's
                has_failed = True
                logger.warning(
                    f"`report_to`: {name} gets no more numbers of this training ({type(error).__name__}: {error}). "
                    f"The same numbers are in {folder}."
                )
                return None

        return call

    return guarded


def finish_trainer_runs() -> None:
    """Ends the run that the trainer has left open at W&B; the next iteration has one of its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
