"""
A copy of a run's folder in an object store, or wherever fsspec reaches: s3://, gs://, hf://, file://, ...

Stages append and rename, which object stores cannot do; so a run works in a folder of the machine, and what is whole
is copied after each stage. On a machine whose folder is empty, the run is fetched first and resumes there.
"""

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from ..errors import ConfigError, DataError
from ..redaction import hide_secrets
from ..storage import finish, partial_path, read_json, write_json

_MANIFEST = "mirror.json"  # names of all files that are whole, and which push has written it

_COPIED = ".mirrored.json"  # what this machine has copied, and its pushes

_SCRATCH = ("trainer", "scoring", "servers", "plots")  # of no use on another machine, or made again


class Mirror:
    """
    Keeps a copy of a folder.

    Args:
        folder: The run's folder.
        url: Where the copy is. Credentials come from where the protocol's package looks for them, never from the URL.

    Attributes:
        lags: Whether the last push has failed.

    Raises:
        ConfigError: If the protocol is unknown, or its package is missing.
    """

    def __init__(self, folder: Path, url: str):
        self.folder, self.url, self.lags = folder, url, False
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"`mirror`: {url!r} cannot be used: {error}") from None
        self._copied: dict[str, tuple[int, int]] | None = None  # name → size and time of change when it was copied
        self._pushes: list[str] = []  # the one in the store is among them: the last one, or one that was broken off

    def fetch(self) -> int:
        """Fetches the run if the folder has none. Returns the number of files."""
        manifest = f"{self.root}/{_MANIFEST}"
        if (self.folder / "run.yaml").exists() or not self.files.exists(manifest):
            return 0
        names, push = self._read_manifest()
        if outside := [name for name in names if not _is_inside(self.folder, name)]:
            raise ConfigError(f"`mirror`: {manifest} names {outside[0]!r}, which is not in the folder of the run.")
        self._copied = {}
        for name in sorted(names, key=lambda name: name == "run.yaml"):  # which marks a folder as a run, last
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(f"{self.root}/{name}", str(partial_path(target)))
            finish(partial_path(target), target)
            self._copied[name] = _state(target)
        self._pushes = [push] if push else []
        self._remember()
        return len(names)

    def check_is_not_newer(self) -> None:
        """
        Checks that a push would overwrite nothing of another machine's.

        Raises:
            ConfigError: If another machine has continued the run since this one copied its files.
        """
        if not self.files.exists(f"{self.root}/{_MANIFEST}"):
            return
        try:
            names, push = self._read_manifest()
        except ValueError:  # damaged: all is copied again
            return
        copied, pushes = self._read_record()
        missing = [name for name in names if name not in copied and not (self.folder / name).exists()]
        # Where pushes are not known on both sides, names alone tell
        if push not in pushes if push and pushes else missing:
            example = f", e.g. {missing[0]}" if missing else ""
            raise ConfigError(
                f"`mirror`: {hide_secrets(self.url)} has newer work of another machine{example}; the run in "
                f"{str(self.folder)!r} would overwrite it. Start with an empty `output_dir` to continue from the "
                "mirror. To continue from this folder, take another `mirror`."
            )

    def push(self) -> int:
        """Copies what is new or has changed, and is whole; forgets what is gone. Returns the number of files copied."""
        if self._copied is None:
            self._copied = self._recall()
            self._pushes = self._read_record()[1]
        whole = dict(self._whole_files())
        changed = {name: path for name, path in whole.items() if self._copied.get(name) != _state(path)}
        for name, path in changed.items():
            state = _state(path)
            self.files.makedirs(os.path.dirname(f"{self.root}/{name}"), exist_ok=True)
            self.files.put_file(str(path), f"{self.root}/{name}")
            self._copied[name] = state
        kept = {name: state for name, state in self._copied.items() if name in whole}
        if changed or len(kept) < len(self._copied):
            push = uuid.uuid4().hex
            self._pushes.append(push)
            self._remember()  # before: if this is killed now, a restart knows the push as its own
            # Last: what is not named here was not copied to its end, or has been deleted, and is not fetched
            manifest = json.dumps({"push": push, "files": sorted(kept)}, indent=1)
            self.files.pipe_file(f"{self.root}/{_MANIFEST}", manifest.encode())
            self._copied, self._pushes = kept, [push]
            self._remember()
        return len(changed)

    def _read_manifest(self) -> tuple[list[str], str | None]:
        """Names of the files in the store, and the push that wrote them."""
        found = json.loads(self.files.cat_file(f"{self.root}/{_MANIFEST}"))
        return (found["files"], found["push"]) if isinstance(found, dict) else (found, None)

    def _remember(self) -> None:
        """So that a restart does not copy all of it again."""
        record = {"url": hide_secrets(self.url), "copied": self._copied, "pushes": self._pushes}
        write_json(self.folder / _COPIED, record)

    def _read_record(self) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """What earlier processes have copied to this store, and their pushes."""
        try:
            known = read_json(self.folder / _COPIED)
        except (OSError, DataError):  # nothing was copied yet, or it is damaged
            return {}, []
        if known["url"] != hide_secrets(self.url):
            return {}, []
        return {name: tuple(state) for name, state in known["copied"].items()}, known.get("pushes", [])

    def _recall(self) -> dict[str, tuple[int, int]]:
        """What earlier processes have copied, as far as it is still there."""
        try:
            in_store = set(self._read_manifest()[0])
        except (OSError, ValueError):  # nothing was copied yet, or it is damaged: copied again
            return {}
        return {name: state for name, state in self._read_record()[0].items() if name in in_store}

    def _whole_files(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            parts = name.split("/")
            is_own = parts[-1] in (".lock", _COPIED) or ".partial" in name or set(parts) & set(_SCRATCH)
            if path.is_file() and not is_own:
                yield name, path


def _is_inside(folder: Path, name: Any) -> bool:
    return isinstance(name, str) and (folder / name).resolve().is_relative_to(folder.resolve())


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
