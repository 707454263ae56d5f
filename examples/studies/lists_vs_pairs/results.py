"""The results of the study, read from their JSON files."""

import re
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from arms import ALWAYS_CONFIRMED, ARMS, BASELINE, SCREENING_SEEDS
from effects import MIN_SEEDS, Effect, effect, seeds_needed
from experiment import Setup

from trl_larpo.errors import DataError
from trl_larpo.storage import read_json


class AnyExperiment(Protocol):
    """What one result is about."""

    task: str
    folder: str
    file_name: str
    settings: dict[str, Any]


Some = TypeVar("Some", bound=AnyExperiment)


class Results:
    """
    A folder of results.

    Args:
        folder: With `tuning/`, `reported/` and `claims/`.

    Attributes:
        failed: Results that could not be computed; they are not missing until the next start.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.failed: set[AnyExperiment] = set()

    def path(self, experiment: AnyExperiment) -> Path:
        folder = self.folder / experiment.folder
        folder.mkdir(parents=True, exist_ok=True)
        return folder / experiment.file_name

    def missing(self, experiments: Sequence[Some], setup: Setup) -> list[Some]:
        """Those that have no result yet, or one of other settings, sizes, prompts or model."""
        return [each for each in experiments if each not in self.failed and self.found(each, setup) is None]

    def found(self, experiment: AnyExperiment, setup: Setup) -> dict | None:
        """A result of these settings, sizes, prompts and model, if there is one."""
        path = self.path(experiment)
        result = read_json(path) if path.exists() else {}
        is_right = result.get("settings") == experiment.settings
        return result if is_right and result["basis"] == setup.basis(experiment.task) else None

    def read(self, task: str, arm: str, seed: int) -> dict:
        return read_json(self.folder / "reported" / f"{task}_{arm}_seed{seed}.json")

    def claims(self, name: str) -> dict[int, dict]:
        """Results of a run of `claims.py`, by seed."""
        found = [read_json(path) for path in sorted(self.folder.glob(f"claims/{name}_seed*.json"))]
        return {result["seed"]: result for result in found}

    def tasks(self) -> list[str]:
        return sorted({task for task, _, _ in self._found()}, reverse=True)

    def tuned_tasks(self) -> list[str]:
        tasks = (read_json(path)["task"] for path in self.folder.glob("tuning/*.json"))
        return sorted(set(tasks), reverse=True)

    def arms(self, task: str) -> list[str]:
        """In the order of `ARMS`."""
        found = {arm for of_task, arm, _ in self._found() if of_task == task}
        return [arm for arm in ARMS if arm in found]

    def seeds(self, task: str, arm: str) -> list[int]:
        return sorted(seed for *names, seed in self._found() if names == [task, arm])

    def counted_seeds(self, task: str, arm: str) -> list[int]:
        """
        Seeds that an arm's effect is made of.

        The seeds by which an arm was chosen among many would flatter it, so they do not count once it has others.
        """
        seeds = self.seeds(task, arm)
        others = [seed for seed in seeds if seed not in SCREENING_SEEDS]
        return seeds if arm in ALWAYS_CONFIRMED or not others else others

    def runs(self, task: str, arm: str, seeds: Sequence[int]) -> list[dict]:
        """
        Raises:
            DataError: If they have not all the same settings, or another basis than the baseline's.
        """
        found = [self.read(task, arm, seed) for seed in seeds]
        basis = [self.read(task, BASELINE, seed).get("basis") for seed in self.seeds(task, BASELINE)[:1]]
        if any(run["settings"] != found[0]["settings"] for run in found) or any(
            run.get("basis") != each for run in found for each in basis
        ):
            raise DataError(f"Results of {arm} on {task} in {self.folder} are of several kinds: run study.py again.")
        return found

    def rewards(self, task: str, arm: str, seeds: Sequence[int]) -> np.ndarray | None:
        """Mean reward on each topic or held-out prompt, `(seeds, groups)`; `None` if a seed is missing."""
        if not set(seeds) <= set(self.seeds(task, arm)):
            return None
        return np.array([run["rewards"] for run in self.runs(task, arm, seeds)])

    def differences(self, task: str, arm: str, other: str = BASELINE) -> np.ndarray | None:
        """
        How much more an arm earns than another on each topic or held-out prompt.

        Returns:
            `(seeds, groups)`, for the seeds that both have and that count; `None` if there are none.
        """
        seeds = [seed for seed in self.counted_seeds(task, arm) if seed in self.counted_seeds(task, other)]
        if not seeds or arm == other:
            return None
        return self.rewards(task, arm, seeds) - self.rewards(task, other, seeds)

    def start_rewards(self, task: str) -> list[float]:
        return [self.read(*names)["start"]["reward"] for names in self._found() if names[0] == task]

    def tuning(self, task: str, arm: str) -> dict[float, list[float]]:
        """Rewards on the prompts for tuning, one for each seed in their order, by learning rate."""
        found: dict[float, list[float]] = {}
        for path in sorted(self.folder.glob(f"tuning/{task}_{arm}_lr*_seed*.json")):
            run = read_json(path)
            found.setdefault(run["settings"]["learning_rate"], []).append(run["end"]["reward"])
        return found

    def best_learning_rate(self, task: str, arm: str) -> float | None:
        """The one with the highest mean reward on the prompts for tuning; of equal ones the lowest."""
        found = self.tuning(task, arm)
        return min(found, key=lambda rate: (-statistics.fmean(found[rate]), rate), default=None)

    def effect(self, task: str, arm: str, other: str = BASELINE) -> Effect | None:
        """How much more an arm earns than another, with an interval; `None` if they share no seeds."""
        differences = self.differences(task, arm, other)
        return None if differences is None else effect(differences)

    def seeds_needed(self, task: str, arm: str, other: str = BASELINE) -> int | None:
        """How many seeds an interval as narrow as `GOAL` takes; `None` if that is not known, or far too many."""
        differences = self.differences(task, arm, other)
        return None if differences is None or len(differences) < MIN_SEEDS else seeds_needed(differences)

    def tuning_table(self, task: str) -> list[str]:
        """Lines of a table in Markdown, with a column for each learning rate."""
        found = {arm: self.tuning(task, arm) for arm in ARMS}
        rates = sorted({rate for of_arm in found.values() for rate in of_arm})
        lines = [f"| | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
        for arm, of_arm in found.items():
            shown = [", ".join(f"{reward:.3f}" for reward in of_arm.get(rate, ())) for rate in rates]
            if of_arm:
                shown[rates.index(self.best_learning_rate(task, arm))] += " *"
                lines.append(f"| {ARMS[arm].label} | {' | '.join(shown)} |")
        return lines

    def table(self, task: str) -> list[str]:
        """Lines of a table in Markdown, a line for each arm."""
        lines = [
            "| | seeds | learning rate | reward | over best against worst | steps | tokens trained | answers end | "
            "tokens |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in self.arms(task):
            runs = self.runs(task, arm, self.counted_seeds(task, arm))

            def mean(part: str, name: str, runs: list[dict] = runs) -> float:
                return statistics.fmean(run[part][name] for run in runs)

            lines.append(
                f"| {ARMS[arm].label} | {len(runs)} | {runs[0]['settings']['learning_rate']:g} | "
                f"{mean('end', 'reward'):.3f} | {self.effect(task, arm) or ''} | {mean('budget', 'steps'):.0f} | "
                f"{mean('budget', 'tokens'):.0f} | {mean('end', 'finished'):.0%} | {mean('end', 'tokens'):.0f} |"
            )
        return lines

    def seeds_table(self, task: str) -> list[str]:
        """
        Lines of a table in Markdown: what arms with enough seeds earned with each of them.

        On the prompts for tuning that is with the rate that was chosen by them.
        """
        lines = ["| | learning rate | on the seeds for tuning | on the reported seeds |", "|---|---|---|---|"]
        for arm in self.arms(task):
            if len(self.seeds(task, arm)) < MIN_SEEDS:
                continue
            rate = self.best_learning_rate(task, arm)
            tuning = [] if rate is None else self.tuning(task, arm)[rate]
            reported = [self.read(task, arm, seed)["end"]["reward"] for seed in self.seeds(task, arm)]
            shown = (", ".join(f"{reward:.3f}" for reward in rewards) for rewards in (tuning, reported))
            lines.append(f"| {ARMS[arm].label} | {'' if rate is None else f'{rate:g}'} | {' | '.join(shown)} |")
        return lines

    def _found(self) -> list[tuple[str, str, int]]:
        names = [path.name for path in sorted(self.folder.glob("reported/*.json"))]
        return [self._parts(name) for name in names]

    @cached_property
    def _pattern(self) -> re.Pattern:
        arms = "|".join(sorted(map(re.escape, ARMS), key=len, reverse=True))
        return re.compile(rf"(.+?)_({arms})_seed(\d+)\.json")

    def _parts(self, name: str) -> tuple[str, str, int]:
        match = self._pattern.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} in {self.folder} is no result of this study; remove it.")
        return match[1], match[2], int(match[3])
