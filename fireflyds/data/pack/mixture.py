"""One sequence of rows from one or more domains, by token weights, as a function of the row's number."""

import hashlib
import math
import os
import shutil
import socket
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fireflyds.config import DataConfig, TrainConfig
from fireflyds.data.pack.packing import DocumentSlices, RowPlan, plan_rows, split_documents
from fireflyds.data.store.store import TokenStore
from fireflyds.errors import UserError

# Rows are dealt to domains in blocks of this many: shares are exact to 1/10,000.
_BLOCK = 10_000
# Raised when packing changes, so that no plan of before is used.
_FORMAT = 2


class DomainRows:
    """The rows of one domain (or of all): every epoch has as many, in another order."""

    def __init__(self, name: str, store: TokenStore, documents: np.ndarray, seq_len: int, seed: int) -> None:
        self.name = name
        self._store, self._seq_len, self._seed = store, seq_len, seed
        contents = hashlib.sha256(f"{store.manifest['made_from']} {name} {len(documents)}".encode()).hexdigest()[:12]
        self._cache = f"{_FORMAT}-{contents}-{seq_len}"
        self.slices = self._cut(documents)
        self._plans: dict[int, RowPlan] = {}
        self.rows_per_epoch = len(self.plan(0))
        if self.rows_per_epoch == 0:
            raise UserError(
                f"{store.key}={store.path}: domain {name} has no row of at most seq_len={seq_len} tokens. Raise seq_len"
            )
        self.tokens_per_row = float(self.slices.lengths.sum()) / self.rows_per_epoch

    def row(self, number: int) -> DocumentSlices:
        """The slices of row `number`, counted through all epochs."""
        epoch, within = divmod(number, self.rows_per_epoch)
        return self.slices.take(self.plan(epoch).row(within))

    def plan(self, epoch: int) -> RowPlan:
        if epoch not in self._plans:
            while len(self._plans) > 1:  # this epoch's and the next one's
                del self._plans[min(self._plans)]
            arrays = self._cached(
                f"plan-{self._cache}-{self._seed}-{epoch}",
                ("order", "row_offsets"),
                lambda: plan_rows(self.slices.lengths, self._seq_len, self._seed, epoch),
            )
            self._plans[epoch] = RowPlan(*arrays)
        return self._plans[epoch]

    def _cut(self, documents: np.ndarray) -> DocumentSlices:
        arrays = self._cached(
            f"pieces-{self._cache}",
            ("documents", "starts", "lengths", "num_truncated", "num_dropped"),
            lambda: split_documents(self._store, documents, self._seq_len),
        )
        return DocumentSlices(arrays[0], arrays[1], arrays[2], int(arrays[3]), int(arrays[4]))

    def _cached(self, name: str, fields: tuple[str, ...], make) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
        """Arrays that are made once and then stand beside the store, where that can be written."""
        folder = self._store.path / "plans" / name
        try:
            return [np.load(folder / f"{field}.npy", mmap_mode="r").view(np.ndarray) for field in fields]
        except (OSError, ValueError):
            pass
        made = make()
        aside = folder.with_name(f".{name}.{socket.gethostname()}.{os.getpid()}")
        try:
            aside.mkdir(parents=True)
            for field in fields:
                np.save(aside / f"{field}.npy", getattr(made, field))
            os.replace(aside, folder)
        except OSError:  # a read-only store, or another rank was first
            shutil.rmtree(aside, ignore_errors=True)
        return [np.asarray(getattr(made, field)) for field in fields]


