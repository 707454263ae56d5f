"""
Do ranked lists beat pairs? The same samples, many ways to train on them.

    python examples/studies/lists_vs_pairs/study.py                  # everything; the main comparison comes first
    python examples/studies/lists_vs_pairs/study.py --small          # a few arms, few prompts: does it run here?
    python examples/studies/lists_vs_pairs/study.py --tasks four_rules --arms lambdarank
    python examples/studies/lists_vs_pairs/study.py --table          # only prints the results

Every arm, learning rate and seed is a small JSON file in `results/`. Stop it whenever you like and start it again: what
is there is not computed again. Each result is computed on one thread or on a GPU, `--workers` of them side by side.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from arms import ALWAYS_CONFIRMED, ARMS, BASELINE, CONFIRMING_SEEDS, PROMISING_SEEDS, SCREENING_SEEDS
from experiment import GRADED_TASKS, MODEL, SMALL, WHOLE, Experiment, Setup
from results import Results
from workers import Samples, run_all

HERE = Path(__file__).parent

STAGES = ("tune", "screen", "confirm")

LEARNING_RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
FIRST_RATES = slice(3, 6)
"""
Those of them that every arm is tried with; further ones as long as the best one is the lowest or highest tried, or the
lowest one makes the model worse.
"""

TUNING_SEED = 100

NUM_PROMISING = 2
"""How many more arms are confirmed: the best of the screening."""

SMALL_ARMS = (BASELINE, "lambdarank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--tasks", nargs="+", default=list(GRADED_TASKS), choices=GRADED_TASKS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all; best_worst is always one of them")
    parser.add_argument(
        "--more_seeds", type=int, default=0, help="of the arms that are always confirmed, for narrower intervals"
    )
    arguments, setup, results = parse(parser)
    arms = arguments.arms or (SMALL_ARMS if arguments.small else ARMS)
    study = Study(results, setup, arguments.stages, arguments.tasks, arms, arguments.more_seeds)
    if arguments.table:
        print_table(results)
        return
    study.check_rates()
    try:
        run_all(study.missing, setup, results, arguments.workers, ahead=study.samples_ahead)
    finally:
        print_table(results)
        print("\n".join(study.remarks()))


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Setup, Results]:
    """Reads the command line, with the options that the scripts of the study have in common."""
    parser.add_argument("--workers", type=int, default=2, help="results computed side by side; 0: in this process")
    parser.add_argument("--small", action="store_true", help="few prompts and comparisons: does it run here?")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, help="folder of samples and logs")
    parser.add_argument("--results", type=Path, help="folder of the JSON files")
    parser.add_argument("--table", action="store_true", help="only print the results")
    arguments = parser.parse_args()
    output = arguments.output or Path("outputs") / ("lists_vs_pairs_small" if arguments.small else "lists_vs_pairs")
    results = Results(arguments.results or (output / "results" if arguments.small else HERE / "results"))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return arguments, Setup(SMALL if arguments.small else WHOLE, output, MODEL, device), results


@dataclass
class Study:
    """
    What is to be computed, given what there is.

    Attributes:
        results: What there is.
        setup: What all results have in common.
        stages: Some of `STAGES`.
        tasks: Names of tasks.
        arms: Names of arms.
        more_seeds: How many seeds beyond `CONFIRMING_SEEDS` the arms have that are always confirmed.
    """

    results: Results
    setup: Setup
    stages: Sequence[str] = STAGES
    tasks: Sequence[str] = tuple(GRADED_TASKS)
    arms: Sequence[str] = tuple(ARMS)
    more_seeds: int = 0

    def __post_init__(self):
        self.arms = [arm for arm in ARMS if arm in (*self.arms, BASELINE)]  # with which all are compared
        self.is_small = self.setup.size == SMALL

    def check_rates(self) -> None:
        """
        Raises:
            SystemExit: If an arm is to be measured whose learning rate is not chosen, and will not be.
        """
        for task in self.tasks if "tune" not in self.stages else ():
            arms = {arm for stage in self.stages for arm in self.seeds(stage, task)}
            if missing := [arm for arm in self.arms if arm in arms and self.rate(task, arm) is None]:
                names = ", ".join(missing)
                raise SystemExit(f"No learning rate was chosen for {names} on {task}: run the stage `tune`.")

    def missing(self) -> list[Experiment]:
        """
        Results that are missing and can be computed now, most important first: of each task the arms that are always
        confirmed, then the others; their tuning, then what follows from it.
        """
        found: list[Experiment] = []
        for task in self.tasks:
            seeds = {stage: self.seeds(stage, task) for stage in ("screen", "confirm") if stage in self.stages}
            main = [arm for arm in self.arms if arm in ALWAYS_CONFIRMED]
            for group in (main, [arm for arm in self.arms if arm not in main]):
                if "tune" in self.stages:
                    to_try = [each for arm in group for each in self.rates_to_try(task, arm)]
                    found += sorted(to_try, key=lambda each: each.learning_rate)
                rates = {arm: self.rate(task, arm) for arm in group}
                for of_arms in seeds.values():
                    experiments = [
                        Experiment(task, arm, rate, seed)
                        for arm, rate in rates.items()
                        if rate is not None
                        for seed in of_arms.get(arm, ())
                    ]
                    found += sorted(self.results.missing(experiments, self.setup), key=lambda each: each.seed)
        return list(dict.fromkeys(found))

    def samples_ahead(self) -> list[Samples]:
        """Samples that arms will need whose learning rates are still being tried."""
        if self.is_small or "tune" not in self.stages:
            return []
        return [
            (task, seed, False)
            for task in self.tasks
            for seed in dict.fromkeys(
                seed
                for stage in ("screen", "confirm")
                if stage in self.stages
                for arm, seeds in self.seeds(stage, task).items()
                if self.rates_to_try(task, arm)
                for seed in seeds
            )
        ]

    def seeds(self, stage: str, task: str) -> dict[str, tuple[int, ...]]:
        """The seeds with which arms are screened or confirmed, by arm."""
        if stage == "screen":
            return dict.fromkeys(self.arms, SCREENING_SEEDS[: 1 if self.is_small else None])
        if stage == "tune":
            return {}
        if self.is_small:
            return dict.fromkeys(self.arms, CONFIRMING_SEEDS[:1])
        more = range(CONFIRMING_SEEDS[-1] + 1, CONFIRMING_SEEDS[-1] + 1 + self.more_seeds)
        seeds = dict.fromkeys(ALWAYS_CONFIRMED, (*CONFIRMING_SEEDS, *more))
        if promising := self.promising_arms(task):
            seeds[BASELINE] = tuple(sorted({*seeds[BASELINE], *PROMISING_SEEDS}))
            seeds |= dict.fromkeys(promising, PROMISING_SEEDS)
        return {arm: of_arm for arm, of_arm in seeds.items() if arm in self.arms}

    def promising_arms(self, task: str) -> list[str]:
        """The best of the screening, apart from those that are always confirmed; none before all are screened."""
        means = {}
        for arm in ARMS:
            if arm in ALWAYS_CONFIRMED or self.is_out(task, arm):
                continue
            rate = self.rate(task, arm)
            if rate is None or self.results.missing(_screening(task, arm, rate), self.setup):
                return []
            means[arm] = self.results.rewards(task, arm, SCREENING_SEEDS).mean()
        return sorted(means, key=means.__getitem__, reverse=True)[:NUM_PROMISING]

    def is_out(self, task: str, arm: str) -> bool:
        """Whether an arm cannot be tuned, or not be screened because that has failed."""
        rate = self.rate(task, arm)
        if rate is None:
            return not self.rates_to_try(task, arm)
        return any(each in self.results.failed for each in _screening(task, arm, rate))

    def rate(self, task: str, arm: str) -> float | None:
        """The learning rate of an arm; `None` if it is not chosen yet, or cannot be."""
        if self.rates_to_try(task, arm):
            return None
        best = self._best_tried(task, arm)
        at_end = best in (LEARNING_RATES[0], LEARNING_RATES[-1]) and not self.is_small
        return None if at_end else best

    def rates_to_try(self, task: str, arm: str) -> list[Experiment]:
        """Learning rates that an arm has not been tried with yet."""
        missing = self._untried(task, arm, LEARNING_RATES[FIRST_RATES][: 2 if self.is_small else None])
        best = self._best_tried(task, arm)
        if missing or self.is_small or best is None:
            return missing
        lowest, result = next(iter(self._tried(task, arm).items()))
        is_worse = result["end"]["reward"] < result["start"]["reward"]
        place = LEARNING_RATES.index(best)
        first = min(place - 1, LEARNING_RATES.index(lowest) - is_worse)
        return self._untried(task, arm, LEARNING_RATES[max(0, first) : place + 2])

    def remarks(self) -> list[str]:
        """What a reader of the tables should know."""
        found = []
        for task in self.tasks:
            ends = [arm for arm in self.arms if self._best_tried(task, arm) in (LEARNING_RATES[0], LEARNING_RATES[-1])]
            if ends and not self.is_small:
                names = ", ".join(ends)
                found.append(f"{task}: the best rate of {names} is at an end of `LEARNING_RATES`: add others.")
            if "confirm" in self.stages and not self.is_small and not self.promising_arms(task):
                found.append(f"{task}: the best others are confirmed once all arms are tuned and screened.")
        return found

    def _untried(self, task: str, arm: str, rates: Sequence[float]) -> list[Experiment]:
        return self.results.missing([_tuning(task, arm, rate) for rate in rates], self.setup)

    def _best_tried(self, task: str, arm: str) -> float | None:
        """The one with the highest reward on the prompts for tuning; of equal ones the lowest."""
        rewards = {rate: result["end"]["reward"] for rate, result in self._tried(task, arm).items()}
        return max(rewards, key=rewards.__getitem__, default=None)

    def _tried(self, task: str, arm: str) -> dict[float, dict]:
        """Results of the learning rates that were tried, the lowest first."""
        tried = {rate: self.results.found(_tuning(task, arm, rate), self.setup) for rate in LEARNING_RATES}
        return {rate: result for rate, result in tried.items() if result is not None}


def _tuning(task: str, arm: str, rate: float) -> Experiment:
    return Experiment(task, arm, rate, TUNING_SEED, tuning=True)


def _screening(task: str, arm: str, rate: float) -> list[Experiment]:
    return [Experiment(task, arm, rate, seed) for seed in SCREENING_SEEDS]


def print_table(results: Results) -> None:
    """Learning rates that were tried; then a line for each arm: its effect with an interval, and what it cost."""
    for task in results.tuned_tasks():
        print(f"\n{task}: rewards on the prompts for tuning by learning rate; * is used\n")
        print("\n".join(results.tuning_table(task)))
    for task in results.tasks():
        print(f"\n{task}: the initial model has a reward of {statistics.fmean(results.start_rewards(task)):.3f}.")
        print("\n".join(results.table(task)))


if __name__ == "__main__":
    main()
