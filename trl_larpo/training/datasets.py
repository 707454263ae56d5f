"""Loads datasets from files, folders, URLs and the hub."""

import glob
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ..errors import ConfigError, DataError
from ..storage import write_text
from ..waiting import wait_for_all

_ROWS_IN_MEMORY = 500

_FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_splits(path: str, config_name: str | None = None, streaming: bool = False) -> Mapping[str, Any]:
    """
    Loads a dataset from a file, a folder or the hub.

    Args:
        path: A JSONL, JSON, Parquet or CSV file, also as a URL of fsspec's (s3://, gs://, https://, ...); a folder of
            such files or one written by `save_to_disk`; or a hub id.
        config_name: Configuration of a hub dataset.
        streaming: Read rows as they are needed, without loading all first.

    Returns:
        Datasets by the name of their split. A single file or dataset is the split `"train"`.

    Raises:
        DataError: If the file is missing, of an unknown kind, or cannot be read.
    """
    if "://" in path:
        return _load_url(path, streaming)
    local = Path(path).expanduser()
    if not local.exists() and (path.startswith((".", "/", "~")) or local.suffix in _FILE_BUILDERS):
        raise DataError(f"There is no file or folder {path!r}.")
    if local.is_file() and local.suffix not in _FILE_BUILDERS:
        raise DataError(f"{path!r} is none of the kinds that can be read: {', '.join(_FILE_BUILDERS)}.")
    if local.is_file() and not local.stat().st_size:
        raise DataError(f"{path!r} is empty.")
    if local.is_file() and local.suffix != ".parquet" and not streaming:
        _check_encoding(local)
    try:
        if local.is_file():
            builder = _FILE_BUILDERS[local.suffix]
            return load_dataset(builder, data_files={"train": glob.escape(str(local))}, streaming=streaming)
        if local.is_dir() and any((local / name).exists() for name in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(str(local))
            return {"train": saved} if isinstance(saved, Dataset) else saved
        return load_dataset(str(local) if local.is_dir() else path, name=config_name, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{path!r} cannot be read: {cause}") from error


def pick_split(splits: Mapping[str, Any], name: str, option: str) -> Any:
    """
    Args:
        splits: From [`load_splits`].
        name: Of the split.
        option: What names it.

    Raises:
        ConfigError: If there is no such split.
    """
    if name not in splits:
        raise ConfigError(f"`{option}` is {name!r}, but the data has only: {', '.join(splits)}.")
    return splits[name]


def _check_encoding(path: Path) -> None:
    """
    Raises:
        DataError: If a text file is not in UTF-8; names the line. Arrow says so where a row is read, and not of which.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} line {number} is not UTF-8: byte 0x{line[error.start]:02x} at place {error.start}. "
                    f"Convert the file, e.g. from Latin-1: iconv -f latin1 -t utf-8 {path}"
                ) from None


def _load_url(url: str, streaming: bool) -> Mapping[str, Any]:
    builder = _FILE_BUILDERS.get(Path(url.split("?")[0]).suffix)
    if builder is None:
        raise DataError(f"{url!r} is none of the kinds that can be read: {', '.join(_FILE_BUILDERS)}.")
    try:
        return load_dataset(builder, data_files={"train": url}, streaming=streaming)
    except Exception as error:  # of any protocol's package
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{url!r} cannot be read: {cause}") from error


def dataset_on_disk(rows: Callable[[], Iterable[dict[str, Any]]], folder: Path) -> Dataset:
    """
    A dataset of rows that are never in memory together, the same for all processes, with one cache.

    Where an earlier process was killed and has left the same rows, they stay, and with them what datasets keeps in its
    cache beside them, such as their tokens. Other rows delete both.

    Args:
        rows: Gives the rows, which have the same columns; called up to twice, in the main process.
        folder: Where the dataset is kept.
    """
    path, name = folder / "rows.arrow", folder / "rows.hash"
    if PartialState().is_main_process:
        # Of a column that is empty in the first rows Arrow does not know the type, and messages may have further keys
        schema, content = pa.schema([]), hashlib.blake2b()
        for batch in _batches(rows()):
            table = pa.Table.from_pylist(batch)
            schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
            content.update(table.schema.serialize())
            for part in table.to_batches():
                content.update(part.serialize())
        if not _has_kept(folder, content.hexdigest()):
            name.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)  # on NFS, files that a process holds open cannot be deleted
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for batch in _batches(rows()):
                    writer.write_table(pa.Table.from_pylist(batch, schema))
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            write_text(name, content.hexdigest())
    wait_for_all()
    return Dataset.from_file(str(path))


def _has_kept(folder: Path, content: str) -> bool:
    """Whether a folder holds rows with this hash, and all files in it are whole; deletes those of a killed process."""
    name = folder / "rows.hash"
    if not name.is_file() or name.read_text(encoding="utf-8") != content:
        return False
    try:
        for path in folder.iterdir():
            if path.suffix == ".arrow":
                with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                    for _ in reader:
                        pass
                    if file.tell() != file.size():  # zeros, which are all that a loss of power has left of it
                        return False
            elif path != name:
                path.unlink()
    except (pa.ArrowException, OSError):
        return False
    return (folder / "rows.arrow").exists()


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, _ROWS_IN_MEMORY)):
        yield batch


def has_images(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows carry an `image` or `images`, as in TRL's vision datasets."""
    return not {"image", "images"}.isdisjoint(column_names(dataset))


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a dataset, looked up in its first row where a stream does not know them."""
    columns = dataset.column_names
    return list(next(iter(dataset), {})) if columns is None else columns


def evaluation_sets(eval_dataset) -> dict[str, Dataset | IterableDataset]:
    """
    The datasets that a trainer evaluates on.

    Args:
        eval_dataset: As the trainer is given it: a dataset, datasets by name, or `None`.

    Returns:
        What messages call each → the dataset.
    """
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}
