"""Results of the study, computed side by side: what is missing is asked for again after each of them."""

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from experiment import Setup, prepare, run
from results import Results

from trl_larpo.storage import write_json

Samples = tuple[str, int, bool]
"""Task, seed, and whether they are for tuning: what tells the samples that a result is made of from others."""


def run_all(
    find_missing: Callable[[], Sequence[Any]],
    setup: Setup,
    results: Results,
    num_workers: int,
    function: Callable[[Any, Setup], dict] = run,
    ahead: Callable[[], Sequence[Samples]] = tuple,
) -> None:
    """
    Computes results until none is missing. One that fails is left out, and named at the end.

    Args:
        find_missing: What is missing and can be computed, most important first; asked again after each result.
        setup: What all results have in common.
        results: Where they are saved.
        num_workers: How many are computed side by side; 0: in this process.
        function: Makes one of them.
        ahead: Samples that will be needed, drawn where a worker would have nothing to do.

    Raises:
        SystemExit: If one has failed, or a worker has ended.
    """
    print(f"{len(find_missing())} results to compute now, and those that follow from them.", flush=True)
    started, number = time.monotonic(), 0
    for each, result in _results_of(find_missing, setup, num_workers, function, ahead):
        if isinstance(result, BaseException):
            results.failed.add(each)
            print(f"{each.file_name} failed:", *traceback.format_exception(result), sep="\n", flush=True)
            continue
        write_json(results.path(each), result)
        if results.missing([each], setup):  # it would be computed for ever
            results.failed.add(each)
            print(f"{each.file_name} is of another kind: did the scripts or the model change? Start again.", flush=True)
            continue
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
    ahead: Callable[[], Sequence[Samples]] = tuple,
) -> Iterator[tuple[Any, dict | BaseException]]:
    """What was missing and its result, or why it has none, as they are done; the samples of a seed come first."""
    if num_workers == 0:
        while missing := find_missing():
            try:
                prepare(*_samples_of(missing[0]), setup)
                result: dict | BaseException = function(missing[0], setup)
            except Exception as error:
                result = error
            yield missing[0], result
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_end_with, initargs=(os.getpid(),)) as workers:
        sampling: dict[Future, Samples] = {}
        running: dict[Future, Any] = {}
        sampled: dict[Samples, BaseException | None] = {}  # and why it was not possible

        def are_busy() -> bool:
            return len(sampling) + len(running) == num_workers

        def draw(which: Samples) -> None:
            if which not in sampled and which not in sampling.values() and not are_busy():
                sampling[workers.submit(prepare, *which, setup)] = which

        try:
            while (missing := find_missing()) or running:
                for each in missing:
                    which = _samples_of(each)
                    if which not in sampled:
                        draw(which)
                    elif (error := sampled[which]) is not None:
                        yield each, error
                    elif each not in running.values() and not are_busy():
                        running[workers.submit(function, each, setup)] = each
                for which in ahead():
                    draw(which)
                for future in wait([*sampling, *running], return_when=FIRST_COMPLETED).done:
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise error
                    if future in running:
                        yield running.pop(future), error or future.result()
                    else:
                        sampled[sampling.pop(future)] = error
        except BrokenProcessPool as error:
            raise SystemExit("A worker has ended; is the memory too small? The same command goes on.") from error
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
