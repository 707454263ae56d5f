"""Logs what happens across the iterations of a run to W&B, trackio, TensorBoard, or wherever `report_to` says."""

import importlib.util
import itertools
import os
import sys
import uuid
from typing import Any

import pandas
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType

from ..candidates import CandidateList
from ..errors import ConfigError
from ..storage import iter_jsonl, read_json, write_json
from .folder import RunFolder
from .health import Check

_MAX_TABLE_ROWS = 1000  # of candidates, for each iteration


class Tracking:
    """
    One tracker run for the loop, beside those that the trainer makes for each iteration; all are of one group.

    It is opened when an iteration has ended and closed again, so that the trainer's runs and a restart do not disturb
    it.

    Args:
        folder: Folder of the run.

    Raises:
        ConfigError: If the package of a tracker is missing.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        known = {str(kind.value) for kind in LoggerType}  # the trainer knows some more
        self.names = [name for name in _as_list(folder.training.report_to) if name in known - {"all"}]
        for name in self.names:
            if importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"`report_to` names {name!r}, and that package is not installed: pip install {name}. Or set "
                    "`report_to: none`."
                )
        self.group = folder.training.run_name or folder.path.resolve().name
        os.environ.setdefault("WANDB_RUN_GROUP", self.group)  # of the trainer's runs

    def log(self, iteration: int, checks: list[Check]) -> None:
        """Numbers and the candidate table of one iteration."""
        if not self.names:
            return
        finish_trainer_runs()
        try:
            self._log(iteration, checks)
        finally:
            AcceleratorState._reset_state()  # without mixed precision; the next stage has its own

    def _log(self, iteration: int, checks: list[Check]) -> None:
        training, name = self.folder.training, f"{self.group}-loop"
        project = getattr(training, "project", None) or os.environ.get("WANDB_PROJECT", "larpo")
        settings = {name: str(value) for name, value in self.folder.configuration().items()}
        init = {
            "wandb": {
                "group": os.environ["WANDB_RUN_GROUP"],
                "name": name,
                "id": self._run_id(),
                "resume": "allow",
            },
            "trackio": {"group": self.group, "name": name, "resume": "allow"},
        }
        accelerator = Accelerator(
            log_with=self.names, project_dir=str(self.folder.path / "tracking"), cpu=training.use_cpu
        )
        accelerator.init_trackers(project, settings, {k: v for k, v in init.items() if k in self.names})
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

    def _run_id(self) -> str:
        """The same for all iterations, also after a restart."""
        path = self.folder.path / "tracking.json"
        if not path.exists():
            write_json(path, {"run_id": uuid.uuid4().hex[:12]})
        return read_json(path)["run_id"]

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


def finish_trainer_runs() -> None:
    """Ends the run that the trainer has left open at W&B; the next iteration has one of its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
