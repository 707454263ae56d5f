"""Loads datasets from files, folders, URLs and the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ..errors import DataError

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
    try:
        if local.is_file():
            builder = _FILE_BUILDERS[local.suffix]
            return load_dataset(builder, data_files={"train": str(local)}, streaming=streaming)
        if local.is_dir() and any((local / name).exists() for name in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(str(local))
            return {"train": saved} if isinstance(saved, Dataset) else saved
        return load_dataset(path, name=config_name, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{path!r} cannot be read: {cause}") from error


def _load_url(url: str, streaming: bool) -> Mapping[str, Any]:
    builder = _FILE_BUILDERS.get(Path(url.split("?")[0]).suffix)
    if builder is None:
        raise DataError(f"{url!r} is none of the kinds that can be read: {', '.join(_FILE_BUILDERS)}.")
    try:
        return load_dataset(builder, data_files={"train": url}, streaming=streaming)
    except Exception as error:  # of any protocol's package
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{url!r} cannot be read: {cause}") from error


def has_images(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows carry an `image` or `images`, as in TRL's vision datasets."""
    return not {"image", "images"}.isdisjoint(column_names(dataset))


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a dataset, looked up in its first row where a stream does not know them."""
    columns = dataset.column_names
    return list(next(iter(dataset), {})) if columns is None else columns
