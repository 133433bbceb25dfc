"""Learning-rate schedules: warm-up length, and learning rate as a function of the step."""

import math

from fireflyds.config import OptimConfig, Schedule


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Returns the number of warm-up steps: `warmup_steps`, or `warmup_ratio` of all steps (0 for `constant`)."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return 0 if config.schedule is Schedule.constant else round(config.warmup_ratio * total_steps)


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Returns the learning rate at `step` (from 0) as a fraction of its peak: linear warm-up, then the schedule.

    cosine      floor + (1 - floor) · (1 + cos(π·p)) / 2
    linear      1 - (1 - floor) · p
    polynomial  floor + (1 - floor) · (1 - p)^power
    wsd         1, then linear to the floor over the last `decay_ratio` of all steps (arXiv 2404.06395)

    floor is `min_lr_ratio`; p increases from 0 at the end of warm-up to 1 at the last step.
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
            if not config.decay_ratio:
                return 1.0
            decay_steps = max(1, round(config.decay_ratio * total_steps))
            return 1 - (1 - floor) * min(1.0, max(0.0, (step - (last - decay_steps)) / decay_steps))
        case Schedule.constant | Schedule.constant_with_warmup:
            return 1.0
