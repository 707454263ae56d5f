"""
What files were made with: settings are kept beside them, and compared when the same command runs again.

Paths are compared by what they hold: a folder that was moved, a trailing slash or another spelling of a path changes
nothing.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .redaction import hide_secrets
from .storage import read_json, write_json

logger = logging.getLogger(__name__)

_PRINTS = "fingerprints"  # among the settings: what the paths in them hold

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")  # as large as a disk allows: read in part

_OF_MODELS_AND_DATA = (*_WEIGHTS, ".json", ".jsonl", ".parquet", ".csv", ".model", ".jinja", ".txt", ".arrow")

_BLOCK = 2**20  # bytes
_NUM_PARTS, _PART = 64, 2**16  # what is read of weights: parts, and bytes of each

_RANKER = "pairwise:"  # in front of the path of a ranker

_JUDGES = ("reward_funcs", "best_of_n_reward")  # settings that name functions, too

_SOURCE = "source "  # in front of the fingerprint of a function's file


def keep_settings(
    path: Path,
    settings: dict[str, Any],
    output: str,
    paths: Sequence[str] = (),
    made: Path | None = None,
    is_whole: bool = True,
) -> None:
    """
    Writes how files were made, or compares with how they were made.

    Args:
        path: A JSON file.
        settings: By name.
        output: The option that names the files' place.
        paths: Names of settings that hold paths, which are compared by content.
        made: What is made with them. `None`: the folder of `path`.
        is_whole: Whether it is whole. If not, the file of a reward function may change: an error may have been fixed.

    Raises:
        ConfigError: If a setting has changed, so that what is there must not be taken for what is asked for.
    """
    settings = hide_secrets(settings)
    prints = fingerprints(settings, paths)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings | ({_PRINTS: prints} if paths else {}))
        return
    before = read_json(path)
    if not isinstance(before, dict):
        raise ConfigError(f"{path} does not hold settings. Delete it, and take another {output}.")
    held, where = before.get(_PRINTS, {}), repr(str(made or path.parent))
    sources = changed_sources(held, prints)
    for function, file in sources.items():
        change = f"{file}, which holds the reward {function!r}, has changed since {where} was made."
        if is_whole:
            raise ConfigError(f"{change} Undo the change, take another {output}, or delete {where}.")
        logger.warning(f"{change} Rewards that were given before are kept. If they are wrong, take another {output}.")
    for name, was in changed_settings(before, settings, held | dict.fromkeys(sources), prints):
        raise ConfigError(
            f"{describe_change(name, was, settings[name], where)} Undo the change, or take another {output}."
        )
    if sources:
        write_json(path, before | {_PRINTS: prints})


def changed_settings(
    before: dict[str, Any], now: dict[str, Any], prints_before: dict[str, str], prints_now: dict[str, str]
) -> Iterator[tuple[str, Any]]:
    """
    Settings that differ, with what they were.

    Args:
        before: Settings by name.
        now: The same; only these names are compared.
        prints_before: What paths held then, from [`fingerprints`].
        prints_now: What they hold now.
    """
    for name, value in now.items():
        was = before.get(name)
        if not _is_same(was, value, prints_before, prints_now):
            yield name, was


def describe_change(name: str, was: Any, now: Any, made: str) -> str:
    """A sentence about a setting that has changed, or that names a file that has."""
    if was != now:
        return f"`{name}` is {now!r}, but {made} was made with {was!r}."
    return f"`{name}` is {now!r}, and what it holds has changed since {made} was made."


def changed_sources(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Functions whose source differs between two results of [`fingerprints`], and the file of each."""
    changed = (name for name, held in now.items() if held.startswith(_SOURCE) and before.get(name, held) != held)
    return {name: _source_of(name) or "" for name in changed}


