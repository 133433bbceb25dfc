"""Reads data sets of the `datasets` library, from saved folders or the Hugging Face Hub, as a stream of rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError

PREFIX = "hf:"
# Rows of a part of a saved data set.
SHARD_ROWS = 20_000


def is_dataset(path: str) -> bool:
    """True where `path` is `hf:<name>[:<config>][@<revision>]` or a folder written by `Dataset.save_to_disk`."""
    return path.startswith(PREFIX) or any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def num_shards(path: str) -> int:
    """Returns the number of parts that a data set is read in: the files of one on the Hub, or runs of `SHARD_ROWS`.

    Raises:
        UserError: see `read_dataset`.
    """
    rows = _train_split(path)
    return max(1, rows.num_shards if path.startswith(PREFIX) else -(-len(rows) // SHARD_ROWS))


def read_dataset(path: str, shard: int = 0, count: int = 1) -> Iterator[dict[str, Any]]:
    """Yields the rows of the `train` split (or of the only split, if it has another name), one at a time: of part
    `shard` of `count`. The parts in order hold every row once.

    Raises:
        UserError: there is no such data set, or it has several splits and none is `train`.
    """
    rows = _train_split(path)
    yield from rows.shard(num_shards=count, index=shard, contiguous=True) if count > 1 else rows


def _train_split(path: str) -> Any:
    import datasets

    try:
        if path.startswith(PREFIX):
            repository, _, revision = path.removeprefix(PREFIX).partition("@")
            name, _, config = repository.partition(":")
            if not name:
                raise ValueError("the name is empty")
            loaded = datasets.load_dataset(name, config or None, revision=revision or None, streaming=True)
        else:
            loaded = datasets.load_from_disk(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot be read as a data set ({reason})",
            key=path,
            remedy="Give hf:<name>[:<config>][@<revision>] or a saved folder",
        ) from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if len(splits) > 1 and "train" not in splits:
        raise UserError(
            f"no split 'train' among {', '.join(splits)}",
            key=path,
            remedy="Save the required split as a separate data set",
        )
    return splits.get("train", next(iter(splits.values())))
