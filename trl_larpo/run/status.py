"""
`larpo status`: how far a run is, from its files alone, while it runs or when it has stopped.

The loop notes in `progress.json` which stage it has begun. Rates are of the time since then; the time that is left is
estimated from what the stages of earlier iterations took.
"""

import contextlib
import itertools
import logging
import os
import shutil
import time
from datetime import datetime
from pathlib import Path

import psutil

from ..errors import DataError
from ..iterations import iteration_folder, iteration_folders
from ..locks import is_locked
from ..prompts import Row
from ..set_aside import set_aside_in
from ..storage import StoredRows, partial_files, read_json, read_yaml, write_json
from ..training.checkpoints import checkpoints
from .memory import earlier_iterations
from .stages import STAGES, Stage, is_done
from .timings import seconds_of_stages

PROGRESS, WARNINGS = "progress.json", "warnings.log"

_NUM_WARNINGS = 5

_PACKAGE = __name__.split(".")[0]

_BLOCK = 2**20  # bytes


def note_stage(run: Path, iteration: int, stage: Stage) -> int:
    """Notes that a stage begins, says how much time may be left, and returns what earlier calls have done of it."""
    done, _ = _progress(run, iteration, stage)
    write_json(run / PROGRESS, {"iteration": iteration, "stage": stage.name, "started": time.time(), "done": done})
    left = seconds_left(run)
    if left is not None:
        until = datetime.fromtimestamp(time.time() + left)
        print(f"Iteration {iteration}, {stage.name}: about {duration(left)} left in the run, until {until:%a %H:%M}")
    return done


