"""Noise on the embeddings while a model trains (NEFTune, arXiv 2310.05914)."""

from typing import Any

import torch
from torch import Tensor, nn


def add_embedding_noise(model: Any, alpha: float) -> None:
    """From now on, in training mode, the embeddings `[1, T, d]` of a fused model get uniform noise in ±alpha / sqrt(n · d),
    with n the tokens of each token's own document."""
    if not alpha:
        return

    def noisy(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        lengths = model.packing.boundaries.cu_seqlens.diff()
        tokens = lengths.repeat_interleave(lengths, output_size=output.shape[-2])
        # In float32: tokens times width leaves float16's range.
        width = alpha / (tokens.float() * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * width[:, None].to(output.dtype)

    model.get_input_embeddings().register_forward_hook(noisy)
