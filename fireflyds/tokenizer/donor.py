"""New embedding rows from a donor: a model whose tokenizer has the new pieces, and tokens in common with the base.

A donor's row of a piece is expressed as a sparse sum of the donor's rows of common tokens (orthogonal matching
pursuit); the same sum of the base's rows of these tokens is the new row. No training is needed, and the two models may
have rows of different widths ("Training-free tokenizer transplantation via orthogonal matching pursuit", arXiv
2506.06607).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fireflyds.errors import UserError
from fireflyds.progress import Progress
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.row_init import SparseSums
from fireflyds.tokenizer.rows import EMBEDDINGS, HEADS, MAX_PADDING
from fireflyds.tokenizer.weight_files import weight_readers
from fireflyds.types import Encoder

# Pieces that are computed together: their correlations with all common tokens are held in memory.
_BATCH = 512
# Against singular systems where common tokens have equal rows, relative to the diagonal.
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class DonorRows:
    """The sums for the embeddings and, where the donor's head is a matrix of its own, for the head; and the counts of
    the report: `common` tokens, and pieces by how the donor writes them."""

    embeddings: SparseSums
    head: SparseSums
    counts: dict[str, int]


def check_donor(folder: Path, base: Path) -> None:
    """Raises `UserError`, before pieces are learned, where the base has no rows or the donor is no whole model."""
    if not (base / "config.json").is_file():
        raise UserError(
            f"base={base} is a tokenizer alone, which has no rows to make",
            key="donor",
            value=folder,
            remedy="Give the directory of a model as base, or leave out init=omp and donor",
        )
    try:
        load_encoder(folder)
        weight_readers(folder)
    except UserError as error:
        remedy = "Give the directory of a whole model"
        raise UserError(
            f"is no model with a tokenizer ({error.rule})", key="donor", value=folder, remedy=remedy
        ) from error


def donor_rows(folder: Path, base: Encoder, texts: Sequence[str | None], num_terms: int) -> DonorRows:
    """Returns the new rows of the pieces with `texts` as sums of `num_terms` rows of the base.

    A piece that the donor writes in several tokens is the mean of their rows. None, or a text that the donor cannot
    write, gets no sum.

    Raises:
        UserError: the donor has no weights, its rows do not belong to its tokenizer, or too few tokens are common.
    """
    encoder = load_encoder(folder)
    embeddings, head = _matrices(folder, encoder.vocab_size)
    common = _common_tokens(base, encoder)
    if len(common) < num_terms:
        raise UserError(
            f"has {len(common):,} tokens in common with the base, fewer than donor_terms={num_terms}",
            key="donor",
            value=folder,
            remedy="Give a model whose tokenizer shares more text with the base's, or init=mean",
        )
    ids = [[] if text is None else _ids(encoder, text) for text in texts]
    counts = {
        "common": len(common),
        "single": sum(len(row) == 1 for row in ids),
        "several": sum(len(row) > 1 for row in ids),
        "none": sum(not row for row in ids),
    }
    of_embeddings = _sums(embeddings, common, ids, num_terms, "embeddings")
    of_head = of_embeddings if head is None else _sums(head, common, ids, num_terms, "head")
    return DonorRows(of_embeddings, of_head, counts)


def _ids(encoder: Encoder, text: str) -> list[int]:
    ids = encoder.encode(text, continues=True)
    return [] if encoder.unknown_id in ids else ids


def _matrices(folder: Path, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The embeddings of a model and the head, if it is another matrix; one row per token."""
    embeddings = head = None
    for _, read in weight_readers(folder):
        for name, tensor in read():
            if name.endswith(EMBEDDINGS):
                embeddings = tensor
            elif name in HEADS and tensor.dim() == 2:
                head = tensor
    if embeddings is None or not 0 <= len(embeddings) - num_tokens < MAX_PADDING:
        rows = "no embeddings" if embeddings is None else f"embeddings of {len(embeddings):,} rows"
        raise UserError(
            f"has {rows}, and a tokenizer with {num_tokens:,} tokens",
            key="donor",
            value=folder,
            remedy="Give the directory of a whole model",
        )
    return embeddings[:num_tokens], None if head is None else head[:num_tokens]


def _common_tokens(base: Encoder, donor: Encoder) -> np.ndarray:
    """The ids of tokens with the same text in both: `[n, 2]`, of the base and of the donor."""
    by_text = {text: index for index, text in _texts(donor)}
    return np.array([(index, by_text[text]) for index, text in _texts(base) if text in by_text], np.int64).reshape(
        -1, 2
    )


def _texts(encoder: Encoder) -> Iterator[tuple[int, str]]:
    """Yields the tokens that are text by themselves; special tokens and parts of characters are none."""
    fragments, num_bytes = encoder.fragments(), encoder.token_bytes()
    for index in range(encoder.vocab_size):
        if num_bytes[index] and index not in fragments:
            yield index, encoder.token(index)


def _sums(
    matrix: torch.Tensor, common: np.ndarray, ids: Sequence[Sequence[int]], num_terms: int, name: str
) -> SparseSums:
    known = [number for number, row in enumerate(ids) if row]
    indices = np.zeros((len(ids), num_terms), np.int64)
    weights = torch.zeros(len(ids), num_terms)
    points = matrix[common[:, 1]].float()
    row_bytes = points.shape[1] * points.element_size()
    with Progress(f"expand: rows of the donor's {name}", len(known) * row_bytes) as progress:
        for start in range(0, len(known), _BATCH):
            batch = known[start : start + _BATCH]
            targets = torch.stack([matrix[list(ids[number])].float().mean(0) for number in batch])
            chosen, values = matching_pursuit(points, targets, num_terms)
            indices[batch] = common[chosen.numpy(), 0]
            weights[batch] = values
            progress.advance(len(batch) * row_bytes, len(batch))
    return SparseSums(torch.from_numpy(indices), weights, torch.tensor([bool(row) for row in ids]))


def matching_pursuit(points: torch.Tensor, targets: torch.Tensor, num_terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximates every row of `targets` `[m, D]` by a sum of `num_terms` rows of `points` `[n, D]`.

    Orthogonal matching pursuit (Pati et al. 1993): the row whose direction correlates most with what is left is added,
    then all weights are fitted anew by least squares.

    Returns:
        The chosen rows, int64 `[m, num_terms]`, and their weights, float32 `[m, num_terms]`.
    """
    directions = points / points.norm(dim=1, keepdim=True).clamp_min(1e-12)
    chosen = torch.zeros(len(targets), 0, dtype=torch.int64)
    weights, residual = torch.zeros(len(targets), 0), targets
    for _ in range(num_terms):
        scores = (residual @ directions.T).abs_().scatter_(1, chosen, -1.0)
        chosen = torch.cat([chosen, scores.argmax(1, keepdim=True)], dim=1)
        terms = points[chosen]  # [m, k, D]
        gram = terms @ terms.transpose(1, 2)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + 1e-30
        weights = torch.linalg.solve(gram, (terms @ targets[:, :, None])[..., 0])
        residual = targets - (weights[:, None, :] @ terms)[:, 0]
    return chosen, weights
