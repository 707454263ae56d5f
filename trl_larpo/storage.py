"""
Crash-safe file writing: JSON lines that are appended to, and files that appear only when they are whole.

A reader finds either nothing or all of what was written. What is appended counts once its line has ended.
"""

import contextlib
import errno
import glob
import json
import logging
import os
import re
import shutil
import time
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from .errors import ConfigError, DataError, LarPOError

Row = dict[str, Any]

logger = logging.getLogger(__name__)


_PARTIAL = ".partial"

_BLOCK = 2**16  # bytes

_TIME_TO_SYNC = 0.5  # seconds from one sync of a growing file to the next; more where it takes longer than a twentieth

_LONE_SURROGATES = "backslashreplace"  # makes of them the escapes that JSON has for them


def partial_path(path: Path) -> Path:
    """Where `path` is while it is not whole."""
    return path.with_name(path.name + _PARTIAL)


def read_jsonl(path: str | Path) -> list[Row]:
    """
    Rows of a file of JSON lines.

    Raises:
        DataError: Names the line that cannot be read.
    """
    return list(iter_jsonl(path))


def iter_jsonl(path: str | Path) -> Iterator[Row]:
    """As [`read_jsonl`], one row at a time."""
    with open_file(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse(line, path, number)


def _parse(line: bytes, path: str | Path, number: int) -> Row:
    try:
        # Some editors write a mark of the encoding in front of a file
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except ValueError as error:  # no JSON, or no text
        damage = "; it holds zero bytes, as after a loss of power" if b"\0" in line else ""
        raise DataError(f"{path} line {number} is not JSON ({getattr(error, 'msg', error)}{damage}).") from None
    if not isinstance(row, dict):
        raise DataError(f"{path} line {number} is {type(row).__name__}, not an object with columns.")
    return row


def whole_rows(path: Path, damaged: list[str]) -> Iterator[Row]:
    """
    Rows of a file of JSON lines without those that are damaged: by a kill, a full or broken disk, an interrupted copy.

    Args:
        path: The file.
        damaged: What is wrong with each of the others is added to this.
    """
    with open_file(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield _parse(line, path, number)
            except DataError as error:
                damaged.append(str(error))


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Writes all rows, or nothing."""
    _write(path, map(_as_line, rows))


class StoredRows(Sequence[Row]):
    """
    Rows of files of JSON lines, each read when it is asked for. In memory are only their places and their keys.

    Args:
        paths: The files, which must stay as they are.
        key: A column that all rows have, whose values are kept.
        growing: Whether the files may end with a line that is not finished, and hold damaged ones. They are left out.

    Attributes:
        keys: The values of the column `key` of all rows; empty without one.
    """

    def __init__(self, paths: list[Path], key: str | None = None, growing: bool = False):
        self.keys: list[Any] = []
        self._paths = paths
        self._starts, self._lengths, self._files = array("q"), array("q"), array("H")  # of each row
        self._numbers = array("q")  # of each row's line, for messages
        # Files of ours begin each line with the key: nothing else of it is read now
        first = re.compile(rb'\{"%b": "([^"\\]*)"[,}]' % (key or "").encode())
        damaged: list[str] = []
        for file_number, path in enumerate(paths):
            start = 0
            with open_file(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip() and not (growing and self._is_damaged(line, path, number, damaged)):
                        for kept, value in ((self._starts, start), (self._lengths, len(line)),
                                            (self._files, file_number), (self._numbers, number)):  # fmt: skip
                            kept.append(value)
                        if key is not None:
                            match = first.match(line)
                            self.keys.append(match[1].decode() if match else self._value(line, path, number, key))
                    start += len(line)
        if damaged:
            logger.warning(f"{len(damaged)} damaged lines are left out, and what they held is done again: {damaged[0]}")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        path = self._paths[self._files[place]]
        with open(path, "rb") as file:
            file.seek(self._starts[place])
            return _parse(file.read(self._lengths[place]), path, self._numbers[place])

    def _is_damaged(self, line: bytes, path: Path, number: int, damaged: list[str]) -> bool:
        if not line.endswith(b"\n"):  # it may still be written to
            return True
        try:
            _parse(line, path, number)
        except DataError as error:
            damaged.append(str(error))
            return True
        return False

    @staticmethod
    def _value(line: bytes, path: Path, number: int, key: str) -> Any:
        row = _parse(line, path, number)
        if key not in row:
            raise DataError(f"{path} line {number} has no column `{key}`.")
        return row[key]


def read_json(path: Path) -> Any:
    """
    Raises:
        DataError: Names the line if the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not JSON ({error.msg}): the file is damaged.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): the file is damaged.") from None


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it


def rows_as_written(path: Path) -> list[Row] | None:
    """
    Rows of a JSON file with the values that it has; `None` if it is another file.

    `datasets` would make times of texts that are dates, and of large integers floats that have fewer digits.
    """
    if path.suffix not in (".jsonl", ".json") or not path.is_file():
        return None
    for read in (read_jsonl, read_json):
        with contextlib.suppress(DataError):  # which `datasets` reads, or refuses with its own words
            rows = read(path)
            if rows and isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
                return rows
    return None


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Names and values of a YAML file.

    Raises:
        DataError: Names the line that cannot be read.
    """
    with open_file(path, "rb") as file:
        try:
            found = yaml.load(file, _LOADER)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} line 1: there are no names and values; the file is empty or damaged.")
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes the value as JSON that a person can read, or nothing."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes all of the text, or nothing."""
    _write(path, [text])


def _write(path: Path, texts: Iterable[str]) -> None:
    partial = partial_path(path)
    with saving_to(path), open(partial, "w", encoding="utf-8", errors=_LONE_SURROGATES, newline="\n") as file:
        file.writelines(texts)
        file.flush()
        os.fsync(file.fileno())
    finish(partial, path)


def append_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file; they are safe when this returns."""
    with saving_to(path), open(path, "ab") as file:
        file.write(_as_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def finish(partial: Path, path: Path) -> None:
    """Gives a whole file or folder its name."""
    os.replace(partial, path)
    with contextlib.suppress(OSError):  # so that the name, too, survives a loss of power
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(partial: Path, folder: Path) -> None:
    """Gives a whole folder its name, in place of what may be there from an earlier attempt."""
    if folder.exists():
        shutil.rmtree(folder)
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
    finish(partial, folder)


class GrowingFile:
    """
    A file of JSON lines to which rows are added as they are computed, and which gets its name when it is whole.

    Rows that an earlier, killed process added are found when it is opened; a line that was not finished is cut off.

    Args:
        path: Name of the whole file.
        share: Number of the process. Each adds to a share of its own.
        key: A column whose values are kept in memory.

    Attributes:
        rows: All rows of all shares, as they were when it was opened.
    """

    def __init__(self, path: Path, share: int = 0, key: str | None = None):
        self.path, self.partial = path, path.with_name(f"{path.name}{_PARTIAL}-{share}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.exists():
            _cut_unfinished_line(self.partial)
        self.rows = StoredRows(partial_files(path), key, growing=True)
        self._opened: IO[bytes] | None = None  # stays open: to close it takes as long as a sync on network disks
        self._next_sync = 0.0

    def add(self, rows: list[Row]) -> None:
        """
        Appends rows. When this returns, other processes on this machine find them, and they survive a kill. A loss of
        power may cost what was added after the last sync.
        """
        with saving_to(self.partial):
            if self._opened is None:
                self._opened = open(self.partial, "ab")  # noqa: SIM115
                weakref.finalize(self, _close, self._opened)
            self._opened.write(_as_lines(rows))
            self._opened.flush()
        if time.monotonic() >= self._next_sync:
            self.sync()

    def sync(self) -> None:
        """Makes what was added safe from a loss of power, and visible to other machines."""
        if self._opened is None:
            return
        began = time.monotonic()
        with saving_to(self.partial):
            os.fsync(self._opened.fileno())
        now = time.monotonic()
        self._next_sync = now + max(_TIME_TO_SYNC, 20 * (now - began))

    @staticmethod
    def finish(path: Path, rows: Iterable[Row]) -> None:
        """Writes the whole file: all rows in their final order and form. It is not opened for that, which reads it."""
        write_jsonl(path, rows)
        for partial in partial_files(path):
            partial.unlink()


def _close(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # the disk is full, which was said
        file.close()


def partial_files(path: Path) -> list[Path]:
    """What processes have added so far to a [`GrowingFile`]."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}{_PARTIAL}-*"))


