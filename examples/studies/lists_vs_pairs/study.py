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
import traceback
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

Samples = tuple[str, int, bool]
"""Task, seed, and whether they are for tuning: what tells the samples that a result is made of from others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--tasks", nargs="+", default=list(GRADED_TASKS), choices=GRADED_TASKS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all")
    parser.add_argument(
        "--more_seeds", type=int, default=0, help="of the arms that are always confirmed, for narrower intervals"
    )
    arguments, setup, results = parse(parser)
    arms = arguments.arms or list(SMALL_ARMS if arguments.small else ARMS)
    if not arguments.table:
        if "tune" not in arguments.stages:
            check_rates(arguments.tasks, arms, results)

        def missing() -> list[Experiment]:
            return to_do(arguments.stages, arguments.tasks, arms, results, setup, arguments.more_seeds)

        # What is not needed yet is sampled while workers have nothing else to do
        seeds = () if arguments.small or arguments.stages == ["tune"] else (*SCREENING_SEEDS, *CONFIRMING_SEEDS)
        ahead = [(task, seed, False) for task in arguments.tasks[:1] for seed in seeds]
        run_all(missing, setup, results, arguments.workers, ahead=ahead)
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


def check_rates(tasks: list[str], arms: list[str], results: Results) -> None:
    for task in tasks:
        if missing := [arm for arm in arms if results.best_learning_rate(task, arm) is None]:
            raise SystemExit(f"No learning rate was chosen for {', '.join(missing)} on {task}: run the stage `tune`.")


def to_do(
    stages: list[str], tasks: list[str], arms: list[str], results: Results, setup: Setup, more_seeds: int = 0
) -> list[Experiment]:
    """Results that are missing and can be computed, given those that there are. The main comparison comes first."""
    found = []
    for task in tasks:
        is_chosen = {arm: "tune" not in stages or not rates_to_try(task, arm, results, setup) for arm in arms}
        seeds = {stage: seeds_of(stage, task, arms, results, setup, more_seeds) for stage in ("screen", "confirm")}
        for is_main in (True, False):
            group = [arm for arm in arms if (arm in ALWAYS_CONFIRMED) == is_main]
            if "tune" in stages:
                rates = [each for arm in group for each in rates_to_try(task, arm, results, setup)]
                found += sorted(rates, key=lambda each: each.learning_rate)
            for stage, of_arms in seeds.items():
                if stage in stages:
                    experiments = [
                        Experiment(task, arm, results.best_learning_rate(task, arm), seed)
                        for arm in group
                        if is_chosen[arm]
                        for seed in of_arms.get(arm, ())
                    ]
                    found += sorted(results.missing(experiments, setup), key=lambda each: each.seed)
    return list(dict.fromkeys(found))


def seeds_of(
    stage: str, task: str, arms: list[str], results: Results, setup: Setup, more_seeds: int
) -> dict[str, tuple[int, ...]]:
    """By arm, the seeds with which it is screened or confirmed."""
    small = setup.size == SMALL
    if stage == "screen":
        return dict.fromkeys(arms, SCREENING_SEEDS[: 1 if small else None])
    if small:
        return dict.fromkeys(SMALL_ARMS, CONFIRMING_SEEDS[:1])
    last = CONFIRMING_SEEDS[-1]
    seeds = dict.fromkeys(ALWAYS_CONFIRMED, (*CONFIRMING_SEEDS, *range(last + 1, last + 1 + more_seeds)))
    if promising := promising_arms(task, arms, results):
        seeds[BASELINE] = tuple(sorted({*seeds[BASELINE], *PROMISING_SEEDS}))
        seeds |= dict.fromkeys(promising, PROMISING_SEEDS)
    return seeds


def promising_arms(task: str, arms: list[str], results: Results) -> list[str]:
    """The best of the screening, apart from those that are always confirmed; none before all are screened."""
    screened = {
        arm: results.rewards(task, arm, SCREENING_SEEDS)
        for arm in {*arms, *results.arms(task)}
        if arm not in ALWAYS_CONFIRMED and not results.has_failed(task, arm)
    }
    means = {arm: rewards.mean() for arm, rewards in screened.items() if rewards is not None}
    if len(means) < len(screened):
        return []
    return sorted(means, key=means.__getitem__, reverse=True)[:NUM_PROMISING]


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


def run_all(
    find_missing: Callable[[], Sequence[Any]],
    setup: Setup,
    results: Results,
    num_workers: int,
    function: Callable[[Any, Setup], dict] = run,
    ahead: Sequence[Samples] = (),
) -> None:
    """
    Computes results until none is missing. One that fails is left out, and named at the end.

    Args:
        find_missing: What is missing and can be computed, most important first; asked again after each result.
        setup: What all results have in common.
        results: Where they are saved.
        num_workers: How many are computed side by side; 0: in this process.
        function: Makes one of them.
        ahead: Samples that are drawn where a worker would have nothing to do.

    Raises:
        SystemExit: If one has failed.
    """
    print(f"{len(find_missing())} results to compute now, and those that follow from them.", flush=True)
    started, number = time.monotonic(), 0
    for each, result in _results_of(find_missing, setup, num_workers, function, ahead):
        if isinstance(result, BaseException):
            results.failed.add(each)
            print(f"{each.file_name} failed:", *traceback.format_exception(result), sep="\n", flush=True)
            continue
        write_json(results.path(each), result)
        number += 1
        minutes = (time.monotonic() - started) / 60
        print(
            f"{each.file_name}: {result['start']['reward']:.3f} → {result['end']['reward']:.3f} "
            f"({number} in {minutes:.0f} min, {len(find_missing())} are known to be missing)",
            flush=True,
        )
    if results.failed:
        names = sorted(each.file_name for each in results.failed)
        raise SystemExit(f"Failed: {', '.join(names)}. The same again retries.")


def _results_of(
    find_missing: Callable[[], Sequence[Any]],
    setup: Setup,
    num_workers: int,
    function: Callable[[Any, Setup], dict],
    ahead: Sequence[Samples] = (),
) -> Iterator[tuple[Any, dict | BaseException]]:
    """What was missing and its result, or why it has none, as they are done; the samples of a seed come first."""
    if num_workers == 0:
        while missing := find_missing():
            prepare(*_samples_of(missing[0]), setup)
            yield missing[0], function(missing[0], setup)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_end_with, initargs=(os.getpid(),)) as workers:
        sampling: dict[Future, Samples] = {}
        running: dict[Future, Any] = {}
        sampled: set[Samples] = set()

        def are_busy() -> bool:
            return len(sampling) + len(running) == num_workers

        def draw(which: Samples) -> None:
            if which not in sampled and which not in sampling.values() and not are_busy():
                sampling[workers.submit(prepare, *which, setup)] = which

        try:
            while True:
                for each in find_missing():
                    if _samples_of(each) not in sampled:
                        draw(_samples_of(each))
                    elif each not in running.values() and not are_busy():
                        running[workers.submit(function, each, setup)] = each
                for which in ahead:
                    draw(which)
                if not sampling and not running:
                    return
                for future in wait([*sampling, *running], return_when=FIRST_COMPLETED).done:
                    if future in running:
                        yield running.pop(future), future.exception() or future.result()
                    else:
                        future.result()
                        sampled.add(sampling.pop(future))
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _samples_of(each: Any) -> Samples:
    return each.task, each.seed, each.tuning


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
