"""NEFTune: uniform noise on the token embeddings during training (arXiv 2310.05914)."""

from typing import Any

import torch
from torch import Tensor, nn


def add_embedding_noise(model: Any, alpha: float) -> None:
    """Registers a forward hook on the input embeddings of a fused model that adds noise in training mode.

    The embeddings `[1, T, d]` get uniform noise in ±alpha / sqrt(n · d), where n is the number of tokens of the
    document that a position belongs to. `alpha` 0 registers nothing.
    """
    if not alpha:
        return

    def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        lengths = model.packing.boundaries.cu_seqlens.diff()
        document_lengths = lengths.repeat_interleave(lengths, output_size=output.shape[-2])
        # In float32: n · d exceeds the range of float16.
        magnitude = alpha / (document_lengths.float() * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * magnitude[:, None].to(output.dtype)

    model.get_input_embeddings().register_forward_hook(add_noise)
