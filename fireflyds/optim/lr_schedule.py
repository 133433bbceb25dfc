"""Learning rate by step number."""

import math

from fireflyds.config import OptimConfig, Schedule


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return 0 if config.schedule is Schedule.constant else round(config.warmup_ratio * total_steps)


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """The share of its peak that a learning rate has at step `step` (from 0): a linear climb, then the schedule.

    cosine      floor + (1 - floor) · (1 + cos(π·p)) / 2
    linear      1 - (1 - floor) · p
    polynomial  floor + (1 - floor) · (1 - p)^power
    wsd         1, and in the last `decay_ratio` of all steps linear to the floor (warm-up, stable, decay; arXiv 2404.06395)
    with p from 0 at the end of warm-up to 1 at the last step.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    floor = config.min_lr_ratio
    last = total_steps - 1
    progress = min(1.0, (step - warmup) / max(1, last - warmup))
    match config.schedule:
        case Schedule.cosine:
            return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
        case Schedule.linear:
            return 1 - (1 - floor) * progress
        case Schedule.polynomial:
            return floor + (1 - floor) * (1 - progress) ** config.power
        case Schedule.wsd:
            falling = max(1, round(config.decay_ratio * total_steps))
            return (
                1 - (1 - floor) * min(1.0, max(0.0, (step - (last - falling)) / falling)) if config.decay_ratio else 1.0
            )
        case Schedule.constant | Schedule.constant_with_warmup:
            return 1.0
