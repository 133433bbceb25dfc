"""Learning rate by step number."""

import math

from fireflyds.config import OptimConfig, Schedule


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return 0 if config.schedule is Schedule.constant else round(config.warmup_ratio * total_steps)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of step `step` (from 0): a linear climb to `lr`, then the schedule.

    cosine:  floor + (1 - floor) · (1 + cos(π·p)) / 2      linear:  1 - (1 - floor) · p
    with p from 0 at the end of warm-up to 1 at the last step, both times `lr`.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    floor = config.min_lr_ratio
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    match config.schedule:
        case Schedule.cosine:
            return config.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
        case Schedule.linear:
            return config.lr * (1 - (1 - floor) * progress)
        case Schedule.constant | Schedule.constant_with_warmup:
            return config.lr
