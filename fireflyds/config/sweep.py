"""Options of a study: a hyperparameter search over short training runs."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from fireflyds.config.cluster import ClusterConfig
from fireflyds.config.enums import Direction, ObjectiveAt, Pruner, Sampler, require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class RangeConfig:
    """Search range of one key: `choices`, or numbers from `low` to `high`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: list[Any] = field(default_factory=list)

    def require_sound(self, name: str) -> None:
        """Raises `UserError` where the range is incomplete or contradictory; `name` is its key."""
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise UserError(
                "needs either choices, such as [1e-4, 3e-4], or low and high", key=name, remedy="Give one of them"
            )
        if self.choices:
            return
        if self.low is None or self.high is None or self.low >= self.high:
            raise UserError(
                f"low={self.low}, high={self.high}: both must be given, low less than high",
                key=name,
                remedy="Give both, or choices=[...]",
            )
        if self.log and (self.low <= 0 or self.step):
            raise UserError(
                f"log=true, low={self.low}, step={self.step}: needs low above 0 and no step",
                key=name,
                remedy="Raise low and leave out step, or leave out log",
            )
        if self.step is not None and self.step <= 0:
            raise UserError(
                f"step={self.step}: must be greater than 0", key=name, remedy="Leave it out for a range without steps"
            )


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """Section `sweep`: the search space, the sampler and the pruner of a study."""

    space: dict[str, RangeConfig] = field(default_factory=dict)
    """Keys of `train` and their search ranges, such as `sweep.space.optim.lr={low: 1e-5, high: 1e-3, log: true}` or
    `sweep.space.tuning.r=[4, 8, 16]`, the same as `{choices: [4, 8, 16]}`; the range of an integer key contains
    integers; `step` makes a range discrete."""
    sampler: Sampler = Sampler.tpe
    """`tpe` uses the results of earlier trials, `random` does not, `grid` runs all combinations (ranges need `step` or
    `choices`)."""
    trials: int = 20
    """Number of trials; with `grid` the maximum."""
    parallel: int = 1
    """Number of concurrent trials."""
    metric: str = "loss"
    """Metric of `metrics.jsonl` or `validation.jsonl` to optimize, such as `validation/bits_per_byte/zh`."""
    direction: Direction = Direction.min
    """`min` minimizes the metric, `max` maximizes it."""
    value: ObjectiveAt = ObjectiveAt.last
    """Value of a trial: the `last`, the `best`, or the first `at_tokens`."""
    tokens: int | None = None
    """`value=at_tokens`: number of trained tokens at which the value is taken."""
    pruner: Pruner = Pruner.median
    """`median` stops a trial that is worse than the median of the others at the same step, `hyperband` allocates steps
    in brackets, `none` stops none."""
    startup_trials: int = 4
    """Number of trials before results are used for sampling or pruning."""
    warmup_steps: int = 0
    """No trial is pruned before this step."""
    reduction_factor: int = 3
    """`hyperband`: one in this many trials is promoted to the next rung."""
    retries: int = 3
    """Maximum number of restarts, from its checkpoint, of a trial whose processes failed."""
    poll_seconds: float = 5.0
    """Seconds between two checks of the running trials."""
    seed: int = 0
    """Random seed of the sampler."""

    def __post_init__(self) -> None:
        require_at_least(self, "sweep.", trials=1, parallel=1, startup_trials=1, warmup_steps=0, reduction_factor=2)
        require_at_least(self, "sweep.", retries=0, poll_seconds=0.05, tokens=1)
        if (self.value is ObjectiveAt.at_tokens) != (self.tokens is not None):
            raise UserError(
                f"value=at_tokens and sweep.tokens (here {self.tokens}) go together",
                key="sweep.value",
                value=self.value.name,
                remedy="Give both value=at_tokens and tokens, or neither",
            )
        if not self.space:
            raise UserError(
                "is empty",
                key="sweep.space",
                remedy="Give a range, such as sweep.space.optim.lr={low: 1e-5, high: 1e-3, log: true}, "
                "or a file of conf/sweep",
            )
        for key, search_range in self.space.items():
            search_range.require_sound(f"sweep.space.{key}")
            if self.sampler is Sampler.grid and not search_range.choices and search_range.step is None:
                raise UserError(
                    "sweep.sampler=grid tries all values", key=f"sweep.space.{key}", remedy="Give choices or step"
                )


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """Keys of the verb `sweep`."""

    study: str = MISSING
    """Name of the study and of its folder below `runs`. Trials are the runs `<study>/trial-0000` and following. A study
    started with an existing name is resumed."""
    runs: str = "runs"
    """Folder that contains the runs."""
    sweep: SearchConfig = MISSING
    cluster: ClusterConfig = MISSING

    def __post_init__(self) -> None:
        if not self.study or self.study.startswith("/") or ".." in self.study.split("/"):
            raise UserError(
                "must be a name below the folder of runs",
                key="study",
                value=f"{self.study!r}",
                remedy="Give a name such as study=lr",
            )
