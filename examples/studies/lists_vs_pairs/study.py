"""
Do ranked lists beat pairs? The same samples, many ways to train on them.

    python examples/studies/lists_vs_pairs/study.py                  # everything, in the order tune, screen, confirm
    python examples/studies/lists_vs_pairs/study.py --small          # a few arms, few prompts: does it run here?
    python examples/studies/lists_vs_pairs/study.py --stages screen --tasks four_rules --arms lambdarank
    python examples/studies/lists_vs_pairs/study.py --table          # only prints the results

Every arm, learning rate and seed is a small JSON file in `results/`. Stop it whenever you like and start it again: what
is there is not computed again. Each result is computed on one thread or on a GPU, `--workers` of them side by side.
"""

import argparse
import multiprocessing
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from arms import ALWAYS_CONFIRMED, ARMS, BASELINE, CONFIRMING_SEEDS, PROMISING_SEEDS, SCREENING_SEEDS
from experiment import GRADED_TASKS, MODEL, SMALL, WHOLE, Experiment, Setup, prepare, run
from results import Results

from trl_larpo.storage import write_json

HERE = Path(__file__).parent

STAGES = ("tune", "screen", "confirm")

LEARNING_RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
FIRST_RATES = slice(3, 6)
"""Those of them that every arm is tried with; further ones as long as the best one is the lowest or highest tried."""

TUNING_SEED = 100

NUM_PROMISING = 2
"""How many more arms are confirmed: the best of the screening."""

SMALL_ARMS = (BASELINE, "lambdarank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--tasks", nargs="+", default=list(GRADED_TASKS), choices=GRADED_TASKS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all")
    arguments, setup, results = parse(parser)
    arms = arguments.arms or list(SMALL_ARMS if arguments.small else ARMS)
    if not arguments.table:
        for stage in arguments.stages:
            for task in arguments.tasks:  # one after the other: the first is finished sooner
                while missing := results.missing(experiments_of(stage, task, arms, results, setup), setup):
                    run_all(missing, setup, results, arguments.workers, f"{stage} {task}")
    print_table(results)


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


def experiments_of(stage: str, task: str, arms: list[str], results: Results, setup: Setup) -> list[Experiment]:
    """What a stage consists of, given the results that there are."""
    small = setup.size == SMALL
    if stage == "tune":
        found = [each for arm in arms for each in rates_to_try(task, arm, results, setup)]
        return sorted(found, key=lambda each: each.learning_rate)
    if stage == "screen":
        seeds = dict.fromkeys(arms, SCREENING_SEEDS[: 1 if small else None])
    else:
        seeds = {arm: found for arm, found in seeds_to_confirm(task, results, small).items() if arm in arms}
    rates = {arm: results.best_learning_rate(task, arm) for arm in seeds}
    missing = [arm for arm, rate in rates.items() if rate is None]
    if missing:
        raise SystemExit(f"No learning rate was chosen for {', '.join(missing)} on {task}: run the stage `tune`.")
    experiments = [Experiment(task, arm, rates[arm], seed) for arm in seeds for seed in seeds[arm]]
    return sorted(experiments, key=lambda each: each.seed)


def rates_to_try(task: str, arm: str, results: Results, setup: Setup) -> list[Experiment]:
    """Learning rates that an arm has not been tried with yet."""
    small = setup.size == SMALL

    def untried(rates: Sequence[float]) -> list[Experiment]:
        tried = [Experiment(task, arm, rate, TUNING_SEED, tuning=True) for rate in rates]
        return results.missing(tried, setup)

    missing = untried(LEARNING_RATES[FIRST_RATES][: 2 if small else None])
    if missing or small:
        return missing
    place = LEARNING_RATES.index(results.best_learning_rate(task, arm))
    if place in (0, len(LEARNING_RATES) - 1):
        raise SystemExit(f"The best learning rate of {arm} on {task} is at an end of `LEARNING_RATES`: add others.")
    return untried(LEARNING_RATES[place - 1 : place + 2])


def seeds_to_confirm(task: str, results: Results, small: bool) -> dict[str, tuple[int, ...]]:
    """By arm: those that are always reported, and those with the highest mean reward in the screening."""
    if small:
        return dict.fromkeys(SMALL_ARMS, CONFIRMING_SEEDS[:1])
    found = {arm: results.rewards(task, arm, SCREENING_SEEDS) for arm in results.arms(task)}
    means = {arm: rewards.mean() for arm, rewards in found.items() if rewards is not None}
    others = sorted((arm for arm in means if arm not in ALWAYS_CONFIRMED), key=means.__getitem__, reverse=True)
    seeds = dict.fromkeys(ALWAYS_CONFIRMED, CONFIRMING_SEEDS)
    if promising := others[:NUM_PROMISING]:
        seeds |= dict.fromkeys([BASELINE, *promising], PROMISING_SEEDS)
    return seeds


def run_all(
    missing: Sequence[Any],
    setup: Setup,
    results: Results,
    num_workers: int,
    title: str,
    function: Callable[[Any, Setup], dict] = run,
) -> None:
    """Computes results, with a function that makes one of them."""
    print(f"{title}: {len(missing)} results to compute.", flush=True)
    started = time.monotonic()
    for number, (each, result) in enumerate(_results_of(missing, setup, num_workers, function), start=1):
        write_json(results.path(each), result)
        minutes = (time.monotonic() - started) / 60
        left = minutes / number * (len(missing) - number)
        print(
            f"{each.file_name}: {result['start']['reward']:.3f} → {result['end']['reward']:.3f} "
            f"({number} of {len(missing)} in {minutes:.0f} min, about {left:.0f} min left)",
            flush=True,
        )


def _results_of(
    experiments: Sequence[Any], setup: Setup, num_workers: int, function: Callable[[Any, Setup], dict]
) -> Iterator[tuple[Any, dict]]:
    """Each experiment and its result, as they are done; the samples of a seed come first."""
    by_samples: dict[tuple, list] = {}
    for each in experiments:
        by_samples.setdefault((each.task, each.seed, each.tuning), []).append(each)
    if num_workers == 0:
        for which, group in by_samples.items():
            prepare(*which, setup)
            for each in group:
                yield each, function(each, setup)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_end_with, initargs=(os.getpid(),)) as workers:
        to_sample = deque(by_samples)
        sampling: dict[Future, tuple] = {}
        running: dict[Future, Any] = {}
        try:
            while to_sample or sampling or running:
                # Soon enough that no worker waits for samples, and not before the results that need none
                while to_sample and len(sampling) < num_workers and len(running) <= 2 * num_workers:
                    which = to_sample.popleft()
                    sampling[workers.submit(prepare, *which, setup)] = which
                for future in wait([*sampling, *running], return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    if future in running:
                        yield running.pop(future), result
                    else:
                        group = by_samples[sampling.pop(future)]
                        running |= {workers.submit(function, each, setup): each for each in group}
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, however that ended: nobody would take its results."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
