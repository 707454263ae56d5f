"""
A copy of a run's folder in an object store, or wherever fsspec reaches: s3://, gs://, hf://, file://, ...

Stages append and rename, which object stores cannot do; so a run works in a folder of the machine, and what is whole
is copied after each stage. On a machine whose folder is empty, the run is fetched first and resumes there.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from ..errors import ConfigError, DataError
from ..redaction import hide_secrets
from ..storage import finish, partial_path, read_json, write_json

_MANIFEST = "mirror.json"  # names of all files that are whole

_COPIED = ".mirrored.json"  # what this machine has copied

_SCRATCH = ("trainer", "scoring", "servers", "tracking", "plots")  # of no use on another machine, or made again


class Mirror:
    """
    Keeps a copy of a folder.

    Args:
        folder: The run's folder.
        url: Where the copy is. Credentials come from where the protocol's package looks for them, never from the URL.

    Raises:
        ConfigError: If the protocol is unknown, or its package is missing.
    """

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"`mirror`: {url!r} cannot be used: {error}") from None
        self._copied: dict[str, tuple[int, int]] | None = None  # name → size and time of change when it was copied

    def fetch(self) -> int:
        """Fetches the run if the folder has none. Returns the number of files."""
        manifest = f"{self.root}/{_MANIFEST}"
        if (self.folder / "run.yaml").exists() or not self.files.exists(manifest):
            return 0
        names = json.loads(self.files.cat_file(manifest))
        if outside := [name for name in names if not _is_inside(self.folder, name)]:
            raise ConfigError(f"`mirror`: {manifest} names {outside[0]!r}, which is not in the folder of the run.")
        self._copied = {}
        for name in sorted(names, key=lambda name: name == "run.yaml"):  # which marks a folder as a run, last
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(f"{self.root}/{name}", str(partial_path(target)))
            finish(partial_path(target), target)
            self._copied[name] = _state(target)
        self._remember()
        return len(names)

    def push(self) -> int:
        """Copies what is new or has changed, and is whole; forgets what is gone. Returns the number of files copied."""
        if self._copied is None:
            self._copied = self._recall()
        whole = dict(self._whole_files())
        changed = {name: path for name, path in whole.items() if self._copied.get(name) != _state(path)}
        for name, path in changed.items():
            state = _state(path)
            self.files.makedirs(os.path.dirname(f"{self.root}/{name}"), exist_ok=True)
            self.files.put_file(str(path), f"{self.root}/{name}")
            self._copied[name] = state
        kept = {name: state for name, state in self._copied.items() if name in whole}
        if changed or len(kept) < len(self._copied):
            # Last: what is not named here was not copied to its end, or has been deleted, and is not fetched
            self.files.pipe_file(f"{self.root}/{_MANIFEST}", json.dumps(sorted(kept), indent=1).encode())
            self._copied = kept
            self._remember()
        return len(changed)

    def _remember(self) -> None:
        """So that a restart does not copy all of it again."""
        write_json(self.folder / _COPIED, {"url": hide_secrets(self.url), "copied": self._copied})

    def _recall(self) -> dict[str, tuple[int, int]]:
        """What earlier processes have copied, as far as it is still there."""
        try:
            known = read_json(self.folder / _COPIED)
            in_store = set(json.loads(self.files.cat_file(f"{self.root}/{_MANIFEST}")))
        except (OSError, DataError, ValueError):  # nothing was copied yet, or something is damaged: copied again
            return {}
        if known["url"] != hide_secrets(self.url):
            return {}
        return {name: tuple(state) for name, state in known["copied"].items() if name in in_store}

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
