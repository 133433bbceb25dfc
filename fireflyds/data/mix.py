"""One endless sequence of rows from one or more domains, by token weights, as a function of the row's number."""

import bisect

import numpy as np

from fireflyds.data.pack import Pieces, Plan, cut, plan
from fireflyds.data.store import TokenStore
from fireflyds.errors import UserError


class RowSequence:
    """Row i of a training run, whatever the world size and wherever the run was resumed.

    Without weights all domains form one pool and an epoch sees each document once. With weights every domain
    is a pool of its own, repeated as often as needed, and the next row comes from the domain that is furthest
    behind its share of the tokens.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int, weights: dict[str, float]) -> None:
        self._seq_len, self._seed = seq_len, seed
        self.names = list(weights) or ["all"]
        self.pieces = [cut(store, documents, seq_len) for documents in _pools(store, weights)]
        total = sum(weights.values())
        self.shares = np.array([weight / total for weight in weights.values()] or [1.0])
        self._plans = [[self._plan(pool, 0)] for pool in range(len(self.names))]
        self._starts = [[0, len(plans[0])] for plans in self._plans]  # first row of every epoch, and the end
        for name, plans in zip(self.names, self._plans, strict=True):
            if len(plans[0]) == 0:
                raise UserError(
                    f"data.store={store.path}: domain {name} has no row of at most seq_len={seq_len} tokens. Raise seq_len"
                )
        self._choices: list[tuple[int, int]] = []  # row number -> (pool, number within the pool)
        self._taken = [0] * len(self.names)
        self.tokens = np.zeros(len(self.names))

    @property
    def rows_per_epoch(self) -> int:
        """Rows until every document of the pool that lasts longest was seen once."""
        per_pool = [len(plans[0]) / share for plans, share in zip(self._plans, self.shares, strict=True)]
        return max(1, round(float(max(per_pool))))

    def row(self, number: int) -> list[tuple[int, int, int]]:
        """The `(document, start, length)` pieces of row `number`."""
        while len(self._choices) <= number:
            self._choose()
        pool, within = self._choices[number]
        chosen, at = self._locate(pool, within)
        pieces = self.pieces[pool]
        return [(int(pieces.documents[i]), int(pieces.starts[i]), int(pieces.lengths[i])) for i in chosen.row(at)]

    def _choose(self) -> None:
        pool = int(np.argmax(self.shares * (self.tokens.sum() + self._seq_len) - self.tokens))
        within = self._taken[pool]
        chosen, at = self._locate(pool, within)
        self._choices.append((pool, within))
        self._taken[pool] += 1
        self.tokens[pool] += chosen.row_tokens[at]

    def _locate(self, pool: int, within: int) -> tuple[Plan, int]:
        """The plan and the row index in it of a pool's row; plans of later epochs are made when first needed."""
        starts, plans = self._starts[pool], self._plans[pool]
        while starts[-1] <= within:
            plans.append(self._plan(pool, len(plans)))
            starts.append(starts[-1] + len(plans[-1]))
        epoch = bisect.bisect_right(starts, within) - 1
        return plans[epoch], within - starts[epoch]

    def _plan(self, pool: int, epoch: int) -> Plan:
        return plan(self.pieces[pool].lengths, self._seq_len, self._seed + pool, epoch)


def _pools(store: TokenStore, weights: dict[str, float]) -> list[np.ndarray]:
    unknown = sorted(set(weights) - set(store.domains))
    if unknown:
        raise UserError(
            f"data.weights.{unknown[0]}: the store {store.path} has no such domain. It has: {', '.join(store.domains)}"
        )
    if not weights:
        return [np.arange(len(store))]
    return [np.flatnonzero(store.domain_ids == store.domains.index(name)) for name in weights]


def lost_to_length(pieces: list[Pieces]) -> tuple[int, int]:
    """Dialogues truncated and dropped for their length, over all pools."""
    return sum(pool.truncated for pool in pieces), sum(pool.dropped for pool in pieces)
