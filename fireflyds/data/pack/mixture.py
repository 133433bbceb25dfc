"""Sequence of packed rows, mixed from domains by token weights; each row is a function of its number."""

import hashlib
import math
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fireflyds.config import DataConfig, TrainConfig
from fireflyds.data.pack.packing import DocumentSlices, RowPlan, plan_rows, split_documents
from fireflyds.data.store.store import TokenStore
from fireflyds.errors import UserError

# Rows are assigned to domains in blocks of this size: shares are exact to 1/10,000.
_BLOCK = 10_000
# Version of the packing algorithm; increased when packing changes, so that cached plans are not reused.
_FORMAT = 3


class DomainRows:
    """Packed rows of one domain (or of all): every epoch has the same number of rows, in a different order."""

    def __init__(self, name: str, store: TokenStore, documents: np.ndarray, seq_len: int, seed: int) -> None:
        self.name = name
        self._store, self._seq_len, self._seed = store, seq_len, seed
        contents = hashlib.sha256(f"{store.manifest['made_from']} {name} {len(documents)}".encode()).hexdigest()[:12]
        self._cache = f"{_FORMAT}-{contents}-{seq_len}"
        self.slices = self._split(documents)
        self._plans: dict[int, RowPlan] = {}
        self.rows_per_epoch = len(self.plan(0))
        if self.rows_per_epoch == 0:
            raise UserError(
                f"domain {name} has no document",
                key=store.key,
                value=store.path,
                remedy="Leave the domain out, or prepare the store again with documents of it",
            )
        self.tokens_per_row = float(self.slices.lengths.sum()) / self.rows_per_epoch

    def row(self, number: int) -> DocumentSlices:
        """Returns the slices of row `number`, counted over all epochs."""
        epoch, within = divmod(number, self.rows_per_epoch)
        return self.slices.take(self.plan(epoch).row(within))

    def plan(self, epoch: int) -> RowPlan:
        """Returns the assignment of slices to rows in an epoch, from memory or from the `plans` folder of the store."""
        if epoch not in self._plans:
            while len(self._plans) > 1:  # keeps the current and the next epoch
                del self._plans[min(self._plans)]
            arrays = self._load_or_build(
                f"plan-{self._cache}-{self._seed}-{epoch}",
                ("order", "row_offsets"),
                lambda: plan_rows(self.slices.lengths, self._seq_len, self._seed, epoch),
            )
            self._plans[epoch] = RowPlan(*arrays)
        return self._plans[epoch]

    def _split(self, documents: np.ndarray) -> DocumentSlices:
        arrays = self._load_or_build(
            f"slices-{self._cache}",
            ("documents", "starts", "lengths", "spans", "contexts", "num_continued", "num_cut_tokens"),
            lambda: split_documents(self._store, documents, self._seq_len),
        )
        return DocumentSlices.from_columns(arrays[:5], int(arrays[5]), int(arrays[6]))

    def _load_or_build(self, name: str, fields: tuple[str, ...], build: Callable[[], object]) -> list[np.ndarray]:
        """Loads arrays from the `plans` folder of the store, or builds them and saves them there if it is writable."""
        folder = self._store.path / "plans" / name
        try:
            return [np.load(folder / f"{field}.npy", mmap_mode="r").view(np.ndarray) for field in fields]
        except (OSError, ValueError):
            pass
        result = build()
        temporary = folder.with_name(f".{name}.{socket.gethostname()}.{os.getpid()}")
        try:
            temporary.mkdir(parents=True)
            for field in fields:
                np.save(temporary / f"{field}.npy", getattr(result, field))
            os.replace(temporary, folder)
        except OSError:  # read-only store, or another rank has saved the folder already
            shutil.rmtree(temporary, ignore_errors=True)
        return [np.asarray(getattr(result, field)) for field in fields]


