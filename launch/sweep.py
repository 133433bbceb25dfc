r"""Search for good values of some keys: a study of training runs, several at a time, on this machine or as Slurm jobs.

    python launch/sweep.py study=sft_lr sweep=lr_and_r experiment=demo_sft \
      sweep.trials=12 sweep.parallel=2 cluster=local_cpu
    python launch/sweep.py study=lr cluster=slurm cluster.nodes=2 model=llama-2-7b-zh \
      sweep.space.optim.lr='{low: 1e-5, high: 1e-3, log: true}' data=stores/sft tuning=qlora optim.epochs=1

Keys that are not listed here are passed to `train`, the same for every trial. A trial is a run, `<study>/trial-0000`
and so on, and can be exported like any other. The same command resumes an interrupted or killed study. Writes
`trials.md`, `trials.csv`, `best.yaml` and charts into `runs/<study>/`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fireflyds import app
from fireflyds.cluster.launchers import launcher_of
from fireflyds.cluster.sweep import ranges
from fireflyds.cluster.sweep.ranges import Value
from fireflyds.config import SweepConfig, TrackerKind
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text
from fireflyds.runs import config_diff

# Keys of `sweep` that may change when a study is resumed.
FREE = ("trials", "parallel", "poll_seconds", "retries", "pruner", "startup_trials", "warmup_steps", "reduction_factor")


def sweep(config: SweepConfig, overrides: list[str]) -> None:
    """Runs or resumes the study and prints its results.

    `rest` are the arguments for `train`, the same in every trial.

    Raises:
        UserError: a range or an argument is invalid, the study has other settings, or no trial completed.
    """
    if reserved := [word for word in overrides if word.lstrip("+").startswith(("run=", "runs=", "tracking.group="))]:
        raise UserError(
            f"trials get theirs from study={config.study} and runs={config.runs}", key=reserved[0], remedy="Remove it"
        )
    # Heavy imports are deferred until the configuration is validated.
    from fireflyds.cluster.sweep import trial_table
    from fireflyds.cluster.sweep.study import Study
    from fireflyds.cluster.sweep.sweep_runner import Sweep, only_one, run_name

    folder = Path(config.runs) / config.study

    def freeze(run: str, params: Mapping[str, Value]) -> str:
        composed = app.compose("train", [*overrides, *ranges.words(params), f"run={run}", f"runs={config.runs}"])
        if composed.tracking.kind is not TrackerKind.none:
            composed.tracking.group = config.study
        composed.accumulation_steps(config.cluster.world_size)
        return app.to_yaml(composed)

    # Every range is validated before the first trial starts.
    for key, key_range in config.sweep.space.items():
        for value in ranges.values(key, key_range):
            try:
                freeze(run_name(config.study, 0), {key: value})
            except UserError as error:
                raise error.within(f"sweep.space.{key}, at {value}") from error
    launcher = launcher_of(config.cluster, config.sweep.parallel)
    with only_one(folder):
        _require_same_study(folder, config, overrides)
        study = Study(folder / "study.journal", config.study, config.sweep)
        finished = Sweep(study, config.sweep, config.study, folder, freeze, launcher).run()
        print(trial_table.write(study, config.sweep, config.study, folder, overrides))
    if not finished:
        raise KeyboardInterrupt
    if study.best is None:
        raise UserError(
            "no trial completed", key="study", value=config.study, remedy=f"See {folder / 'trials.md'} for the reasons"
        )


def _require_same_study(folder: Path, config: SweepConfig, overrides: list[str]) -> None:
    """Raises `UserError` if the study was started with other settings: its trials must be comparable."""
    search = app.plain(app.to_yaml(config))["sweep"]
    settings: dict[str, Any] = {"train": sorted(overrides)} | {
        key: value for key, value in search.items() if key not in FREE
    }
    file = folder / "study.json"
    if file.exists() and (changed := config_diff.diff_configs(json.loads(file.read_text(encoding="utf-8")), settings)):
        raise UserError(
            f"was started with other settings ({'; '.join(changed)})",
            key="study",
            value=config.study,
            remedy="Give another study=, or the same settings to resume",
        )
    atomic_write_text(file, json.dumps(settings, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    app.main(sweep, __doc__, passes_on=True)
