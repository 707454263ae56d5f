"""Files that a command writes and resumes: locked while it runs, and never written over with what differs."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .errors import ConfigError
from .locks import exclusive_lock
from .prompts import Row
from .set_aside import set_aside_in
from .settings import keep_settings
from .storage import partial_files, reopen, whole_rows
from .waiting import wait_for_all

_MAX_NAMED = 3


@contextlib.contextmanager
def resumable_output(
    output: Path, settings: dict[str, Any], paths: Sequence[str] = (), inputs: Iterable[str] = ()
) -> Iterator[None]:
    """
    Keeps other processes from writing an output, and what was made with other settings from being taken for it.

    The settings are kept beside the output, in `<name>.settings.json`.

    Args:
        output: The file that the option `output` names.
        settings: What its content depends on, by option.
        paths: Settings that hold paths, which are compared by content.
        inputs: Settings that hold files that the command reads.

    Raises:
        LarPOError: If it is one of the inputs, if another process writes it, if it was made with other settings, or if
            there is a file of which nothing is known.
    """
    for name in inputs:
        check_output(output, name, settings[name])
    if not PartialState().is_main_process:  # of several, the first one speaks
        yield
        return
    with exclusive_lock(output.parent, output.name, "output"):
        record = output.with_name(f"{output.name}.settings.json")
        if not output.exists() and not partial_files(output):
            record.unlink(missing_ok=True)  # of what was deleted
        elif not record.exists():
            raise ConfigError(
                f"`output`: there is {str(output)!r} already, or a part of it, and no {record.name} beside it says how "
                "it was made. Take another `output`, or delete the file."
            )
        is_whole = output.exists() and not set_aside_in(output.parent).get(output.stem)
        keep_settings(record, settings, "`output`", paths, made=output, is_whole=is_whole)
        yield


def check_output(output: Path, name: str, inputs: str | list[str] | None) -> None:
    """
    Raises:
        ConfigError: If the output is a folder, has a name by which no command would read it, or is one of the files
            that an option names: it would be lost.
    """
    if output.is_dir():
        raise ConfigError(f"`output` is {str(output)!r}, which is a folder; name a file in it.")
    if output.suffix not in (".jsonl", ".json"):
        raise ConfigError(f"`output` is {str(output)!r}; it is written as JSON lines, so let its name end in .jsonl.")
    for path in [inputs] if isinstance(inputs, str) else inputs or []:
        if os.path.realpath(os.path.expanduser(path)) == os.path.realpath(output):
            raise ConfigError(f"`output` is {str(output)!r}, the file of `{name}`, which would be lost. Take another.")


def continue_output(
    output: Path, ids: Sequence[str], name_of: Callable[[int], str], as_grown: Callable[[Row], Row] = lambda row: row
) -> bool:
    """
    Makes an output that lacks prompts, or of which lines are damaged, one that grows again, and says so.

    Args:
        output: The file. If there is none, nothing happens.
        ids: Names of all prompts that it should have.
        name_of: What a prompt at a place among them is called in a message.
        as_grown: What a row was while the file grew.

    Returns:
        Whether it is whole now.

    Raises:
        ConfigError: If it has prompts that are not asked for, and would be lost.
    """
    if PartialState().is_main_process and output.exists():
        damaged: list[str] = []
        found = {row.get("prompt_id") for row in whole_rows(output, damaged)}
        if others := found - set(ids):
            raise ConfigError(
                f"{output} has {len(others)} prompts that are not asked for. Take another `output`, or delete the file."
            )
        missing = [place for place, name in enumerate(ids) if name not in found]
        if damaged:
            print(f"{output} has {len(damaged)} damaged lines, which are dropped. {damaged[0]}")
        if missing:
            named = ", ".join(repr(name_of(place)[:60]) for place in itertools.islice(missing, _MAX_NAMED))
            more = ", ..." if len(missing) > _MAX_NAMED else ""
            print(f"{output} lacks {len(missing)} of {len(ids)} prompts, which are done now: {named}{more}")
        if missing or damaged:
            reopen(output, map(as_grown, whole_rows(output, [])))
        else:
            print(
                f"{output} was complete already; nothing was computed. Delete it, or take another `output`, to compute "
                "it again."
            )
    wait_for_all()
    is_whole = output.exists()
    PartialState().wait_for_everyone()
    return is_whole
