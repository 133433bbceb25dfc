"""Validation during training: loss on held-out data, a limit on the degradation of a guarded domain, generated samples.

Validation does not affect training: module modes and random states are restored, so losses are the same with and
without it.
"""

import contextlib
import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fireflyds.config import TrainConfig, ValidationConfig
from fireflyds.data.pack.loader import collate
from fireflyds.data.pack.mixture import DomainRows
from fireflyds.data.pack.packing import DocumentSlices
from fireflyds.data.store.store import TokenStore, open_store
from fireflyds.errors import UserError
from fireflyds.metrics.accumulator import bits_per_byte
from fireflyds.metrics.logger import MetricsLogger
from fireflyds.models.packed.head import token_losses
from fireflyds.models.tuning import keeps_training_mode
from fireflyds.runs import layout
from fireflyds.runs.jsonl import JsonlFile, without_nan
from fireflyds.train.generation_samples import EncodedPrompts, encode_prompts, greedy_generate
from fireflyds.types import IGNORE_INDEX, Encoder, PackedBatch
from fireflyds.zero.engine import Engine

# Independent of the run's seed, so that all runs are validated on the same held-out rows.
_SEED = 0


class HeldOut:
    """The first packed rows of every domain of a held-out store."""

    def __init__(self, store: TokenStore, config: ValidationConfig, seq_len: int) -> None:
        self.store = store
        self._rows: list[DocumentSlices] = []
        self.domains: list[str] = []
        """Names of the domains that have documents."""
        for number, name in enumerate(store.domains):
            documents = np.flatnonzero(store.domain_ids == number)
            if len(documents):
                self.domains.append(name)
                pool = DomainRows(name, store, documents, seq_len, _SEED)
                self._rows += [pool.row(row) for row in range(min(config.rows, pool.rows_per_epoch))]

    @property
    def contents(self) -> str:
        """A hash of the held-out data that is measured."""
        rows = [row.as_tuples() for row in self._rows]
        made_from = json.dumps([self.store.manifest["made_from"], rows], sort_keys=True)
        return hashlib.sha256(made_from.encode()).hexdigest()

    def of_rank(self, micro_batch_size: int, rank: int, world_size: int) -> Iterator[tuple[PackedBatch, bool]]:
        """Yields this rank's micro-batches, the same number on every rank.

        The second value is False for micro-batches that only equalize the number of collective calls.
        """
        batches = [
            self._rows[offset : offset + micro_batch_size] for offset in range(0, len(self._rows), micro_batch_size)
        ]
        for first in range(0, len(batches), world_size):
            is_counted = first + rank < len(batches)
            rows = batches[first + rank if is_counted else 0]
            yield collate(self.store, DocumentSlices.concatenate(rows)), is_counted


