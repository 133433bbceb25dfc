"""Held-out data measured while a model trains, the guard of a domain, and samples of what it writes.

Nothing of it is part of training: modes of modules and random states are put back, so losses are the same with it and
without.
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
from fireflyds.runs.jsonl import JsonlFile, without_nan
from fireflyds.train.generation_samples import EncodedPrompts, encode_prompts, greedy_generate
from fireflyds.types import IGNORE_INDEX, Encoder, PackedBatch
from fireflyds.zero.engine import Engine

VALIDATIONS, SAMPLES = "validation.jsonl", "samples.jsonl"
# Held-out rows are dealt anew by no seed of the run's: two runs measure the same ones.
_SEED = 0


class HeldOut:
    """Packed rows of every domain of a held-out store, the first ones of its plan."""

    def __init__(self, store: TokenStore, config: ValidationConfig, seq_len: int) -> None:
        self.store = store
        self._rows: list[DocumentSlices] = []
        self.domains: list[str] = []
        """Those that have documents."""
        for number, name in enumerate(store.domains):
            documents = np.flatnonzero(store.domain_ids == number)
            if len(documents):
                self.domains.append(name)
                pool = DomainRows(name, store, documents, seq_len, _SEED)
                self._rows += [pool.row(row) for row in range(min(config.rows, pool.rows_per_epoch))]

    @property
    def contents(self) -> str:
        """A hash of what is measured."""
        rows = [row.as_tuples() for row in self._rows]
        made_from = json.dumps([self.store.manifest["made_from"], rows], sort_keys=True)
        return hashlib.sha256(made_from.encode()).hexdigest()

    def of_rank(self, micro_batch_size: int, rank: int, world_size: int) -> Iterator[tuple[PackedBatch, bool]]:
        """This rank's micro-batches, as many as any other's: those that only keep step come with False."""
        batches = [self._rows[at : at + micro_batch_size] for at in range(0, len(self._rows), micro_batch_size)]
        for first in range(0, len(batches), world_size):
            counts = first + rank < len(batches)
            rows = batches[first + rank if counts else 0]
            yield collate(self.store, DocumentSlices.concatenate(rows)), counts


class Validator:
    """Validates before the first step, every so many, and after the last; every rank calls it at the same steps."""

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
        """The newest row of `validation.jsonl`, on rank 0; nothing before there is one."""
        return self._rows[-1] if self._rows else {}

    def begin(self, engine: Engine, metrics_logger: MetricsLogger, step: int) -> str | None:
        """Cut back what stands after a resumed step; validate where there is no start to compare with, or where the
        run ended before it could. Why the run is to end, or None."""
        if not self._config.wanted:
            return None
        known = [False]
        if dist.get_rank() == 0:
            if self._held_out and self._config.guard and not self._guarded:
                domains = ", ".join(self._held_out.domains)
                metrics_logger.log.info(
                    f"validation.guard={self._config.guard}: no held-out domain ({domains}), nothing is guarded"
                )
            self._file = JsonlFile(self._run_dir / VALIDATIONS, step)
            self._samples = JsonlFile(self._run_dir / SAMPLES, step)
            self._rows = self._file.kept
            done = any(row["step"] == step for row in self._rows)
            known = [any(map(self._is_start, self._rows)) and (done or not self._is_due(step))]
        dist.broadcast_object_list(known)
        return None if known[0] else self._agreed(engine, metrics_logger, step)

    def after(self, engine: Engine, metrics_logger: MetricsLogger, step: int) -> str | None:
        """After a step: why the run is to end, or None. The same on every rank."""
        return self._agreed(engine, metrics_logger, step) if self._is_due(step) else None

    def _agreed(self, engine: Engine, metrics_logger: MetricsLogger, step: int) -> str | None:
        risen = [self._validate(engine, metrics_logger, step)]
        dist.broadcast_object_list(risen)
        return risen[0] if self._config.stop else None

    def _is_due(self, step: int) -> bool:
        return self._config.wanted and (step % self._config.every == 0 or step == self._total_steps)

    def _validate(self, engine: Engine, metrics_logger: MetricsLogger, step: int) -> str | None:
        """On rank 0: what the guard says."""
        started = time.perf_counter()
        row: dict[str, Any] = {"step": step, "data": self._contents}
        with evaluation_mode(engine.module, engine.device):
            if self._held_out:
                row |= self._measure(engine, self._held_out)
            answers = (
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
            texts = zip(self._prompts.texts, answers, strict=True)
            samples = [{"step": step, "prompt": text, "text": self._encoder.decode(ids)} for text, ids in texts]
            for sample in samples:
                self._samples.write(sample)
            metrics_logger.log_samples(step, samples)
        if self._held_out:
            metrics_logger.log.info(_format_row(row))
        risen = self._risen(row)
        if risen:
            metrics_logger.log.warning(f"warning: {risen}")
        return risen

    def _measure(self, engine: Engine, held_out: HeldOut) -> dict[str, float]:
        number = len(held_out.store.domains)
        # Of every domain: nats, learned tokens, bytes.
        sums = np.zeros((3, number))
        for batch, counts in held_out.of_rank(self._micro_batch_size, dist.get_rank(), dist.get_world_size()):
            losses = engine.module(**batch.model_inputs(engine.device), compute=token_losses)
            if not counts:
                continue
            labels = batch.labels[0].numpy()
            learned = labels != IGNORE_INDEX
            places = np.repeat(batch.domains.numpy(), np.diff(batch.cu_seqlens.numpy()))[learned]
            weights = (losses.double().cpu().numpy()[learned], None, self._token_bytes[labels[learned]])
            sums += np.stack([np.bincount(places, weight, minlength=number) for weight in weights])
        total = torch.from_numpy(sums).to(engine.device)
        dist.all_reduce(total)
        return _by_domain(held_out.store.domains, total.cpu().numpy())

    def _is_start(self, row: dict[str, Any]) -> bool:
        key = f"validation/bits_per_byte/{self._config.guard}"
        return row["data"] == self._contents and (not self._guarded or row.get(key) is not None)

    @property
    def _guarded(self) -> bool:
        return self._held_out is not None and self._config.guard in self._held_out.domains

    def _risen(self, row: dict[str, Any]) -> str | None:
        """What the guard says of a row."""
        if not self._guarded:
            return None
        key = f"validation/bits_per_byte/{self._config.guard}"
        if key not in row:
            return f"step {row['step']}: {self._config.guard} cannot be measured, none of its held-out documents has a token to learn"
        start = next((each for each in self._rows if self._is_start(each)), None)
        if start is None:
            return f"step {row['step']}: {self._config.guard} is {row[key]:.4f} bits per byte, and that is no start to compare with"
        rise = row[key] / start[key] - 1
        if rise <= self._config.max_rise:  # a loss that is no number is none
            return None
        return (
            f"step {row['step']}: {self._config.guard} rose to {row[key]:.4f} bits per byte, {100 * rise:.1f} % above its "
            f"{start[key]:.4f} at step {start['step']}; validation.max_rise={self._config.max_rise:g} allows "
            f"{100 * self._config.max_rise:g} %. Mix more {self._config.guard} into the data, or lower optim.lr"
        )


def open_validator(
    config: TrainConfig,
    encoder: Encoder,
    trained_on: TokenStore,
    hf_config: Any,
    total_steps: int,
) -> Validator:
    """Before anything heavy. Prompts are questions where the store that is trained on holds dialogues.

    Raises:
        UserError: no such store, one made with another tokenizer or without the domain that is to stop the run, or a
            prompt that is too long.
    """
    wanted = config.validation
    held_out = _held_out(config, encoder.fingerprint()) if wanted.store else None
    if held_out and wanted.stop and wanted.guard not in held_out.domains:
        raise UserError(
            f"validation.guard={wanted.guard}: {wanted.store} holds no document of that domain, so nothing would ever stop the run. It "
            f"has: {', '.join(held_out.domains)}"
        )
    room = getattr(hf_config, "max_position_embeddings", None)
    prompts = encode_prompts(encoder, trained_on.manifest["template"], wanted.prompts, room) if wanted.prompts else None
    return Validator(config, held_out, prompts, encoder, room, total_steps)


def _held_out(config: TrainConfig, fingerprint: str) -> HeldOut:
    store = open_store("validation.store", config.validation.store, fingerprint, config.model.tokenizer_path)
    return HeldOut(store, config.validation, config.seq_len)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients; afterwards every module's mode and every random state is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            for module, _ in modes:
                # In evaluation mode 8-bit layers round their inputs too, which training does not.
                weight = getattr(module, "weight", None)
                module.training = getattr(weight, "dtype", None) is torch.int8 and not hasattr(module, "lora_A")
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(states[0])
            np.random.set_state(states[1])


def _by_domain(names: Sequence[str], sums: np.ndarray) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, each, tokens, length in zip(["", *names], *(np.append(x.sum(), x) for x in sums), strict=True):
        suffix = f"/{name}" if name else ""
        if tokens:
            found[f"validation/loss{suffix}"] = float(each / tokens)
        if length:
            found[f"validation/bits_per_byte{suffix}"] = bits_per_byte(each, length)
    return found


def _format_row(row: dict[str, Any]) -> str:
    prefix = "validation/bits_per_byte/"
    found = "  ".join(f"{key.removeprefix(prefix)} {row[key]:.4f}" for key in row if key.startswith(prefix))
    return f"validation at step {row['step']}: bits/byte  {found}  ({row['validation_seconds']:.1f} s)"
