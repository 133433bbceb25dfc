"""Plots of a run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """The moving average over `width` consecutive values: `[n - width + 1]`.

    Prefix and suffix sums are computed within blocks of `width`: a window is the suffix of one block plus the prefix of
    the next. Nothing is subtracted, so one very large loss causes no cancellation error in other windows.
    """
    blocks = np.zeros((-(-len(values) // width), width))
    blocks.flat[: len(values)] = values
    from_start, to_end = np.cumsum(blocks, 1).ravel(), np.cumsum(blocks[:, ::-1], 1)[:, ::-1].ravel()
    starts = np.arange(len(values) - width + 1)
    return (from_start[starts + width - 1] + np.where(starts % width, to_end[starts], 0)) / width


def plot_loss(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plots the loss over tokens, one curve per run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    try:
        for name, history in curves.items():
            rows = [row for row in history if row["loss"] is not None]
            width = max(1, len(rows) // 50)  # the loss of one step depends mostly on its documents
            means = running_mean([row["loss"] for row in rows], width)
            axes.plot([row["tokens"] for row in rows[width - 1 :]], means, label=name, linewidth=1.2)
        axes.set(xlabel="tokens", ylabel="loss per learned token (nats)")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
        figure.tight_layout()
        partial = path.with_name(f".{path.name}.partial.png")
        figure.savefig(partial)
        os.replace(partial, path)
    finally:
        pyplot.close(figure)
