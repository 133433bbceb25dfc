"""What a verb reads, looked at before its job waits in a queue for hours only to say that a folder is missing."""

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
    """What a stage of a road makes, so that later ones may ask for it: `makes` stands below the road's `out`."""
    made = out / makes
    # `store/manifest.json` stands for the store.
    folders = [made, *([made.parent] if made.parent != out else [])]
    return folders + [Path(place) for place in (getattr(config, "run_dir", ""), getattr(config, "out", "")) if place]


def require_input_paths(verb: str, config: Any, promised: Iterable[Path] = ()) -> None:
    """`promised`: what earlier stages of a road make, with everything below it.

    Raises:
        UserError: a file or folder is not there and nobody makes it.
    """
    made = [place.absolute() for place in promised]
    for key in VERBS[verb].inputs:
        for text in _paths(attrgetter(key)(config)):
            place = Path(text).absolute()
            known = not text or set("*?[:") & set(text) or place.exists()
            if not known and not any(root == place or root in place.parents for root in made):
                raise UserError(f"{key}={text}: is not there ({place}). Give a folder or file that the nodes see too")


def _paths(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [*value.values()] if isinstance(value, dict) else [source.path for source in value]


def check_training_inputs(config: TrainConfig) -> None:
    """What training refuses of its tokenizer, model and stores and what needs no torch to see.

    Raises:
        UserError: a store that was made with another tokenizer, without a domain that has a weight, or rows that are
            longer than the model has positions.
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
        if "dynamic" in (scaling.get("rope_type"), scaling.get("type")):  # stretched to each document's length
            return
        if isinstance(positions, int) and config.seq_len > positions:
            raise UserError(
                f"seq_len={config.seq_len}: the model has {positions} positions. Use {positions} or less, or stretch them with "
                "model.rope_scaling"
            )
