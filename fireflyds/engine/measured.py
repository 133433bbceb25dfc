"""What the statistics of a run are taken by, from its configuration, model, store and tokenizer."""

from typing import Any

import torch

from fireflyds.config import Precision, TrainConfig
from fireflyds.data.store import TokenStore
from fireflyds.engine.groups import parameter_groups
from fireflyds.engine.planning.flops import peak_flops, step_flops
from fireflyds.engine.statistics import Measured
from fireflyds.types import Encoder


def measured_by(config: TrainConfig, model: Any, store: TokenStore, encoder: Encoder, precision: Precision) -> Measured:
    """To be asked before the engine is built: ZeRO-3 takes the parameters' shapes away."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return Measured(
        domains=store.domains,
        token_bytes=encoder.token_bytes(),
        groups=[group.name for group in parameter_groups(model, config)],
        row_tokens=config.global_batch_size * config.seq_len,
        cost=step_flops(model),
        peak=peak_flops(name, precision, config.hardware.peak_tflops),
    )