def reopen(path: Path, rows: Iterable[Row]) -> None:
    """
    Makes a whole file one that grows again.

    Args:
        path: The file.
        rows: What to keep of it.
    """
    write_jsonl(path.with_name(f"{path.name}{_PARTIAL}-reopened"), rows)
    path.unlink()


def _cut_unfinished_line(path: Path) -> None:
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:  # from the end, a block at a time
            start = max(0, end - _BLOCK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        file.truncate(end)


@contextlib.contextmanager
def saving_to(path: Path) -> Iterator[None]:
    """Says what to do where the disk is full or the folder may not be written to."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LarPOError(
                f"The disk is full: {path} cannot be written. Free some space and run the same command again; what was "
                "saved so far is kept."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS):
            raise LarPOError(f"{path} cannot be written: {error.strerror}.") from error
        raise


def make_folder(folder: Path, option: str) -> None:
    """
    Makes a folder that an option names, unless it is there.

    Raises:
        ConfigError: If it is a file, or would be in one.
    """
    check_folder(folder, option)
    with saving_to(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_folder(folder: Path, option: str) -> None:
    """
    Raises:
        ConfigError: If a folder that an option names is a file, or would be in one.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"`{option}` is {str(folder)!r}, but {path} is a file, not a folder.")


def open_file(path: str | Path, mode: str = "r"):
    """Opens a file for reading; an error says what is missing."""
    try:
        return open(path, mode, encoding=None if "b" in mode else "utf-8")
    except FileNotFoundError:
        raise DataError(f"There is no file {str(path)!r}.") from None
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a folder, not a file.") from None


def _as_lines(rows: Iterable[Row]) -> bytes:
    return "".join(map(_as_line, rows)).encode("utf-8", _LONE_SURROGATES)


def _as_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