def fingerprints(settings: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """What the paths and the functions' files hold that some settings name, by path. Hub ids and URLs have no entry."""
    found: dict[str, str] = {}
    for name, path in _named_in(settings, names):
        is_path = name not in _JUDGES or _is_model(path)
        place = path if is_path else _source_of(path)
        held = None if place is None else fingerprint(place)
        if held is not None:
            found[path] = held if is_path else _SOURCE + held
    return found


def check_is_outside(output: Path, option: str, settings: dict[str, Any], names: Iterable[str]) -> None:
    """
    Checks that no output changes what the paths hold that some settings name.

    Args:
        output: Where files will be written.
        option: The option that names it.
        settings: By name.
        names: Of the settings that hold paths.

    Raises:
        ConfigError: If it is in a folder that one of them names.
    """
    for name, path in _named_in(settings, names):
        is_folder = (name not in _JUDGES or _is_model(path)) and _place(path).is_dir()
        if is_folder and output.resolve().is_relative_to(_place(path).resolve()):
            raise ConfigError(
                f"`{option}` is {str(output)!r}, inside the folder of `{name}`, {path!r}. What is written there would "
                f"change that folder, and the same command could not resume. Take another `{option}`."
            )


def _named_in(settings: dict[str, Any], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names of settings and the paths, hub ids, ... in them."""
    for name in names:
        value: Any = settings.get(name)
        for path in value if isinstance(value, list) else [value]:
            if path:
                yield name, path


def _source_of(path: str) -> str | None:
    """The file of a function `package.module:function`; `None` if it has none, or the path is no function."""
    module, _, function = path.removeprefix(_RANKER).partition(":")
    try:
        spec = importlib.util.find_spec(module) if function else None
    except Exception:  # a package of the user's can raise anything; reported where it is imported
        return None
    return None if spec is None else spec.origin


def _is_model(path: str) -> bool:
    """Whether a name is the folder of a model: a folder with data may be called as a reward is, e.g. gsm8k."""
    return any((_place(path) / name).is_file() for name in ("config.json", "adapter_config.json"))


def _place(path: str) -> Path:
    return Path(os.path.expanduser(path.removeprefix(_RANKER)))


def fingerprint(path: str) -> str | None:
    """
    A name for what a local file or folder holds, wherever it lies: 16 hexadecimal digits.

    Of weights it reads the size and evenly spaced parts, so that a model of many gigabytes takes no minutes. Hidden
    files, and those that say nothing of a model or a dataset (a README), do not count.

    Returns:
        `None` for a hub id, a URL, a function, and what is not there.
    """
    place = _place(path)
    try:
        if place.is_file():
            files = [place]
        elif place.is_dir():
            files = sorted(x for x in place.rglob("*") if x.suffix in _OF_MODELS_AND_DATA and _is_visible(x, place))
        else:
            return None
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{'' if file == place else file.relative_to(place)}\0{file.stat().st_size}\0".encode())
            _update(digest, file)
    except OSError:  # unreadable: reported where it is needed
        return None
    return digest.hexdigest()[:16]


def _is_visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _update(digest, file: Path) -> None:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        if file.suffix not in _WEIGHTS or size <= _NUM_PARTS * _PART:
            for block in iter(lambda: opened.read(_BLOCK), b""):
                digest.update(block)
            return
        for number in range(_NUM_PARTS):
            opened.seek((size - _PART) * number // (_NUM_PARTS - 1))
            digest.update(opened.read(_PART))


def _is_same(was: Any, now: Any, prints_before: dict[str, str], prints_now: dict[str, str]) -> bool:
    if isinstance(was, list) and isinstance(now, list):
        pairs = zip(was, now, strict=False)
        return len(was) == len(now) and all(_is_same(a, b, prints_before, prints_now) for a, b in pairs)
    if not (isinstance(was, str) and isinstance(now, str)):
        return was == now
    held, holds = prints_before.get(was), prints_now.get(now)
    if held is not None and holds is not None:
        if holds.startswith(_SOURCE):  # other functions may be in the same file
            return was == now and held == holds
        return held == holds and was.startswith(_RANKER) == now.startswith(_RANKER)
    return was == now or (held is holds is None and was.rstrip("/") == now.rstrip("/"))
