"""Data sets of the `datasets` library: folders it wrote, and names on the Hugging Face hub, as a stream of rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError

PREFIX = "hf:"


def is_dataset(path: str) -> bool:
    """Whether `path` is `hf:<name>[:<config>]` or a folder that `Dataset.save_to_disk` wrote."""
    return path.startswith(PREFIX) or any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_dataset(path: str) -> Iterator[dict[str, Any]]:
    """The rows of the `train` split (of the only one, where it has another name), one at a time.

    Raises:
        UserError: no such data set, or several splits and no `train`.
    """
    import datasets

    try:
        if path.startswith(PREFIX):
            name, _, config = path.removeprefix(PREFIX).partition(":")
            if not name:
                raise ValueError("it has no name")
            found = datasets.load_dataset(name, config or None, streaming=True)
        else:
            found = datasets.load_from_disk(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as a data set ({reason}). Give hf:<name>, hf:<name>:<config> or a saved folder"
        ) from error
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    if len(splits) > 1 and "train" not in splits:
        raise UserError(f"{path}: no split 'train' among {', '.join(splits)}. Save the wanted split by itself")
    yield from splits.get("train", next(iter(splits.values())))
