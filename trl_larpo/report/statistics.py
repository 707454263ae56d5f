"""
What the page and the health checks say of the samples and lists of an iteration: statistics over all of them, and where
some of them are.

Files of an iteration are read once, line by line. What was found is kept beside them in `statistics.json`, so that the
page of a long run does not read all of its iterations again.
"""

import contextlib
import dataclasses
import os
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..candidates import CandidatePool
from ..errors import DataError
from ..iterations import iteration_folder, iteration_folders
from ..pools import read_pools
from ..prompts import Row
from ..storage import StoredRows, iter_jsonl, read_json, write_json

MAX_LISTS = 3000
"""Lists of a run in the page. Beyond it, each iteration shows some of its lists, evenly spread over its file."""

_NAME = "statistics.json"

_SOURCES = ("samples.jsonl", "rewarded.jsonl", "lists.jsonl")

_SAMPLED = "sampled"  # in it: what the health checks look at, beside what the page shows

_NUM_BINS = 1000  # of the histogram of rewards; the picture has fewer

_LARGEST_DRAWN = 1e300  # floats have no room for the distance of larger rewards

_VERSION = 1


def statistics_of(folder: Path, number: int) -> Row:
    """
    Statistics of an iteration.

    Args:
        folder: Its folder.
        number: Its number.

    Returns:
        Where the files are there: `rewards`, a histogram (`low`, `high`, `counts`) of the rewards of the samples that
        the policy made in this iteration; `tokens`, their mean number of tokens; `sources` and `sizes`, how many
        candidates of the lists come from where, and how many lists have how many candidates; `num_lists`, with those
        that have a problem.
    """
    made_of = {name: _state(folder / name) for name in _SOURCES if (folder / name).exists()}
    made_of["version"] = [_VERSION]
    known = _kept(folder)
    if known.get("made_of") == made_of:
        return known
    found: Row = {"made_of": made_of} | {name: known[name] for name in (_SAMPLED,) if name in known}
    if "rewarded.jsonl" in made_of:
        found |= _of_samples(folder / "rewarded.jsonl", number)
    elif "samples.jsonl" in made_of:
        found |= _of_samples(folder / "samples.jsonl", number)
    if "lists.jsonl" in made_of:
        found |= _of_lists(folder / "lists.jsonl")
    write_json(folder / _NAME, found)
    return found


@dataclass(frozen=True)
class SampleStatistics:
    """
    What the health checks look at in the samples of an iteration that the policy made.

    Attributes:
        tokens: Their mean number of tokens; `None` where unknown.
        finished: Share of them that ended on their own.
        duplicates: Mean share of a prompt's samples that repeat another one.
    """

    tokens: float | None
    finished: float
    duplicates: float


@dataclass
class SampleCounts:
    """
    What [`SampleStatistics`] are made of. A pool is counted when it passes.

    Attributes:
        lengths: Tokens of the policy's samples, where they are known.
        finished: Whether each of them ended on its own.
        distinct: Share of the samples of each prompt that differ.
    """

    lengths: array = field(default_factory=lambda: array("q"))
    finished: array = field(default_factory=lambda: array("b"))
    distinct: array = field(default_factory=lambda: array("d"))

    def counted(self, pools: Iterable[CandidatePool]) -> Iterator[CandidatePool]:
        """Passes on the pools."""
        for pool in pools:
            own = [candidate for candidate in pool.candidates if candidate.source == "policy"]
            self.lengths.extend(candidate.num_tokens for candidate in own if candidate.num_tokens is not None)
            self.finished.extend(candidate.finished for candidate in own)
            if own:
                self.distinct.append(len({str(candidate.completion) for candidate in own}) / len(own))
            yield pool

    def statistics(self) -> SampleStatistics:
        """Those of all pools that have passed."""
        mean_length = statistics.fmean(self.lengths) if self.lengths else None
        return SampleStatistics(mean_length, statistics.fmean(self.finished), 1 - statistics.fmean(self.distinct))