@dataclass(frozen=True)
class MixturePhase:
    """A stretch of the sequence with constant shares.

    `quotas`, int64 `[pools]`, are the rows of each pool in a block of `_BLOCK`; `taken` those of all phases before.
    """

    first_row: int
    quotas: np.ndarray
    taken: np.ndarray

    @cached_property
    def pattern(self) -> np.ndarray:
        """The pool of each row of a block, every pool spread evenly: int64 `[_BLOCK]`."""
        pools = np.repeat(np.arange(len(self.quotas)), self.quotas)
        within = np.arange(_BLOCK) - np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)
        return pools[np.argsort((within + 0.5) / np.repeat(self.quotas, self.quotas), kind="stable")]

    @cached_property
    def _before(self) -> np.ndarray:
        """Rows of the same pool before each row of a block: int64 `[_BLOCK]`."""
        order = np.argsort(self.pattern, kind="stable")
        before = np.empty(_BLOCK, np.int64)
        before[order] = np.arange(_BLOCK) - np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)
        return before

    def locate(self, number: int) -> tuple[int, int]:
        """The pool of row `number` and its number within the pool."""
        block, at = divmod(number - self.first_row, _BLOCK)
        pool = int(self.pattern[at])
        return pool, int(self.taken[pool] + block * self.quotas[pool] + self._before[at])

    def counts(self, number: int) -> np.ndarray:
        """Rows of each pool before row `number`: int64 `[pools]`."""
        block, at = divmod(number - self.first_row, _BLOCK)
        counts: np.ndarray = self.taken + block * self.quotas
        return counts + np.bincount(self.pattern[:at], minlength=len(self.quotas))

    def row_of(self, pool: int, count: int) -> int:
        """The number of the row after which `count` rows of a pool were taken."""
        block, rest = divmod(count - int(self.taken[pool]), int(self.quotas[pool]))
        if rest == 0:
            block, rest = block - 1, int(self.quotas[pool])
        return self.first_row + block * _BLOCK + int(np.flatnonzero(self.pattern == pool)[rest - 1]) + 1


