"""The door to Optuna: what is drawn, what has come of it, and what is not worth going on with."""

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
    """The range of a key as Optuna has it."""
    if one.choices:
        return CategoricalDistribution(one.choices)
    low, high = (float(end) for end in ranges.values(key, one) if end is not None)
    if ranges.type_of(key) is int:
        return IntDistribution(int(low), int(high), log=one.log, step=int(one.step or 1))
    return FloatDistribution(low, high, log=one.log, step=one.step)


class _Alone(JournalFileOpenLock):
    """The study's folder is locked as a whole; a lock of the journal's own would outlive a kill."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Study:
    """One study in a journal, which is only ever written on: it outlives its process, and a second start goes on with it.

    Not SQLite: folders of runs are shared by network file systems, on which its locks do not hold.
    """

    def __init__(self, file: Path, name: str, search: SearchConfig) -> None:
        self._search = search
        self._space: dict[str, BaseDistribution] = {key: distribution(key, one) for key, one in search.space.items()}
        _cut_half_a_line(file)
        storage = JournalStorage(JournalFileBackend(str(file), lock_obj=_Alone(str(file))))
        self.optuna = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="minimize" if search.direction is Direction.min else "maximize",
            load_if_exists=True,
            pruner=_pruner(search),
        )
        # The same seed would draw the same values again after every start.
        self.optuna.sampler = _sampler(search, search.seed + len(self.trials))
        if search.sampler is Sampler.grid:
            for params in itertools.islice(ranges.combinations(search.space), search.trials):
                self.optuna.enqueue_trial(params, skip_if_exists=True)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All that were drawn, in order."""
        return [trial for trial in self.optuna.get_trials(deepcopy=False) if trial.state is not TrialState.WAITING]

    @property
    def wanted(self) -> int:
        """Trials in all."""
        if self._search.sampler is Sampler.grid:
            size = math.prod(len(ranges.ladder(key, one)) for key, one in self._search.space.items())
            return min(self._search.trials, size)
        return self._search.trials

    def ask(self) -> FrozenTrial:
        """A new trial; it counts as running from now on."""
        return self._frozen(self.optuna.ask(fixed_distributions=self._space).number)

    def _frozen(self, number: int) -> FrozenTrial:
        return next(trial for trial in self.trials if trial.number == number)

    def report(self, number: int, seen: Mapping[int, float]) -> None:
        """Values by step; those known already are passed over."""
        frozen = self._frozen(number)
        trial = Trial(self.optuna, frozen._trial_id)
        for step in sorted(seen.keys() - frozen.intermediate_values.keys()):
            trial.report(seen[step], step)

    def should_prune(self, number: int) -> bool:
        """Whether the pruner would end the trial now."""
        found = self._frozen(number)
        return found.last_step is not None and self.optuna.pruner.prune(self.optuna, found)

    def set_attrs(self, number: int, **facts: Any) -> None:
        """Keep something with a trial."""
        trial = Trial(self.optuna, self._frozen(number)._trial_id)
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)

    def tell(self, number: int, state: TrialState, value: float | None, **facts: Any) -> None:
        """A trial has ended."""
        self.set_attrs(number, **facts)
        self.optuna.tell(number, value if state is COMPLETE else None, state=state)

    @property
    def best(self) -> FrozenTrial | None:
        """The best of those that were not pruned."""
        return self.optuna.best_trial if any(trial.state is COMPLETE for trial in self.trials) else None


def _cut_half_a_line(journal: Path) -> None:
    """What a kill left of a line that was being written: nothing may be written behind it."""
    if journal.exists():
        with journal.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


def _sampler(search: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    if search.sampler is Sampler.tpe:
        # Those that still run count as bad, or several at once would all be drawn at the same place.
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
    """Parallel coordinates, and which key matters, from the trials that ended or were pruned late.

    The importance of a key is PED-ANOVA's (https://arxiv.org/abs/2304.10255).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as charts

    done = [trial for trial in study.trials if trial.state is COMPLETE]
    made = []
    plots: dict[str, Callable[[], object]] = {}
    plots["parallel_coordinates.png"] = lambda: charts.plot_parallel_coordinate(study.optuna, target_name=metric)
    # Of one key, or of equal values, there is nothing to weigh.
    if len(study.trials[0].params) > 1 and len({trial.value for trial in done}) > 1:
        plots["importance.png"] = lambda: charts.plot_param_importances(study.optuna, target_name=metric)
    for name, plot in plots.items() if len(done) > 1 else ():
        plot()
        figure = pyplot.gcf()
        figure.set_size_inches(9, 5)
        figure.savefig(folder / f".{name}.partial", format="png", dpi=120, bbox_inches="tight")
        (folder / f".{name}.partial").replace(folder / name)
        pyplot.close(figure)
        made.append(folder / name)
    return made