class Validator:
    """Validates before the first step, every `validation.every` steps and after the last. Collective."""

    def __init__(
        self,
        config: TrainConfig,
        held_out: HeldOut | None,
        prompts: EncodedPrompts | None,
        encoder: Encoder,
        room: int | None,
        total_steps: int,
    ) -> None:
        self._config, self._held_out, self._prompts = config.validation, held_out, prompts
        self._encoder, self._room = encoder, room
        self._micro_batch_size, self._run_dir = config.micro_batch_size, Path(config.run_dir)
        self._total_steps = total_steps
        self._token_bytes = encoder.token_bytes()
        self._contents = held_out.contents if held_out else ""
        self._rows: list[dict[str, Any]] = []
        self._file: JsonlFile | None = None
        self._samples: JsonlFile | None = None

    @property
    def newest(self) -> dict[str, Any]:
        """The newest row of `validation.jsonl`, on rank 0; empty before the first row and on other ranks."""
        return self._rows[-1] if self._rows else {}

    def begin(self, engine: Engine, metrics_logger: MetricsLogger, step: int) -> UserError | None:
        """Removes rows after the resumed step. Validates where there is no baseline row, or where the validation of
        `step` is missing. Returns the error of the guard if the run must stop, or None."""
        if not self._config.wanted:
            return None
        is_current = [False]
        if dist.get_rank() == 0:
            if self._held_out and self._config.guard and not self._guarded:
                domains = ", ".join(self._held_out.domains)
                metrics_logger.log.info(
                    f"validation.guard={self._config.guard}: no held-out domain ({domains}), nothing is guarded"
                )
            self._file = JsonlFile(self._run_dir / layout.VALIDATION, step)
            self._samples = JsonlFile(self._run_dir / layout.SAMPLES, step)
            self._rows = self._file.kept
            has_row = any(row["step"] == step for row in self._rows)
            is_current = [any(map(self._is_baseline, self._rows)) and (has_row or not self._is_due(step))]
        dist.broadcast_object_list(is_current)
        return None if is_current[0] else self._validate_on_all_ranks(engine, metrics_logger, step)

    def after(self, engine: Engine, metrics_logger: MetricsLogger, step: int) -> UserError | None:
        """Validates after a step if due. Returns the error of the guard if the run must stop, or None; the same on
        every rank."""
        return self._validate_on_all_ranks(engine, metrics_logger, step) if self._is_due(step) else None

    def _validate_on_all_ranks(self, engine: Engine, metrics_logger: MetricsLogger, step: int) -> UserError | None:
        guard_error = [self._validate(engine, metrics_logger, step)]
        dist.broadcast_object_list(guard_error)
        return guard_error[0] if self._config.stop else None

    def _is_due(self, step: int) -> bool:
        return self._config.wanted and (step % self._config.every == 0 or step == self._total_steps)

    def _validate(self, engine: Engine, metrics_logger: MetricsLogger, step: int) -> UserError | None:
        """Validates and logs. Returns the error of the guard on rank 0, or None."""
        started = time.perf_counter()
        row: dict[str, Any] = {"step": step, "data": self._contents}
        with evaluation_mode(engine.module, engine.device):
            if self._held_out:
                row |= self._measure(engine, self._held_out)
            generations = (
                greedy_generate(engine.module, self._prompts, self._config.max_new_tokens, self._room, engine.device)
                if self._prompts
                else []
            )
        row["validation_seconds"] = time.perf_counter() - started
        if not (self._file and self._samples):
            return None
        self._rows.append(without_nan(row))
        self._file.write(self._rows[-1])
        metrics_logger.log_validation({key: value for key, value in row.items() if key != "data"})
        if self._prompts:
            texts = zip(self._prompts.texts, generations, strict=True)
            samples = [{"step": step, "prompt": text, "text": self._encoder.decode(ids)} for text, ids in texts]
            for sample in samples:
                self._samples.write(sample)
            metrics_logger.log_samples(step, samples)
        if self._held_out:
            metrics_logger.log.info(_format_row(row))
        guard_error = self._check_guard(row)
        if guard_error:
            metrics_logger.log.warning(f"warning: {guard_error}")
        return guard_error

    def _measure(self, engine: Engine, held_out: HeldOut) -> dict[str, float]:
        num_domains = len(held_out.store.domains)
        # Loss sum in nats, learned tokens and bytes of every domain.
        sums = np.zeros((3, num_domains))
        for batch, is_counted in held_out.of_rank(self._micro_batch_size, dist.get_rank(), dist.get_world_size()):
            losses = engine.module(**batch.model_inputs(engine.device), compute=token_losses)
            if not is_counted:
                continue
            labels = batch.labels[0].numpy()
            learned = labels != IGNORE_INDEX
            token_domains = np.repeat(batch.domains.numpy(), np.diff(batch.cu_seqlens.numpy()))[learned]
            weights = (losses.double().cpu().numpy()[learned], None, self._token_bytes[labels[learned]])
            sums += np.stack([np.bincount(token_domains, weight, minlength=num_domains) for weight in weights])
        total = torch.from_numpy(sums).to(engine.device)
        dist.all_reduce(total)
        return _domain_metrics(held_out.store.domains, total.cpu().numpy())

    def _is_baseline(self, row: dict[str, Any]) -> bool:
        key = f"validation/bits_per_byte/{self._config.guard}"
        return row["data"] == self._contents and (not self._guarded or row.get(key) is not None)

    @property
    def _guarded(self) -> bool:
        return self._held_out is not None and self._config.guard in self._held_out.domains

    def _check_guard(self, row: dict[str, Any]) -> UserError | None:
        """Returns the error of the guard for a row, or None."""
        guard, max_rise = self._config.guard, self._config.max_rise
        if not self._guarded:
            return None
        key = f"validation/bits_per_byte/{guard}"
        if key not in row:
            rule = "cannot be measured, none of its held-out documents has a token to learn"
            remedy = "Give held-out documents of two tokens or more"
        elif (baseline := next((candidate for candidate in self._rows if self._is_baseline(candidate)), None)) is None:
            rule = f"{row[key]:.4f} bits per byte is not a valid baseline"
            remedy = "Give another model= or held-out store, or leave validation.guard empty"
        else:
            rise = row[key] / baseline[key] - 1
            if rise <= max_rise:  # False for NaN, which is reported
                return None
            rule = (
                f"rose to {row[key]:.4f} bits per byte, {100 * rise:.1f} % above its {baseline[key]:.4f} at step "
                f"{baseline['step']}; validation.max_rise={max_rise:g} allows {100 * max_rise:g} %"
            )
            remedy = f"Mix more {guard} into the data, lower optim.lr, or raise validation.max_rise"
        return UserError(rule, key="validation.guard", value=guard, remedy=remedy).within(f"step {row['step']}")


