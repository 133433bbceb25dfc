"""Initial values of the embedding and output-head rows of new pieces."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fireflyds.config import HeadInit, RowInit

# The a of smooth inverse frequency (Arora et al. 2017, "A simple but tough-to-beat baseline for sentence embeddings").
_SIF_A = 1e-3


# New rows that are summed at once.
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class SparseSums:
    """New rows as sums of old ones: `weights` float32 `[n, k]` times the rows `indices` int64 `[n, k]`, for those of
    `known` bool `[n]`; the others have no sum."""

    indices: torch.Tensor
    weights: torch.Tensor
    known: torch.Tensor

    def of(self, old: torch.Tensor) -> torch.Tensor:
        """Returns the sums of the rows of `old` (or of the values of a bias), in float32."""
        columns = old if old.dim() == 2 else old[:, None]
        parts = zip(self.indices.split(_CHUNK), self.weights.split(_CHUNK), strict=True)
        rows = torch.cat([(weights[:, None, :] @ columns[indices].float())[:, 0] for indices, weights in parts])
        return rows if old.dim() == 2 else rows[:, 0]


@dataclass(frozen=True, slots=True)
class NewRows:
    """Initialisation of rows for new pieces: new row i, at index `num_tokens + i`, is computed from `old_ids[i]`.

    `frequency`, `[num_tokens]`: the relative frequency of each old token in text, for `weighted`.
    """

    num_tokens: int
    old_ids: Sequence[Sequence[int]]
    init: RowInit
    seed: int
    frequency: np.ndarray | None = None
    init_head: HeadInit = HeadInit.same
    donated: tuple[SparseSums, SparseSums] | None = None
    """For `omp`: the sums for the embeddings and for the head."""

    def make(self, weight: torch.Tensor, *, is_head: bool = False) -> torch.Tensor:
        """Returns new rows `[len(old_ids), D]` for `weight` `[V, D]` (`[len(old_ids)]` for a bias `[V]`), in its dtype.

        `mean`: the mean of the piece's old rows (as in Linly and Ziya; the published script of HIT includes `<s>` and
        `▁` in every mean, which `old_ids` excludes). `weighted`: the weighted mean with weights a / (a + p), where p is
        the relative frequency of the token, so that very frequent byte tokens have smaller weights. `random`: samples
        of a normal distribution with the old rows' mean and covariance. `omp`: sums found in a donor model, and
        the mean for a piece without one. All are computed in float32.

        `is_head`: the rows of an output head, for which `init_head` counts. Its `first_piece` is the old row of the
        token that the base writes first for the piece.
        """
        old = weight[: self.num_tokens]
        if is_head and self.init_head is HeadInit.first_piece:
            return old[[ids[0] for ids in self.old_ids]].clone()
        init = RowInit.mean if is_head and self.init_head is HeadInit.mean else self.init
        if init is RowInit.random:
            return _normal_like(old, len(self.old_ids), self.seed).to(weight.dtype)
        means = {ids: self._mean(old, list(ids), init) for ids in {tuple(ids) for ids in self.old_ids}}
        rows = torch.stack([means[tuple(ids)] for ids in self.old_ids])
        if init is RowInit.omp and self.donated is not None:
            sums = self.donated[is_head]
            rows[sums.known] = sums.of(old)[sums.known]
        return rows.to(weight.dtype)

    def grow(self, weight: torch.Tensor, *, is_head: bool = False) -> torch.Tensor:
        """Returns the rows of the base's tokens followed by the new rows: `[num_tokens + len(old_ids), ...]`."""
        return torch.cat([weight[: self.num_tokens], self.make(weight, is_head=is_head)])

    def _mean(self, old: torch.Tensor, ids: list[int], init: RowInit) -> torch.Tensor:
        rows = old[ids].float()
        if init is not RowInit.weighted or self.frequency is None:
            return rows.mean(0)
        weights = torch.from_numpy(_SIF_A / (_SIF_A + self.frequency[ids])).float()
        return torch.tensordot(weights / weights.sum(), rows, dims=1)


def _normal_like(old: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Returns `count` samples of the normal distribution with the mean and covariance of the rows of `old`."""
    generator = torch.Generator().manual_seed(seed)
    columns = old if old.dim() == 2 else old[:, None]
    width = columns.shape[1]
    mean = columns.float().mean(0)
    covariance = torch.zeros(width, width)
    for chunk in columns.split(8192):
        centred = chunk.float() - mean
        covariance += centred.T @ centred
    covariance /= len(columns)
    # With fewer rows than columns the covariance is singular; the jitter is negligible against its diagonal.
    jitter = 1e-6 * covariance.diagonal().mean() + 1e-30
    cholesky = torch.linalg.cholesky(covariance + jitter * torch.eye(width))
    samples = mean + torch.randn(count, width, generator=generator) @ cholesky.T
    return samples if old.dim() == 2 else samples[:, 0]
