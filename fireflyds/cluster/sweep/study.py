"""Wrapper of Optuna: sampling, results and pruning of trials."""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from fireflyds.cluster.sweep import ranges
from fireflyds.config import Direction, Pruner, RangeConfig, Sampler, SearchConfig

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING
Distribution = FloatDistribution | IntDistribution | CategoricalDistribution


def distribution(key: str, one: RangeConfig) -> Distribution:
    """Returns the range of a key as an Optuna distribution."""
    if one.choices:
        return CategoricalDistribution(one.choices)
    low, high = (float(end) for end in ranges.values(key, one) if end is not None)
    if ranges.type_of(key) is int:
        return IntDistribution(int(low), int(high), log=one.log, step=int(one.step or 1))
    return FloatDistribution(low, high, log=one.log, step=one.step)


def trial_name(number: int) -> str:
    """The last part of a trial's run name, which is also its folder in that of the study."""
    return f"trial-{number:04d}"


class _NoLock(JournalFileOpenLock):
    """No-op lock of the journal: the study's folder is locked as a whole, and a lock file would remain after a kill."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Study:
    """A study in an append-only journal, which a restarted sweep continues.

    Not SQLite: run folders are often on network file systems, where its locks are unreliable.
    """

    def __init__(self, file: Path, name: str, search: SearchConfig) -> None:
        self._search = search
        self._space: dict[str, BaseDistribution] = {
            key: distribution(key, key_range) for key, key_range in search.space.items()
        }
        _truncate_partial_line(file)
        storage = JournalStorage(JournalFileBackend(str(file), lock_obj=_NoLock(str(file))))
        self.optuna = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="minimize" if search.direction is Direction.min else "maximize",
            load_if_exists=True,
            pruner=_pruner(search),
        )
        # With the same seed every restart would sample the same values again.
        self.optuna.sampler = _sampler(search, search.seed + len(self.trials))
        if search.sampler is Sampler.grid:
            for params in itertools.islice(ranges.combinations(search.space), search.trials):
                self.optuna.enqueue_trial(params, skip_if_exists=True)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All sampled trials, by number."""
        return [trial for trial in self.optuna.get_trials(deepcopy=False) if trial.state is not TrialState.WAITING]

    @property
    def wanted(self) -> int:
        """Total number of trials of the study."""
        if self._search.sampler is Sampler.grid:
            size = math.prod(len(ranges.ladder(key, key_range)) for key, key_range in self._search.space.items())
            return min(self._search.trials, size)
        return self._search.trials

    def ask(self) -> FrozenTrial:
        """Samples a trial and returns it; its state is RUNNING from now on."""
        return self._frozen(self.optuna.ask(fixed_distributions=self._space).number)

    def _frozen(self, number: int) -> FrozenTrial:
        return next(trial for trial in self.trials if trial.number == number)

    def report(self, number: int, seen: Mapping[int, float]) -> None:
        """Reports intermediate values by step; skips steps that are already reported."""
        frozen = self._frozen(number)
        trial = Trial(self.optuna, frozen._trial_id)
        for step in sorted(seen.keys() - frozen.intermediate_values.keys()):
            trial.report(seen[step], step)

    def should_prune(self, number: int) -> bool:
        """True where the pruner would stop the trial now."""
        frozen = self._frozen(number)
        return frozen.last_step is not None and self.optuna.pruner.prune(self.optuna, frozen)

    def set_attrs(self, number: int, **facts: Any) -> None:
        """Stores user attributes of a trial."""
        trial = Trial(self.optuna, self._frozen(number)._trial_id)
        for name, value in facts.items():
            trial.set_user_attr(name, value)

    def tell(self, number: int, state: TrialState, value: float | None, **facts: Any) -> None:
        """Records the final state, value and user attributes of a trial."""
        self.set_attrs(number, **facts)
        self.optuna.tell(number, value if state is COMPLETE else None, state=state)

    @property
    def best(self) -> FrozenTrial | None:
        """The best completed trial; None if there is none."""
        return self.optuna.best_trial if any(trial.state is COMPLETE for trial in self.trials) else None


def _truncate_partial_line(path: Path) -> None:
    """Truncates a partial last line that a kill left: further lines must not be appended to it."""
    if path.exists():
        with path.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


def _sampler(search: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    if search.sampler is Sampler.tpe:
        # constant_liar: running trials count as bad; otherwise concurrent trials would be sampled at the same point.
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup_trials, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(search: SearchConfig) -> optuna.pruners.BasePruner:
    if search.pruner is Pruner.median:
        return optuna.pruners.MedianPruner(n_startup_trials=search.startup_trials, n_warmup_steps=search.warmup_steps)
    if search.pruner is Pruner.hyperband:
        return optuna.pruners.HyperbandPruner(
            min_resource=max(1, search.warmup_steps), reduction_factor=search.reduction_factor
        )
    return optuna.pruners.NopPruner()


def draw_charts(study: Study, folder: Path, metric: str) -> list[Path]:
    """Draws parallel coordinates and the importance of keys, from trials that completed or were pruned late.

    Importance is computed by PED-ANOVA (https://arxiv.org/abs/2304.10255). Returns the paths of the PNG files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as charts

    completed = [trial for trial in study.trials if trial.state is COMPLETE]
    paths = []
    plots: dict[str, Callable[[], object]] = {}
    plots["parallel_coordinates.png"] = lambda: charts.plot_parallel_coordinate(study.optuna, target_name=metric)
    # Importance is undefined for a single key and for equal objective values.
    if len(study.trials[0].params) > 1 and len({trial.value for trial in completed}) > 1:
        plots["importance.png"] = lambda: charts.plot_param_importances(study.optuna, target_name=metric)
    for name, plot in plots.items() if len(completed) > 1 else ():
        plot()
        figure = pyplot.gcf()
        figure.set_size_inches(9, 5)
        figure.savefig(folder / f".{name}.partial", format="png", dpi=120, bbox_inches="tight")
        (folder / f".{name}.partial").replace(folder / name)
        pyplot.close(figure)
        paths.append(folder / name)
    return paths