def open_validator(
    config: TrainConfig,
    encoder: Encoder,
    trained_on: TokenStore,
    hf_config: Any,
    total_steps: int,
) -> Validator:
    """Opens the held-out store and encodes the prompts, without loading weights.

    Prompts are rendered as user messages where the training store contains dialogues.

    Raises:
        UserError: the store does not exist, was made with another tokenizer or lacks the guarded domain, or a prompt is
            too long.
    """
    validation = config.validation
    held_out = _held_out(config, encoder.fingerprint()) if validation.store else None
    if held_out and validation.stop and validation.guard not in held_out.domains:
        raise UserError(
            f"{validation.store} holds no document of that domain, so nothing would ever stop the run",
            key="validation.guard",
            value=validation.guard,
            remedy=f"It has: {', '.join(held_out.domains)}",
        )
    room = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    prompts = (
        encode_prompts(encoder, trained_on.manifest["template"], validation.prompts, room)
        if validation.prompts
        else None
    )
    return Validator(config, held_out, prompts, encoder, room, total_steps)


def _held_out(config: TrainConfig, fingerprint: str) -> HeldOut:
    store = open_store("validation.store", config.validation.store, fingerprint, config.model.tokenizer_path)
    return HeldOut(store, config.validation, config.seq_len)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode of every module and all random states on exit."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = keeps_training_mode(module)
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(states[0])
            np.random.set_state(states[1])


def _domain_metrics(names: Sequence[str], sums: np.ndarray) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, nats, tokens, num_bytes in zip(["", *names], *(np.append(x.sum(), x) for x in sums), strict=True):
        suffix = f"/{name}" if name else ""
        if tokens:
            metrics[f"validation/loss{suffix}"] = float(nats / tokens)
        if num_bytes:
            metrics[f"validation/bits_per_byte{suffix}"] = bits_per_byte(nats, num_bytes)
    return metrics


def _format_row(row: dict[str, Any]) -> str:
    prefix = "validation/bits_per_byte/"
    values = "  ".join(f"{key.removeprefix(prefix)} {row[key]:.4f}" for key in row if key.startswith(prefix))
    return f"validation at step {row['step']}: bits/byte  {values}  ({row['validation_seconds']:.1f} s)"
