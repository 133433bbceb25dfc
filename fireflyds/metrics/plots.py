"""Pictures of a run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """The mean of every `width` values in a row.

    Blocks of `width` are summed from their start and to their end; a window is the end of one and the start of the next.
    Nothing is subtracted, so one huge loss does not blur the others.
    """
    blocks = np.zeros((-(-len(values) // width), width))
    blocks.flat[: len(values)] = values
    from_start, to_end = np.cumsum(blocks, 1).ravel(), np.cumsum(blocks[:, ::-1], 1)[:, ::-1].ravel()
    starts = np.arange(len(values) - width + 1)
    return (from_start[starts + width - 1] + np.where(starts % width, to_end[starts], 0)) / width


def plot_loss(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss over tokens, one curve per run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    try:
        for name, every in curves.items():
            rows = [row for row in every if row["loss"] is not None]
            width = max(1, len(rows) // 50)  # one step's loss says more of its documents than of the model
            means = running_mean([row["loss"] for row in rows], width)
            axes.plot([row["tokens"] for row in rows[width - 1 :]], means, label=name, linewidth=1.2)
        axes.set(xlabel="tokens", ylabel="loss per learned token (nats)")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
        figure.tight_layout()
        aside = path.with_name(f".{path.name}.partial.png")
        figure.savefig(aside)
        os.replace(aside, path)
    finally:
        pyplot.close(figure)
