"""The model of a run, ready for the engine."""

from pathlib import Path
from typing import Any

from fireflyds.config import Precision, TrainConfig
from fireflyds.engine import learnt
from fireflyds.models.fuse import fuse
from fireflyds.models.noise import add_noise
from fireflyds.models.tuning import load_tuned


def packed_model(config: TrainConfig, hf_config: Any, precision: Precision) -> Any:
    """The model in its packed forward pass, what trains marked, and what an earlier run learnt in place.

    DeepSpeed makes its 32-bit masters from the model's own number format: what an earlier run learnt is rounded to 16 bit
    once where this one trains in 16 bit.
    """
    model = fuse(load_tuned(config, hf_config, precision))
    learnt.restore(model, Path(config.run_dir))
    add_noise(model, config.optim.neftune_noise_alpha)
    if config.hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