@dataclass(frozen=True)
class MixturePhase:
    """A range of the row sequence with constant domain shares.

    `first_row`: number of its first row; `quotas`, int64 `[pools]`: rows of each pool per block of `_BLOCK` rows;
    `taken`, int64 `[pools]`: rows of each pool in all earlier phases.
    """

    first_row: int
    quotas: np.ndarray
    taken: np.ndarray

    @cached_property
    def pattern(self) -> np.ndarray:
        """Pool of each row of a block, with the rows of every pool evenly spaced: int64 `[_BLOCK]`."""
        pools = np.repeat(np.arange(len(self.quotas)), self.quotas)
        within = np.arange(_BLOCK) - np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)
        return pools[np.argsort((within + 0.5) / np.repeat(self.quotas, self.quotas), kind="stable")]

    @cached_property
    def _num_preceding(self) -> np.ndarray:
        """Number of rows of the same pool before each row of a block: int64 `[_BLOCK]`."""
        order = np.argsort(self.pattern, kind="stable")
        counts = np.empty(_BLOCK, np.int64)
        counts[order] = np.arange(_BLOCK) - np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)
        return counts

    def locate(self, number: int) -> tuple[int, int]:
        """Returns the pool of row `number` and the number of the row within the pool."""
        block, offset = divmod(number - self.first_row, _BLOCK)
        pool = int(self.pattern[offset])
        return pool, int(self.taken[pool] + block * self.quotas[pool] + self._num_preceding[offset])

    def counts(self, number: int) -> np.ndarray:
        """Returns the rows of each pool before row `number`: int64 `[pools]`."""
        block, offset = divmod(number - self.first_row, _BLOCK)
        counts: np.ndarray = self.taken + block * self.quotas
        return counts + np.bincount(self.pattern[:offset], minlength=len(self.quotas))

    def row_of(self, pool: int, count: int) -> int:
        """Returns the number of rows of the sequence that include the first `count` rows of `pool`."""
        block, remainder = divmod(count - int(self.taken[pool]), int(self.quotas[pool]))
        if remainder == 0:
            block, remainder = block - 1, int(self.quotas[pool])
        return self.first_row + block * _BLOCK + int(np.flatnonzero(self.pattern == pool)[remainder - 1]) + 1