class PackedRowSampler:
    """Row i of a training run, whatever the world size and wherever the run was resumed.

    Without weights all domains form one pool and an epoch sees each document once. With weights every domain
    is a pool of its own, repeated as often as needed (or allowed), and rows are dealt to the domains so that their
    tokens stand in the wanted proportion. Nothing is replayed: where row i comes from is arithmetic.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int, data: DataConfig) -> None:
        weights = data.shares or store.manifest["weights"]
        refuse_unknown_domains(store, weights, data)
        self.names = list(weights) or ["all"]
        documents = [np.flatnonzero(store.domain_ids == store.domains.index(name)) for name in weights]
        self.pools = [
            DomainRows(name, store, chosen, seq_len, seed + number)
            for number, (name, chosen) in enumerate(zip(self.names, documents or [np.arange(len(store))], strict=True))
        ]
        self._row_limits = [
            np.floor(data.max_epochs.get(name, np.inf) * pool.rows_per_epoch)
            for name, pool in zip(self.names, self.pools, strict=True)
        ]
        for name, pool, limit in zip(self.names, self.pools, self._row_limits, strict=True):
            if limit < 1:
                raise UserError(
                    f"data.max_epochs.{name}={data.max_epochs[name]}: less than one of its {pool.rows_per_epoch:,} rows. "
                    "Leave the domain out of the weights instead"
                )
        changes = [(0, weights or {"all": 1.0}), *((phase.tokens, phase.weights) for phase in data.curriculum)]
        self.phases, self.num_rows = self._phases(
            [(tokens, [given[name] for name in self.names]) for tokens, given in changes]
        )

    @property
    def rows_per_epoch(self) -> int:
        """Rows until every document was seen once, or as often as `max_epochs` allows of it."""
        wanted = [
            int(min(pool.rows_per_epoch, limit)) for pool, limit in zip(self.pools, self._row_limits, strict=True)
        ]
        return max(self._row_after(pool, count) for pool, count in enumerate(wanted))

    def _row_after(self, pool: int, count: int) -> int:
        """The number of the row after which `count` rows of a pool were taken."""
        for phase, following in zip(self.phases, [*self.phases[1:], None], strict=True):
            if phase.quotas[pool] and (following is None or following.taken[pool] >= count):
                return phase.row_of(pool, count)
        raise AssertionError("every pool goes on to its limit")

    @property
    def length_losses(self) -> tuple[int, int]:
        """Dialogues truncated and dropped for their length, over all pools."""
        return sum(pool.slices.num_truncated for pool in self.pools), sum(
            pool.slices.num_dropped for pool in self.pools
        )

    def row(self, number: int) -> DocumentSlices:
        """The slices of row `number`.

        Raises:
            UserError: `max_epochs` leaves no such row.
        """
        pool, within = self.locate(number)
        return self.pools[pool].row(within)

    def locate(self, number: int) -> tuple[int, int]:
        """The pool of row `number` and its number within the pool."""
        self.require(number + 1)
        phase = next(phase for phase in reversed(self.phases) if phase.first_row <= number)
        return phase.locate(number)

    def require(self, rows: int) -> None:
        """Raises `UserError` when the sequence ends before so many rows."""
        if self.num_rows is not None and rows > self.num_rows:
            raise UserError(
                f"data.max_epochs: the data last for {self.num_rows:,} rows, {rows:,} are asked for. Lower optim.steps, or allow more epochs"
            )

    def _phases(self, changes: list[tuple[int, list[float]]]) -> tuple[list[MixturePhase], int | None]:
        """Phases between changes of the weights and ends of pools, and the number of rows if it is limited."""
        per_row = np.array([pool.tokens_per_row for pool in self.pools])
        limits = np.array(self._row_limits)
        taken, row = np.zeros(len(self.pools), np.int64), 0
        phases: list[MixturePhase] = []
        waiting = list(changes)
        weights = np.array(waiting.pop(0)[1])
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
            if waiting:
                left = waiting[0][0] - float((taken * per_row).sum())
                change = row + max(1, round(left / float((phase.quotas * per_row).sum() / _BLOCK)))
                if change <= min(ends, default=change):
                    weights = np.array(waiting.pop(0)[1])
                ends.append(change)
            if not ends:
                return phases, None
            taken, row = phase.counts(min(ends)), min(ends)


def count_steps(config: TrainConfig, rows: PackedRowSampler) -> int:
    """Optimizer steps of the run.

    Raises:
        UserError: the data does not last that long.
    """
    optim = config.optim
    steps = optim.steps or math.ceil((optim.epochs or 0) * rows.rows_per_epoch / config.global_batch_size)
    rows.require(steps * config.global_batch_size)
    return steps


def _quotas(shares: np.ndarray) -> np.ndarray:
    """Whole rows of a block in proportion to the shares, at least one of each that has any: int64, sum `_BLOCK`."""
    exact = shares / shares.sum() * _BLOCK
    quotas = np.where(shares > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    for index in np.argsort(quotas - exact, kind="stable")[: max(0, _BLOCK - int(quotas.sum()))]:
        quotas[index] += 1
    quotas[np.argmax(quotas)] += _BLOCK - quotas.sum()
    return quotas


def refuse_unknown_domains(store: TokenStore, weights: dict[str, float], data: DataConfig) -> None:
    unknown = sorted(set(weights) - set(store.domains))
    if unknown:
        raise UserError(
            f"data.weights.{unknown[0]}: the store {store.path} has no such domain. It has: {', '.join(store.domains)}"
        )
    unweighed = sorted(set(data.max_epochs) - set(weights))
    if unweighed:
        raise UserError(
            f"data.max_epochs.{unweighed[0]}: limits a domain that is mixed by weight, and these have weights: "
            f"{', '.join(weights) or 'none'}. Give data.weights.{unweighed[0]} too"
        )
    for phase in data.curriculum:
        if set(phase.weights) != set(weights):
            raise UserError(
                f"data.curriculum: the phase from {phase.tokens} tokens weighs {sorted(phase.weights)}, the beginning "
                f"{sorted(weights)}. Name the same domains in all"
            )
