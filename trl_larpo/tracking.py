"""Logs what happens across the iterations of a run to W&B, trackio, TensorBoard, or wherever `report_to` says."""

import os
from typing import Any

from accelerate import Accelerator

from .candidates import completion_text, prompt_text
from .errors import ConfigError
from .health import Check
from .run_folder import RunFolder
from .storage import read_json, read_jsonl

_MAX_TABLE_ROWS = 1000  # of candidates, for each iteration


class Tracking:
    """
    One tracker run for the loop, beside those that the trainer makes for each iteration; all are of one group.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: RunFolder):
        self.folder, self.accelerator = folder, None
        names = [name for name in _as_list(folder.training.report_to) if name != "none"]
        if not names:
            return
        group = folder.training.run_name or folder.path.name
        os.environ.setdefault("WANDB_RUN_GROUP", group)
        self.accelerator = Accelerator(
            log_with=names, project_dir=str(folder.path / "tracking"), cpu=folder.training.use_cpu
        )
        project = getattr(folder.training, "project", None) or os.environ.get("WANDB_PROJECT", "larpo")
        settings = {name: str(value) for name, value in folder.configuration().items()}
        init = {"wandb": {"group": os.environ["WANDB_RUN_GROUP"], "name": f"{group}-loop", "reinit": "create_new"}}
        try:
            self.accelerator.init_trackers(project, settings, {k: v for k, v in init.items() if k in names})
        except ImportError as error:
            raise ConfigError(f"`report_to` is {names}: {error}") from None

    def log(self, iteration: int, checks: list[Check]) -> None:
        """Numbers and the candidate table of one iteration."""
        if self.accelerator is None:
            return
        self.accelerator.log(self.numbers(iteration, checks), step=iteration)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_table"):
                columns, rows = self.candidate_table(iteration)
                tracker.log_table("candidates", columns=columns, data=rows, step=iteration)

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
        rows = [
            [
                iteration,
                prompt_text(row["prompt"]),
                completion_text(text),
                reward,
                x["rank"],
                x["source"],
                x["iteration"],
            ]
            for row in read_jsonl(self.folder.iteration(iteration) / "lists.jsonl")
            for text, reward, x in zip(row["completions"], row["rewards"], row["candidates"], strict=True)
        ]
        return columns, rows[:_MAX_TABLE_ROWS]

    def close(self) -> None:
        if self.accelerator is not None:
            self.accelerator.end_training()


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