class PackedRowSampler:
    """Maps row i of a training run to document slices, independent of the world size and of resumption.

    Without weights all domains form one pool and an epoch contains each document once. With weights every domain
    is a separate pool, repeated as often as needed (at most `max_epochs` times), and rows are assigned to the
    domains so that their tokens have the configured proportions. The sampler has no state: nothing is replayed on
    resumption.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int, data: DataConfig) -> None:
        weights = data.shares or store.manifest["weights"]
        refuse_unknown_domains(store, weights, data)
        self.names = list(weights) or ["all"]
        documents = [np.flatnonzero(store.domain_ids == store.domains.index(name)) for name in weights]
        self.pools = [
            DomainRows(name, store, indices, seq_len, seed + number)
            for number, (name, indices) in enumerate(zip(self.names, documents or [np.arange(len(store))], strict=True))
        ]
        self._row_limits = [
            np.floor(data.max_epochs.get(name, np.inf) * pool.rows_per_epoch)
            for name, pool in zip(self.names, self.pools, strict=True)
        ]
        for name, pool, limit in zip(self.names, self.pools, self._row_limits, strict=True):
            if limit < 1:
                raise UserError(
                    f"less than one of its {pool.rows_per_epoch:,} rows",
                    key=f"data.max_epochs.{name}",
                    value=data.max_epochs[name],
                    remedy="Remove the domain from data.weights instead",
                )
        changes = [(0, weights or {"all": 1.0}), *((phase.tokens, phase.weights) for phase in data.curriculum)]
        self.phases, self.num_rows = self._phases(
            [(tokens, [phase_weights[name] for name in self.names]) for tokens, phase_weights in changes]
        )

    @property
    def rows_per_epoch(self) -> int:
        """Rows until every document was used once, or until its pool is exhausted where `max_epochs` is below 1."""
        row_counts = [
            int(min(pool.rows_per_epoch, limit)) for pool, limit in zip(self.pools, self._row_limits, strict=True)
        ]
        return max(self._row_after(pool, count) for pool, count in enumerate(row_counts))

    def _row_after(self, pool: int, count: int) -> int:
        """Returns the number of rows of the sequence that include the first `count` rows of `pool`."""
        for phase, following in zip(self.phases, [*self.phases[1:], None], strict=True):
            if phase.quotas[pool] and (following is None or following.taken[pool] >= count):
                return phase.row_of(pool, count)
        raise AssertionError("no phase contains that many rows of the pool")

    @property
    def long_dialogues(self) -> tuple[int, int]:
        """Numbers of dialogues that go on in further rows, and of tokens of their prompts that were cut."""
        slices = [pool.slices for pool in self.pools]
        return sum(item.num_continued for item in slices), sum(item.num_cut_tokens for item in slices)

    def row(self, number: int) -> DocumentSlices:
        """Returns the slices of row `number`.

        Raises:
            UserError: the sequence ends before this row (`max_epochs`).
        """
        pool, within = self.locate(number)
        return self.pools[pool].row(within)

    def locate(self, number: int) -> tuple[int, int]:
        """Returns the pool of row `number` and the number of the row within the pool."""
        self.require(number + 1)
        phase = next(phase for phase in reversed(self.phases) if phase.first_row <= number)
        return phase.locate(number)

    def require(self, rows: int) -> None:
        """Raises `UserError` if the sequence has fewer than `rows` rows."""
        if self.num_rows is not None and rows > self.num_rows:
            raise UserError(
                f"the data provide {self.num_rows:,} rows, the run needs {rows:,}",
                key="data.max_epochs",
                remedy="Lower optim.steps, or allow more epochs",
            )

    def _phases(self, changes: list[tuple[int, list[float]]]) -> tuple[list[MixturePhase], int | None]:
        """Returns the phases, split where weights change or a pool ends, and the number of rows (None: unlimited)."""
        per_row = np.array([pool.tokens_per_row for pool in self.pools])
        limits = np.array(self._row_limits)
        taken, row = np.zeros(len(self.pools), np.int64), 0
        phases: list[MixturePhase] = []
        pending = list(changes)
        weights = np.array(pending.pop(0)[1])
        while True:
            open_pools = taken < limits
            if not open_pools.any():
                return phases, row
            phase = MixturePhase(row, _quotas(np.where(open_pools, weights, 0.0) / per_row), taken)
            phases.append(phase)
            ends = [
                phase.row_of(pool, int(limits[pool]))
                for pool in np.flatnonzero(open_pools & np.isfinite(limits)).tolist()
                if phase.quotas[pool]
            ]
            if pending:
                tokens_left = pending[0][0] - float((taken * per_row).sum())
                change_row = row + max(1, round(tokens_left / float((phase.quotas * per_row).sum() / _BLOCK)))
                if change_row <= min(ends, default=change_row):
                    weights = np.array(pending.pop(0)[1])
                ends.append(change_row)
            if not ends:
                return phases, None
            taken, row = phase.counts(min(ends)), min(ends)


def count_steps(config: TrainConfig, rows: PackedRowSampler) -> int:
    """Returns the optimizer steps of the run.

    Raises:
        UserError: the data end before that many steps.
    """
    optim = config.optim
    steps = optim.steps or math.ceil((optim.epochs or 0) * rows.rows_per_epoch / config.global_batch_size)
    rows.require(steps * config.global_batch_size)
    return steps


def _quotas(shares: np.ndarray) -> np.ndarray:
    """Returns the rows of each pool per block, proportional to `shares` and >= 1 for shares > 0: int64 `[pools]`."""
    exact = shares / shares.sum() * _BLOCK
    quotas = np.where(shares > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    for index in np.argsort(quotas - exact, kind="stable")[: max(0, _BLOCK - int(quotas.sum()))]:
        quotas[index] += 1
    quotas[np.argmax(quotas)] += _BLOCK - quotas.sum()
    return quotas


def refuse_unknown_domains(store: TokenStore, weights: dict[str, float], data: DataConfig) -> None:
    """Raises `UserError` where weights, `max_epochs` or curriculum name a domain that the store or the weights lack."""
    unknown = sorted(set(weights) - set(store.domains))
    if unknown:
        raise UserError(
            f"the store {store.path} has no such domain",
            key=f"data.weights.{unknown[0]}",
            remedy=f"It has: {', '.join(store.domains)}",
        )
    unweighted = sorted(set(data.max_epochs) - set(weights))
    if unweighted:
        raise UserError(
            f"limits a domain that is mixed by weight; domains with a weight: {', '.join(weights) or 'none'}",
            key=f"data.max_epochs.{unweighted[0]}",
            remedy=f"Set data.weights.{unweighted[0]} too",
        )
    for phase in data.curriculum:
        if set(phase.weights) != set(weights):
            raise UserError(
                f"the phase from {phase.tokens} tokens has weights for {sorted(phase.weights)}, the first phase for "
                f"{sorted(weights)}",
                key="data.curriculum",
                remedy="Name the same domains in all phases",
            )
