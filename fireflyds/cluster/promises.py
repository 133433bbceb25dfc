"""What a verb reads, looked at before its job waits in a queue for hours only to say that a folder is missing."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError

# Keys that name a file or folder which must be there when the verb begins.
INPUTS = {
    "expand": ("base", "corpus"),
    "learn": ("corpus",),
    "prepare": ("tokenizer", "data.sources"),
    "train": ("model.path", "model.tokenizer", "data.store"),
    "evaluate": ("model", "questions", "cmmlu"),
    "synthesize": ("corpus",),
}


def require_inputs(verb: str, config: Any, promised: Iterable[str] = ()) -> None:
    """`promised`: what earlier stages of a road make, with everything below it.

    Raises:
        UserError: a file or folder is not there and nobody makes it.
    """
    made = [Path(place).absolute() for place in promised]
    for key in INPUTS.get(verb, ()):
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        for text in [value] if isinstance(value, str) else [source.path for source in value]:
            place = Path(text).absolute()
            known = not text or set("*?[:") & set(text) or place.exists()
            if not known and not any(root == place or root in place.parents for root in made):
                raise UserError(f"{key}={text}: is not there ({place}). Give a folder or file that the nodes see too")
