"""Checks the inputs of a verb before its job is queued."""

from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

from fireflyds.config import VERBS, TrainConfig
from fireflyds.data.pack.mixture import refuse_unknown_domains
from fireflyds.data.store.store import open_store
from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.tokenizer.encoder import load_encoder


def stage_outputs(config: Any, out: Path, makes: str) -> list[Path]:
    """Returns the paths that a pipeline stage writes and later stages may read; `makes` is relative to `out`."""
    output = out / makes
    # A file also counts for its folder: `store/manifest.json` for the store.
    folders = [output, *([output.parent] if output.parent != out else [])]
    return folders + [Path(path) for path in (getattr(config, "run_dir", ""), getattr(config, "out", "")) if path]


def require_input_paths(verb: str, config: Any, planned_outputs: Iterable[Path] = ()) -> None:
    """Checks that the files and folders which a verb reads exist.

    Args:
        planned_outputs: outputs of earlier pipeline stages; everything below them counts as existing.

    Raises:
        UserError: a file or folder does not exist and no earlier stage writes it.
    """
    outputs = [path.absolute() for path in planned_outputs]
    for key in VERBS[verb].inputs:
        for text in _paths(attrgetter(key)(config)):
            path = Path(text).absolute()
            exists = not text or set("*?[:") & set(text) or path.exists()
            if not exists and not any(root == path or root in path.parents for root in outputs):
                raise UserError(
                    f"is not there ({path})",
                    key=key,
                    value=text,
                    remedy="Give a folder or file that the compute nodes can read",
                )


def _paths(value: Any) -> list[str]:
    """Returns the paths in the value of a key: a string, a dictionary of strings or a list of sources."""
    if isinstance(value, str):
        return [value]
    return [*value.values()] if isinstance(value, dict) else [source.path for source in value]


def check_training_inputs(config: TrainConfig) -> None:
    """Checks the tokenizer, model and stores of a training run as far as this is possible without torch.

    Raises:
        UserError: a store was made with another tokenizer or lacks a domain that has a weight, or `seq_len` exceeds
            the positions of the model.
    """
    tokenizer = config.model.tokenizer_path
    if not Path(tokenizer).exists():
        return
    fingerprint = load_encoder(tokenizer).fingerprint()
    for key, folder in (("data.store", config.data.store), ("validation.store", config.validation.store)):
        if folder:
            store = open_store(key, folder, fingerprint, tokenizer)
            if key == "data.store":
                refuse_unknown_domains(store, config.data.shares or store.manifest["weights"], config.data)
    file = Path(config.model.path, "config.json")
    if config.model.path and file.exists() and not config.model.rope_scaling:
        model = read_json(file)
        positions = model.get("max_position_embeddings")
        scaling = model.get("rope_parameters") or model.get("rope_scaling") or {}
        if "dynamic" in (scaling.get("rope_type"), scaling.get("type")):  # scaled by each document's length
            return
        if isinstance(positions, int) and config.seq_len > positions:
            raise UserError(
                f"the model has {positions} positions",
                key="seq_len",
                value=config.seq_len,
                remedy=f"Use {positions} or less, or extend them with model.rope_scaling",
            )