def keep_warnings(run: Path) -> logging.Handler:
    """Also writes warnings of the package into a file of the run, up to [`forget_warnings`]. Returns its handler."""
    handler = logging.FileHandler(run / WARNINGS, encoding="utf-8", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger(_PACKAGE).addHandler(handler)
    return handler


def forget_warnings(handler: logging.Handler) -> None:
    """Ends what [`keep_warnings`] began."""
    logging.getLogger(_PACKAGE).removeHandler(handler)
    handler.close()


def status_of(run: str | Path) -> Row:
    """
    What is known of a run.

    Args:
        run: Its folder.

    Returns:
        `state` (`"running"`, `"finished"` or `"stopped"`), `iteration` and `num_iterations`, `stage` (the one that is
        done next), `done` and `total` of its prompts or steps, `per_second`, `seconds_left` of the whole run,
        `set_aside` by stage, `servers`, `disk` (bytes used by the run, and free), `warnings`, the last ones. What is
        not known is `None`.

    Raises:
        DataError: If the folder holds no run.
    """
    run = Path(run)
    if not (run / "run.yaml").is_file():
        raise DataError(f"{str(run)!r} is no folder of a run: it has no run.yaml.")
    settings = read_yaml(run / "run.yaml")
    position = next(iter(_left(run, settings["num_iterations"])), None)
    running = is_locked(run)
    found: Row = {
        "state": "running" if running else "finished" if position is None else "stopped",
        "iteration": settings["num_iterations"] if position is None else position[0],
        "num_iterations": settings["num_iterations"],
        "stage": None if position is None else position[1].name,
        "done": None,
        "total": None,
        "per_second": None,
        "seconds_left": seconds_left(run) if running else None,
    }
    if position is not None:
        found["done"], found["total"] = _progress(run, *position)
        found["per_second"] = _rate(run, *position, found["done"]) if running else None
    folders = iteration_folders(run).values()
    return found | {
        "set_aside": {f"{f.name}/{name}": len(rows) for f in folders for name, rows in set_aside_in(f).items()},
        "servers": settings.get("server_urls") or _started_servers(run),
        "disk": {
            # Unlike `rglob`, `walk` skips folders that are deleted meanwhile
            "used": sum(_size(Path(folder, name)) for folder, _, names in os.walk(run) for name in names),
            "free": shutil.disk_usage(run).free,
        },
        "warnings": _last_warnings(run),
    }


def as_text(found: Row) -> str:
    """The status for a person."""
    lines = [f"{found['state']}: iteration {found['iteration']} of {found['num_iterations']}"]
    if found["stage"] is not None:
        of_total = "" if found["total"] is None else f": {found['done']} of {found['total']}"
        rate = "" if not found["per_second"] else f", {found['per_second']:.2f} per second"
        lines.append(f"  stage      {found['stage']}{of_total}{rate}")
    if found["seconds_left"] is not None:
        until = datetime.fromtimestamp(time.time() + found["seconds_left"])
        lines.append(f"  left       about {duration(found['seconds_left'])}, until {until:%a %H:%M}")
    for name, count in found["set_aside"].items():
        lines.append(f"  set aside  {count} prompts in {name}")
    lines += [f"  server     {server}" for server in found["servers"]]
    lines.append(f"  disk       {found['disk']['used'] / 2**30:.2f} GiB used, {found['disk']['free'] / 2**30:.1f} free")
    lines += [f"  warning    {line}" for line in found["warnings"]]
    return "\n".join(lines)


def seconds_left(run: Path) -> float | None:
    """
    What the rest of a run may take.

    Each stage is taken to last as long as in the latest iteration that has done it; the one at work is measured by its
    rate. `None` while a stage that is still to come has never been done.
    """
    settings = read_yaml(run / "run.yaml")
    left = _left(run, settings["num_iterations"])
    not_done = {(iteration, stage.name) for iteration, stage in left}
    # Of the initial model, `evaluate` computes no divergence
    known = {
        name: seconds
        for (iteration, name), seconds in sorted(seconds_of_stages(run).items())
        if (iteration, name) not in {*not_done, (0, "evaluate")}
    }
    total = 0.0
    for place, (iteration, stage) in enumerate(left):
        done, of_all = _progress(run, iteration, stage) if place == 0 else (0, None)
        rate = _rate(run, iteration, stage, done) if place == 0 else None
        if rate and of_all is not None:
            total += max(0, of_all - done) / rate
        elif stage.name in known:
            total += known[stage.name]
        else:
            return None
    return total


def _left(run: Path, num_iterations: int) -> list[tuple[int, Stage]]:
    """Iteration and stage of all that is not done, in order, but first the one that was begun last."""
    left = [
        (iteration, stage)
        for iteration in range(num_iterations + 1)
        for stage in STAGES.values()
        if (iteration or stage.at_start) and not is_done(run, stage, iteration, num_iterations)
    ]
    begun = read_json(run / PROGRESS) if (run / PROGRESS).exists() else {}
    # With `server_command` the next iteration is sampled before this one is evaluated
    return sorted(left, key=lambda x: (x[0], x[1].name) != (begun.get("iteration"), begun.get("stage")))


def _progress(run: Path, iteration: int, stage: Stage) -> tuple[int, int | None]:
    """How many prompts, or steps of a training, are done, and how many there are; `None` where nothing tells."""
    folder = iteration_folder(run, iteration)
    if stage.name == "train":
        state = _trainer_state(folder / "trainer")
        return state.get("global_step", 0), state.get("max_steps")
    if stage.name in ("select", "reference", "evaluate"):
        return 0, None
    done = sum(_num_rows(each) for each in partial_files(folder / stage.output))
    sources = {
        "reward": folder / "samples.jsonl",
        "held_out_samples": run / "held_out_prompts.jsonl",
        "held_out": folder / "held_out_samples.jsonl",
    }
    source = sources.get(stage.name, run / "prompts.jsonl")
    slices = read_json(run / "prompts.json").get("slices") if (run / "prompts.json").exists() else None
    if stage.name == "generate" and slices:
        return done, slices[iteration - 1]
    if not source.exists():
        return done, None
    remembered = _num_remembered(run, iteration, slices) if stage.name == "reward" and slices else 0
    return done, _num_rows(source) + remembered


def _num_remembered(run: Path, iteration: int, slices: list[int]) -> int:
    """Prompts of earlier iterations alone that an iteration trains on again, and so rewards with its own."""
    earlier = earlier_iterations(read_yaml(run / "run.yaml").get("memory", "none"), iteration)
    if not earlier:
        return 0
    names, starts = StoredRows([run / "prompts.jsonl"], key="prompt_id").keys, [0, *itertools.accumulate(slices)]
    own = set(names[starts[iteration - 1] : starts[iteration]])
    return len({name for number in earlier for name in names[starts[number - 1] : starts[number]]} - own)


def _trainer_state(folder: Path) -> Row:
    """That of the latest checkpoint which is neither being written nor deleted at this moment; empty without one."""
    for checkpoint in checkpoints(folder):
        with contextlib.suppress(OSError, DataError):
            return read_json(checkpoint / "trainer_state.json")
    return {}


def _num_rows(path: Path) -> int:
    """Lines of a file that are whole; 0 where it has just got its final name."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK), b""))
    return 0


def _size(path: Path) -> int:
    """Bytes of a file; 0 of a folder, and of what is gone meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size if path.is_file() else 0
    return 0


def _rate(run: Path, iteration: int, stage: Stage, done: int) -> float | None:
    """Prompts or steps per second since the stage began."""
    if not (run / PROGRESS).exists():
        return None
    begun = read_json(run / PROGRESS)
    seconds = time.time() - begun["started"]
    if (begun["iteration"], begun["stage"]) != (iteration, stage.name) or done <= begun["done"] or seconds <= 0:
        return None
    return (done - begun["done"]) / seconds


def _started_servers(run: Path) -> list[str]:
    """Servers that the run has started, and whether they are there."""
    record = run / "servers" / "servers.json"
    processes = read_json(record) if record.exists() else []
    return [f"process {pid}: {'running' if psutil.pid_exists(pid) else 'gone'}" for pid, _ in processes]


def _last_warnings(run: Path) -> list[str]:
    path = run / WARNINGS
    return path.read_text(encoding="utf-8").splitlines()[-_NUM_WARNINGS:] if path.exists() else []


def duration(seconds: float) -> str:
    """A time for a person."""
    if seconds < 60:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
