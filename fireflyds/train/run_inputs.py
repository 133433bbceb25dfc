"""The inputs of a run, opened and validated before the process group exists and without loading weights."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fireflyds.config import Precision, TrainConfig
from fireflyds.data.chat_template import OWN, template_key
from fireflyds.data.pack.mixture import PackedRowSampler, count_steps
from fireflyds.data.store.store import TokenStore, open_store
from fireflyds.errors import UserError
from fireflyds.metrics import trackers
from fireflyds.models.load import read_config
from fireflyds.models.packed.forward import attention_override
from fireflyds.models.precision import emulation_notes, local_capability, resolve_precision
from fireflyds.models.rope_scaling import check_max_positions
from fireflyds.optim.compatibility import check_compatibility
from fireflyds.runs.fingerprint import base_identity
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.train.objectives import Objective, load_objective
from fireflyds.train.routing import require_router_losses
from fireflyds.train.validation import Validator, open_validator
from fireflyds.types import Encoder
from fireflyds.zero.import_json import extra_settings


@dataclass(frozen=True, slots=True)
class RunInputs:
    """`accumulation`: micro-batches per rank and step; `attention`: context manager that selects the packed attention
    backend of `hardware.attention`; `notes`: lines for the log."""

    config: TrainConfig
    encoder: Encoder
    hf_config: Any
    store: TokenStore
    rows: PackedRowSampler
    objective: Objective
    validator: Validator
    precision: Precision
    accumulation: int
    total_steps: int
    attention: AbstractContextManager[None]
    notes: list[str]

    @classmethod
    def open(cls, config: TrainConfig, world_size: int) -> "RunInputs":
        """Opens the inputs. Raises `UserError` where they are inconsistent, before anything is written or loaded."""
        precision = resolve_precision(config.hardware)
        notes = [
            *check_compatibility(config, precision, local_capability()),
            *extra_settings(config)[1],
            *emulation_notes(precision),
        ]
        trackers.require_installed(config.tracking)
        accumulation = config.accumulation_steps(world_size)
        config.profile.check_world_size(world_size)
        objective = load_objective(config.objective)
        encoder = load_encoder(config.model.tokenizer_path)
        hf_config = read_config(config.model, encoder)
        require_router_losses(config.objective, hf_config)
        check_max_positions(hf_config, "seq_len", config.seq_len)
        store = open_store("data.store", config.data.store, encoder.fingerprint(), config.model.tokenizer_path)
        _require_template(store, encoder, config.model.tokenizer_path)
        rows = PackedRowSampler(store, config.seq_len, config.seed, config.data)
        total_steps = count_steps(config, rows)
        if config.profile.start > total_steps:
            notes.append(f"profile.start={config.profile.start}: the run has {total_steps} steps, so none is recorded")
        return cls(
            config=config,
            encoder=encoder,
            hf_config=hf_config,
            store=store,
            rows=rows,
            objective=objective,
            validator=open_validator(config, encoder, store, hf_config, total_steps),
            precision=precision,
            accumulation=accumulation,
            total_steps=total_steps,
            attention=attention_override(config.hardware, hf_config, precision),
            notes=notes,
        )

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch of the data, as a fraction."""
        return self.rows.rows_per_epoch / self.config.global_batch_size

    def compared(self) -> dict[str, Any]:
        """Content hashes and counts that must be equal on all ranks."""
        tokenizer = self.encoder.fingerprint()
        return self.store.identity() | {"tokenizer": tokenizer, "total_steps": self.total_steps}

    def base_identity(self) -> dict[str, Any]:
        """The identity that trained weights belong to: hashes of base and tokenizer, and the vocabulary size."""
        return base_identity(self.config, self.encoder.fingerprint(), self.hf_config.get_text_config().vocab_size)


def _require_template(store: TokenStore, encoder: Encoder, tokenizer: str) -> None:
    """Raises `UserError` where the store's dialogues are in a tokenizer's own chat template, and this tokenizer has
    another: samples and the export would use that one."""
    if store.manifest["template"] == OWN and store.manifest["made_from"]["template"] != template_key(encoder, OWN):
        raise UserError(
            "its dialogues are in the chat template of the tokenizer that it was prepared with, and that of "
            f"{tokenizer} {'differs' if encoder.chat_template else 'is missing'}",
            key="data.store",
            value=store.path,
            remedy=f"Prepare it again with tokenizer={tokenizer}, or restore the template there",
        )
