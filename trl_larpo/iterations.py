"""The folders of a run's iterations."""

import re
from pathlib import Path


def iteration_folder(run: Path, number: int) -> Path:
    """The folder of an iteration, 0 being the initial model."""
    return run / f"iteration_{number}"


def iteration_folders(run: Path) -> dict[int, Path]:
    """The folders that a run has, by number and in order. Others, such as copies under similar names, are left out."""
    found = (re.fullmatch(r"iteration_(0|[1-9][0-9]*)", path.name) for path in run.iterdir() if path.is_dir())
    return {number: iteration_folder(run, number) for number in sorted(int(match[1]) for match in found if match)}
