"""Prompts that a step could not do: they are kept in a file beside its output, and the step goes on without them."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, LarPOError
from .options import CheckedOptions, option
from .prompts import Prompt, Row
from .storage import StoredRows, append_jsonl

_SUFFIX = ".set_aside.jsonl"

_ALWAYS_ALLOWED = 3
"""So many prompts may fail whatever their share: of ten prompts, one is a tenth."""


@dataclass
class SetAsideOptions(CheckedOptions):
    """How much may fail."""

    max_failed_share: float = option(
        0.05,
        "Share of the prompts that may fail in a stage, e.g. too long for a server, or a reward that raises an error. "
        "They are set aside and named at the end. `larpo generate` and `larpo reward` try them again when the same "
        "command runs again, `larpo run` only if the stage was not done. With more of them the stage ends. 0: the "
        "first one ends it.",
    )

    def check_set_aside(self) -> None:
        if not 0 <= self.max_failed_share < 1:
            raise ConfigError(f"`max_failed_share` is {self.max_failed_share}; it must be from 0 to below 1.")


class SetAside:
    """
    The prompts that a step set aside.

    Args:
        output: The step's output; they are kept beside it, in `<name>.set_aside.jsonl`.
        num_prompts: All prompts of the step.
        max_share: Share of them that may fail.
        done: What could not be done, e.g. "sampled".
        process: Number of the process; each has a file of its own.
    """

    def __init__(self, output: Path, num_prompts: int, max_share: float, done: str, process: int = 0):
        self.output, self.path = output, set_aside_path(output, process)
        self.limit = allowed_failures(num_prompts, max_share)
        self.num_prompts, self.done = num_prompts, done
        self.count = 0
        self.path.unlink(missing_ok=True)  # what failed last time gets another try
        if process == 0:  # also that of processes that there are no more
            for path in output.parent.glob(f"{glob.escape(output.stem)}.process_*{_SUFFIX}"):
                path.unlink(missing_ok=True)

    def add(self, prompt: Prompt, reason: str) -> None:
        """
        Raises:
            LarPOError: If too many have failed.
        """
        self.count += 1
        row = {"prompt_id": prompt.id, "prompt": prompt.text, "reason": reason}
        append_jsonl(self.path, [row])
        if self._is_too_many(self.count):
            raise LarPOError(self._message(self.count, row, self.path))

    def too_many_together(self) -> str | None:
        """What ends the step, if all processes together have set aside too many; once all have done their share."""
        rows = set_aside_in(self.output.parent).get(self.output.stem, [])
        if not self._is_too_many(len(rows)):
            return None
        return self._message(len(rows), rows[-1], set_aside_files(self.output))

    def _is_too_many(self, count: int) -> bool:
        return count > self.limit or count == self.num_prompts > 0

    def _message(self, count: int, last: Row, files: Path) -> str:
        return (
            f"{count} of {self.num_prompts} prompts could not be {self.done}, more than `max_failed_share` allows; "
            f"{files} names them. The last one, {last['prompt'][:60]!r}: {last['reason']} What was done so far is "
            "kept: fix the cause and run the same command again."
        )


def allowed_failures(num_prompts: int, max_share: float) -> float:
    """How many of the prompts of a step may fail."""
    return max(_ALWAYS_ALLOWED, max_share * num_prompts) if max_share > 0 else 0


def set_aside_path(output: Path, process: int = 0) -> Path:
    """Where the prompts are that an output lacks."""
    return output.with_name(f"{output.stem}{_SUFFIX}" if process == 0 else f"{output.stem}.process_{process}{_SUFFIX}")


def set_aside_files(output: Path) -> Path:
    """The same of all processes, as a pattern where several have set aside prompts."""
    files = [path for path in output.parent.glob(f"*{_SUFFIX}") if _name_of(path) == output.stem]
    return files[0] if len(files) == 1 else output.with_name(f"{output.stem}.*{_SUFFIX[1:]}")


def _name_of(path: Path) -> str:
    """Of the output that lacks what is in a file."""
    return re.sub(r"\.process_\d+$", "", path.name.removesuffix(_SUFFIX))


def set_aside_in(folder: Path) -> dict[str, list[Row]]:
    """What is set aside in a folder, by the name of the output that lacks it."""
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        found.setdefault(_name_of(path), []).extend(StoredRows([path], growing=True))
    return found