def sample_statistics(folder: Path) -> SampleStatistics:
    """
    Statistics of `samples.jsonl`: as they were kept, or counted where they are missing or the file has changed. Once
    they are kept, the file may be deleted.

    Args:
        folder: That of the iteration.
    """
    known = _kept(folder).get(_SAMPLED, {})
    if known and (not (folder / "samples.jsonl").exists() or known["made_of"] == _state_of_samples(folder)):
        return SampleStatistics(**{each.name: known[each.name] for each in dataclasses.fields(SampleStatistics)})
    counts = SampleCounts()
    for _ in counts.counted(read_pools(folder / "samples.jsonl", skip_damaged=True)):
        pass
    keep_sample_statistics(folder, counts)
    return counts.statistics()


def keep_sample_statistics(folder: Path, counts: SampleCounts) -> None:
    """
    Keeps the statistics of `samples.jsonl` for [`sample_statistics`].

    Args:
        folder: That of the iteration.
        counts: Of all pools in the file.
    """
    if counts.finished:
        found = {"made_of": _state_of_samples(folder)} | dataclasses.asdict(counts.statistics())
        write_json(folder / _NAME, _kept(folder) | {_SAMPLED: found})


def _kept(folder: Path) -> Row:
    with contextlib.suppress(FileNotFoundError, DataError):  # damaged: made again
        return read_json(folder / _NAME)
    return {}


def _state_of_samples(folder: Path) -> Row:
    return {"samples.jsonl": _state(folder / "samples.jsonl"), "version": [_VERSION]}


def _state(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def _of_samples(path: Path, number: int) -> Row:
    rewards, total, count = array("d"), 0, 0
    for row in iter_jsonl(path):
        known = row.get("rewards") or [None] * len(row["candidates"])
        for about, reward in zip(row["candidates"], known, strict=True):
            if about["source"] == "policy" and about["iteration"] == number:
                if reward is not None:
                    rewards.append(reward)
                if about["num_tokens"] is not None:
                    total, count = total + about["num_tokens"], count + 1
    found: Row = {"tokens": total / count if count else None}
    return found | ({"rewards": _histogram(np.array(rewards))} if rewards else {})


def bin_edges(low: float, high: float, num_bins: int) -> np.ndarray:
    """Edges of bins of equal width; of one bin where all is equal but for rounding."""
    edges = np.linspace(low, high, num_bins + 1)
    return edges if (np.diff(edges) > 0).all() else np.array([low - 0.5, high + 0.5])


def _histogram(values: np.ndarray) -> Row:
    values = values.clip(-_LARGEST_DRAWN, _LARGEST_DRAWN)
    low, high = float(values.min()), float(values.max())
    return {"low": low, "high": high, "counts": np.histogram(values, bin_edges(low, high, _NUM_BINS))[0].tolist()}


def _of_lists(path: Path) -> Row:
    sources: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    num_lists = 0
    for row in iter_jsonl(path):
        num_lists += 1
        if row["problem"] is None:
            sizes[len(row["completions"])] += 1
        for about in row["candidates"]:
            of_policy = about["source"] == "policy"
            sources[f"iteration {about['iteration']}" if of_policy else about["source"].replace("_", " ")] += 1
    return {"sources": dict(sources), "sizes": sorted(sizes.items()), "num_lists": num_lists}


def shown_lists(run: Path, iterations: dict[int, Row]) -> Iterator[tuple[int, Row]]:
    """Rows of the lists that the page shows, with the number of their iteration."""
    counts = {number: found["statistics"].get("num_lists", 0) for number, found in iterations.items()}
    share = MAX_LISTS / max(1, sum(counts.values()))
    for number, count in counts.items():
        if count:
            rows = StoredRows([iteration_folder(run, number) / "lists.jsonl"])
            shown = min(count, max(1, round(share * count)))
            for place in range(shown):
                yield number, rows[place * count // shown]


def lists_of_prompt(run: Path, name: str) -> Iterator[tuple[int, Row]]:
    """
    Rows of the lists of a prompt, with the number of their iteration.

    Args:
        run: Folder of a run.
        name: The `prompt_id`, or how it begins.
    """
    for number, folder in iteration_folders(run).items():
        if (folder / "lists.jsonl").exists():
            rows: Any = StoredRows([folder / "lists.jsonl"], key="prompt_id")
            for place, prompt_id in enumerate(rows.keys):
                if prompt_id.startswith(name):
                    yield number, rows[place]
