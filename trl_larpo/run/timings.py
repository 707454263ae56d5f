"""What the stages of a run took, in `timings.jsonl`."""

import json
from pathlib import Path

from ..prompts import Row
from ..storage import read_json, whole_rows

TIMINGS = "timings.jsonl"

WORK = "work.json"
"""Seconds of the latest stage without loading models and starting processes; `timings.jsonl` has them of all stages."""


def note_timing(run: Path, iteration: int, stage: str, seconds: float, resumed_at: int = 0) -> None:
    """
    Notes what a stage took until it ended or was stopped, and what of it was work that grows with the number of
    prompts.

    Args:
        run: Folder of the run.
        iteration: The stage's iteration.
        stage: Its name.
        seconds: What it took since it was begun or resumed.
        resumed_at: How many prompts or steps earlier calls had done.
    """
    row: Row = {"iteration": iteration, "stage": stage, "seconds": round(seconds, 2), "resumed_at": resumed_at}
    work = read_json(run / WORK) if (run / WORK).exists() else {}
    if (work.get("iteration"), work.get("stage")) == (iteration, stage):
        row["work"] = round(work["seconds"], 2)
    with open(run / TIMINGS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def seconds_of_stages(run: Path) -> dict[tuple[int, str], float]:
    """
    What each stage of a run took, by iteration and name, in all calls that worked on it.

    Stages that were killed are left out if they were resumed, as nobody could note what the killed call took.
    """
    found: dict[tuple[int, str], float] = {}
    for row in whole_rows(run / TIMINGS, []) if (run / TIMINGS).exists() else ():
        stage = row["iteration"], row["stage"]
        if not row.get("resumed_at"):  # the first call, or nothing of earlier ones was kept
            found[stage] = row["seconds"]
        elif stage in found:
            found[stage] += row["seconds"]
    return found
