"""The logic of a study, with simulated runs; with real ones: test_real_sweeps.py and test_slurm.py."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from fireflyds import app
from fireflyds.cluster import slurm, watch
from fireflyds.cluster.sweep import ranges, trial_table
from fireflyds.cluster.sweep.study import Study
from fireflyds.cluster.sweep.sweep_runner import Sweep
from fireflyds.config import Direction, ObjectiveAt, Pruner, RangeConfig, Sampler, SearchConfig
from fireflyds.errors import UserError

STEPS = 8


class KilledError(BaseException):
    """Simulates the death of the sweep's process."""


class FakeRuns:
    """Simulated runs. The loss grows with the distance of `lr` from 0.1; every call of `is_running` is one step."""

    def __init__(self, folder: Path, kill_at: int | None = None) -> None:
        self.folder, self.kill_at = folder, kill_at
        self.calls, self.started, self.slots, self.alive = 0, [], {}, {}
        self.failures = {}
        """Failure of a run by name: the fields of its `status.json`, or None for processes that write none."""

    def _count_call(self) -> None:
        self.calls += 1
        if self.calls == self.kill_at:
            raise KilledError

    def start(self, run_dir: Path, slot: int) -> None:
        self._count_call()
        self.started.append(run_dir.name)
        self.alive[run_dir] = True
        assert slot not in [self.slots[other] for other, alive in self.alive.items() if alive and other != run_dir]
        self.slots[run_dir] = slot
        (run_dir / "logs").mkdir(exist_ok=True)
        self._write_status(run_dir, "running")
        self._count_call()

    def is_running(self, run_dir: Path) -> bool:
        self._count_call()
        if self.alive.get(run_dir):
            self._advance(run_dir)
        return self.alive.get(run_dir, False)

    def stop(self, run_dir: Path) -> bool:
        return False

    def kill(self, run_dir: Path) -> None:
        self.alive[run_dir] = False

    def _advance(self, run_dir: Path) -> None:
        num_steps = len(watch.metric_history(run_dir, "loss"))
        if run_dir.name in self.failures and num_steps == 2:
            self.alive[run_dir] = False
            status = self.failures.pop(run_dir.name)
            return None if status is None else self._write_status(run_dir, **status)
        if (run_dir / "STOP").exists():
            self.alive[run_dir] = False
            return self._write_status(run_dir, "stopped", exit_code=76, message="STOP file")
        params = json.loads((run_dir / "config.yaml").read_text())
        loss = abs(params["lr"] - 0.1) + 1 / (num_steps + 1)
        row = {"step": num_steps + 1, "loss": loss, "tokens": 100 * (num_steps + 1), "seconds": 1.0}
        with (run_dir / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        if num_steps + 1 == STEPS:
            self.alive[run_dir] = False
            self._write_status(run_dir, "finished", exit_code=0)
        return None

    def _write_status(
        self, run_dir: Path, state: str, exit_code: int | None = None, message: str = "", kind: str = ""
    ) -> None:
        status = {
            "state": state,
            "exit_code": exit_code,
            "message": message,
            "kind": kind,
            "step": 0,
            "total_steps": STEPS,
        }
        (run_dir / "status.json").write_text(json.dumps(status))


def search_config(**changes) -> SearchConfig:
    space = {"optim.lr": RangeConfig(low=0.01, high=0.9)}
    defaults = {
        "space": space,
        "trials": 6,
        "parallel": 2,
        "poll_seconds": 0.05,
        "startup_trials": 2,
        "pruner": Pruner.none,
    }
    return SearchConfig(**(defaults | changes))


def freeze(run: str, params) -> str:
    return json.dumps({"run": run, "lr": params.get("optim.lr", 0.1)})


def run(folder: Path, fake_runs: FakeRuns, config: SearchConfig) -> Study:
    folder.mkdir(exist_ok=True)
    study = Study(folder / "study.journal", "s", config)
    assert Sweep(study, config, "s", folder, freeze, fake_runs).run()
    return study


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fireflyds.cluster.sweep.sweep_runner.time.sleep", lambda seconds: None)


def test_every_trial_is_started_once_and_its_value_recorded(tmp_path: Path) -> None:
    fake_runs = FakeRuns(tmp_path)
    study = run(tmp_path, fake_runs, search_config())
    assert fake_runs.started == [f"trial-{number:04d}" for number in range(6)]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6
    for trial in study.trials:
        assert trial.value == pytest.approx(abs(trial.params["optim.lr"] - 0.1) + 1 / STEPS)
        assert trial.user_attrs["outcome"] == "finished"
        assert (trial.user_attrs["steps"], trial.user_attrs["tokens"], trial.user_attrs["seconds"]) == (8, 800, 8.0)
    assert study.best is not None
    assert study.best.value == min(trial.value for trial in study.trials)


def test_a_sweep_killed_at_any_call_starts_no_trial_twice(tmp_path: Path) -> None:
    uninterrupted = FakeRuns(tmp_path / "whole")
    run(tmp_path / "whole", uninterrupted, search_config(trials=3))
    assert uninterrupted.calls > 20
    for call_index in range(1, uninterrupted.calls + 1):
        folder = tmp_path / str(call_index)
        fake_runs = FakeRuns(folder, kill_at=call_index)
        with pytest.raises(KilledError):
            run(folder, fake_runs, search_config(trials=3))
        study = run(folder, fake_runs, search_config(trials=3))
        assert sorted(fake_runs.started) == ["trial-0000", "trial-0001", "trial-0002"]
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
        assert len({trial.params["optim.lr"] for trial in study.trials}) == 3


def test_a_truncated_line_of_the_journal_is_ignored(tmp_path: Path) -> None:
    run(tmp_path, FakeRuns(tmp_path), search_config(trials=2))
    with (tmp_path / "study.journal").open("a") as stream:
        stream.write('{"op_code": 4, "worker')
    assert [trial.state.name for trial in run(tmp_path, FakeRuns(tmp_path), search_config(trials=3)).trials] == [
        "COMPLETE"
    ] * 3
    assert len(run(tmp_path, FakeRuns(tmp_path), search_config(trials=3)).trials) == 3


def test_a_grid_tries_every_combination_once(tmp_path: Path) -> None:
    space = {"optim.lr": RangeConfig(low=0.1, high=0.3, step=0.1), "tuning.r": RangeConfig(choices=[4, 8])}
    config = search_config(space=space, sampler=Sampler.grid, trials=20)
    study = run(tmp_path, FakeRuns(tmp_path), config)
    combinations = sorted((trial.params["optim.lr"], trial.params["tuning.r"]) for trial in study.trials)
    assert combinations == [(lr, r) for lr in (0.1, 0.2, 0.3) for r in (4, 8)]
    assert len(run(tmp_path, FakeRuns(tmp_path), config).trials) == 6


def test_a_grid_is_cut_at_the_number_of_trials(tmp_path: Path) -> None:
    space = {"optim.lr": RangeConfig(low=0.1, high=0.9, step=0.1)}
    assert (
        len(run(tmp_path, FakeRuns(tmp_path), search_config(space=space, sampler=Sampler.grid, trials=4)).trials) == 4
    )


@pytest.mark.parametrize("pruner", [Pruner.median, Pruner.hyperband])
def test_bad_trials_are_stopped_and_recorded_as_pruned(tmp_path: Path, pruner: Pruner, capsys) -> None:
    study = run(tmp_path, FakeRuns(tmp_path), search_config(trials=16, pruner=pruner, reduction_factor=2))
    pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
    assert 3 <= len(pruned) <= 13
    assert all(trial.user_attrs["outcome"] == "pruned" and 1 <= trial.user_attrs["steps"] < STEPS for trial in pruned)
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert min(trial.user_attrs["last_value"] for trial in complete) < 0.3
    if pruner is Pruner.median:
        # Pruned trials are worse than complete ones.
        mean_distance = [
            sum(abs(trial.params["optim.lr"] - 0.1) for trial in trials) / len(trials) for trials in (complete, pruned)
        ]
        assert mean_distance[0] < mean_distance[1]
    assert "pruned at step" in capsys.readouterr().out
    assert not list(tmp_path.rglob("STOP"))


def test_tpe_finds_better_values_than_random_sampling(tmp_path: Path) -> None:
    total_distance = {}
    for sampler in (Sampler.tpe, Sampler.random):
        study = run(
            tmp_path / sampler.name, FakeRuns(tmp_path), search_config(trials=24, sampler=sampler, startup_trials=6)
        )
        total_distance[sampler] = sum(abs(trial.params["optim.lr"] - 0.1) for trial in study.trials[12:])
    assert total_distance[Sampler.tpe] < 0.5 * total_distance[Sampler.random]


def test_no_sampled_value_is_repeated_after_a_restart(tmp_path: Path) -> None:
    first_params = [
        trial.params
        for trial in run(tmp_path, FakeRuns(tmp_path), search_config(trials=3, sampler=Sampler.random)).trials
    ]
    resumed_study = run(tmp_path, FakeRuns(tmp_path), search_config(trials=6, sampler=Sampler.random))
    assert first_params == [trial.params for trial in resumed_study.trials[:3]]
    assert len({trial.params["optim.lr"] for trial in resumed_study.trials}) == 6


OUTCOMES = {
    "failed": (
        {"state": "failed", "exit_code": 1, "message": "the disk is full", "kind": "error"},
        "failed",
        "the disk is full",
    ),
    "diverged": (
        {"state": "failed", "exit_code": 2, "message": "the loss is nan", "kind": "diverged"},
        "diverged",
        "the loss is nan",
    ),
    "stopped": ({"state": "stopped", "exit_code": 76, "message": "STOP file"}, "stopped by hand", "STOP"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_trial_that_did_not_finish_is_recorded_with_its_outcome(tmp_path: Path, name: str) -> None:
    status, outcome, message = OUTCOMES[name]
    fake_runs = FakeRuns(tmp_path)
    fake_runs.failures["trial-0001"] = status
    trial = run(tmp_path, fake_runs, search_config(trials=3)).trials[1]
    assert trial.state.name == ("PRUNED" if name == "stopped" else "FAIL")
    assert trial.user_attrs["outcome"] == outcome
    assert message in trial.user_attrs["message"]
    assert fake_runs.started.count("trial-0001") == 1


def test_a_trial_whose_processes_died_is_restarted(tmp_path: Path) -> None:
    fake_runs = FakeRuns(tmp_path)
    fake_runs.failures["trial-0001"] = None
    study = run(tmp_path, fake_runs, search_config(trials=3))
    assert fake_runs.started.count("trial-0001") == 2
    assert study.trials[1].state.name == "COMPLETE"


def test_a_trial_that_lost_a_rank_is_restarted(tmp_path: Path) -> None:
    fake_runs = FakeRuns(tmp_path)
    fake_runs.failures["trial-0000"] = {
        "state": "failed",
        "exit_code": 1,
        "message": "rank 1 died",
        "kind": "lost_rank",
    }
    study = run(tmp_path, fake_runs, search_config(trials=3))
    assert fake_runs.started.count("trial-0000") == 2
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3


def test_a_refused_trial_is_recorded_and_the_next_is_sampled(tmp_path: Path, monkeypatch) -> None:
    def freeze_or_refuse(name: str, params) -> str:
        if name.endswith("1"):
            raise UserError("global_batch_size=13: must be a multiple of 8")
        return freeze(name, params)

    config, fake_runs = search_config(trials=4), FakeRuns(tmp_path)
    study = Study(tmp_path / "study.journal", "s", config)
    assert Sweep(study, config, "s", tmp_path, freeze_or_refuse, fake_runs).run()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].user_attrs["message"] == "global_batch_size=13: must be a multiple of 8"
    assert "trial-0001" not in fake_runs.started


def test_a_scheduler_that_is_unavailable_for_a_while_ends_no_trial(tmp_path: Path, capsys) -> None:
    class UnavailableScheduler(FakeRuns):
        num_failures = 0

        def is_running(self, run_dir: Path) -> bool:
            if self.calls >= 10 and self.num_failures < 4:
                self.num_failures += 1
                raise slurm.UnavailableError("scontrol: no answer within 60 s")
            return super().is_running(run_dir)

    fake_runs = UnavailableScheduler(tmp_path)
    study = run(tmp_path, fake_runs, search_config(trials=3))
    assert fake_runs.num_failures == 4
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert capsys.readouterr().out.count("no answer within 60 s. Retrying until Slurm responds") == 1


def test_a_scheduler_that_is_unavailable_at_the_start_is_an_error(tmp_path: Path) -> None:
    class UnavailableScheduler(FakeRuns):
        def start(self, run_dir: Path, slot: int) -> None:
            raise slurm.UnavailableError("sbatch: no answer within 60 s")

    with pytest.raises(slurm.UnavailableError, match="no answer within 60 s"):
        run(tmp_path, UnavailableScheduler(tmp_path), search_config())


def test_a_trial_that_dies_more_often_than_retries_has_failed(tmp_path: Path) -> None:
    class DyingRuns(FakeRuns):
        def start(self, run_dir: Path, slot: int) -> None:
            super().start(run_dir, slot)
            (run_dir / "logs/launcher.log").write_text("Bus error\n")
            self.alive[run_dir] = run_dir.name != "trial-0001"

    fake_runs = DyingRuns(tmp_path)
    trial = run(tmp_path, fake_runs, search_config(trials=3, retries=2)).trials[1]
    assert fake_runs.started.count("trial-0001") == 3
    assert trial.user_attrs["outcome"] == "failed"
    assert "its processes died 3 times, at last with: Bus error" in trial.user_attrs["message"]


def test_no_further_trial_is_sampled_when_the_first_ones_fail_before_their_first_step(tmp_path: Path) -> None:
    class FailingRuns(FakeRuns):
        def start(self, run_dir: Path, slot: int) -> None:
            super().start(run_dir, slot)
            (run_dir / "status.json").unlink()
            (run_dir / "logs/launcher.log").write_text("error: data.store=x: no store\n")
            self.alive[run_dir] = False

    with pytest.raises(UserError, match="trial 0 ended before its first step: error: data.store=x: no store"):
        run(tmp_path, FailingRuns(tmp_path), search_config())
    study = run(tmp_path, FakeRuns(tmp_path), search_config())
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6


def test_a_first_trial_that_fails_twice_at_its_start_does_not_block_the_others(tmp_path: Path) -> None:
    class OutOfMemoryRuns(FakeRuns):
        def start(self, run_dir: Path, slot: int) -> None:
            super().start(run_dir, slot)
            if run_dir.name == "trial-0000":
                self.alive[run_dir] = False
                self._write_status(run_dir, "failed", exit_code=1, message="out of memory")

    fake_runs = OutOfMemoryRuns(tmp_path)
    with pytest.raises(UserError, match="trial 0 ended before its first step: out of memory"):
        run(tmp_path, fake_runs, search_config(parallel=1))
    study = run(tmp_path, fake_runs, search_config(parallel=1))
    assert [trial.state.name for trial in study.trials] == ["FAIL", *["COMPLETE"] * 5]


def test_an_unknown_metric_lists_the_known_ones(tmp_path: Path) -> None:
    fake_runs = FakeRuns(tmp_path)
    expected = r"sweep\.metric=accuracy was not measured as asked\. There is: loss, seconds, step, tokens"
    with pytest.raises(UserError, match=expected):
        run(tmp_path, fake_runs, search_config(metric="accuracy"))
    # No trial beyond those that ran in parallel.
    assert fake_runs.started == ["trial-0000", "trial-0001"]


def test_objective_values_are_read_at_the_configured_step(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    rows = [
        {"step": step, "loss": loss, "tokens": 10 * step, "seconds": 1} for step, loss in enumerate([5, 2, None, 3], 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    (tmp_path / "validation.jsonl").write_text('{"step": 2, "validation/loss": 7.5}\n')
    assert watch.objective_value(tmp_path, search_config()) == 3
    assert watch.objective_value(tmp_path, search_config(value=ObjectiveAt.best)) == 2
    assert watch.objective_value(tmp_path, search_config(value=ObjectiveAt.best, direction=Direction.max)) == 5
    assert watch.objective_value(tmp_path, search_config(value=ObjectiveAt.at_tokens, tokens=15)) == 2
    assert watch.objective_value(tmp_path, search_config(value=ObjectiveAt.at_tokens, tokens=41)) is None
    value = watch.objective_value(tmp_path, search_config(value=ObjectiveAt.at_tokens, tokens=30))
    assert value is not None
    assert math.isnan(value)
    assert watch.objective_value(tmp_path, search_config(metric="validation/loss")) == 7.5
    assert watch.pruner_reports(tmp_path, search_config()) == {1: 5, 2: 2, 4: 3}


def test_the_best_values_compose_as_an_experiment(tmp_path: Path, monkeypatch) -> None:
    params = {"optim": "muon", "optim.lr": 0.02, "data.weights.zh": 0.5, "tuning": "rslora", "tuning.dropout": 0.25}
    shutil.copytree(app.CONF, tmp_path / "conf")
    monkeypatch.setattr(app, "CONF", tmp_path / "conf")
    (app.CONF / "experiment" / "best.yaml").write_text(trial_table.option_file(params, "Trial 1."))
    defaults = ["run=a", "model=./base", "data=./store", "optim.steps=3"]
    composed = app.compose("train", [*defaults, *ranges.words(params)])
    assert (composed.optim.lr, composed.tuning.use_rslora, composed.data.weights) == (0.02, True, {"zh": 0.5})
    assert app.to_yaml(app.compose("train", [*defaults, "experiment=best"])) == app.to_yaml(composed)


def test_results_are_a_table_an_option_file_and_charts(tmp_path: Path) -> None:
    space = {"optim.lr": RangeConfig(low=0.01, high=0.9), "tuning.r": RangeConfig(choices=[4, 8])}
    config = search_config(space=space)
    study = run(tmp_path, FakeRuns(tmp_path), config)
    text = trial_table.write(study, config, "s", tmp_path, ["experiment=demo_sft", "optim.lr=1"])
    best = study.best
    assert best is not None
    lr, r = best.params["optim.lr"], best.params["tuning.r"]
    assert f"python launch/train.py experiment=demo_sft optim.lr={lr} tuning.r={r} run=<name>" in text
    assert (tmp_path / "best.yaml").read_text().splitlines()[2:] == ["optim:", f"  lr: {lr}", "tuning:", f"  r: {r}"]
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 7
    for chart in ("parallel_coordinates.png", "importance.png"):
        assert (tmp_path / chart).read_bytes().startswith(b"\x89PNG")
        assert f"]({chart})" in (tmp_path / "trials.md").read_text()


def test_ranges_have_the_types_of_their_keys() -> None:
    assert ranges.type_of("optim.lr") is float
    assert ranges.type_of("optim.warmup_steps") is int
    assert ranges.type_of("data.weights.zh") is float
    assert ranges.type_of("model.architecture.hidden_size") is None
    assert ranges.type_of("model.architecture.a.b") is None
    assert ranges.values("seq_len", RangeConfig(low=128, high=512)) == [128, 512]
    assert ranges.ladder("seq_len", RangeConfig(low=128, high=512, step=128)) == [128, 256, 384, 512]
    assert ranges.ladder("optim.lr", RangeConfig(low=0.1, high=0.3, step=0.1)) == [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match="whole numbers, got low=1.5"):
        ranges.values("seq_len", RangeConfig(low=1.5, high=4))
    with pytest.raises(UserError, match=r"the key is of type TuningMethod. Give choices"):
        ranges.values("tuning.method", RangeConfig(low=0, high=1))
    assert ranges.words({"a": True, "b": None, "c": 1e-5}) == ["a=true", "b=null", "c=1e-05"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["sweep.space.optim.lrr={low: 1, high: 2}"],
            "sweep.space.optim.lrr: no such key for train. Did you mean optim.lr",
        ),
        (
            ["sweep.space.optim.lrr=[1]"],
            "sweep.space.optim.lrr, at 1: optim.lrr: no such key for train. Did you mean optim.lr",
        ),
        (["sweep.space.optim.lr={low: -1, high: 2}"], "sweep.space.optim.lr, at -1.0: optim.lr=-1.0: must be"),
        (
            ["sweep.space.optim.lr={low: 3, high: 2}"],
            "sweep.space.optim.lr: low=3.0, high=2.0: both must be given, low less than high",
        ),
        (["sweep.space.seq_len={low: 0, high: 64}"], "sweep.space.seq_len, at 0: seq_len=0: must be at least 2"),
        (["sweep.space.tuning.method={choices: [full, loraa]}"], "sweep.space.tuning.method, at loraa: "),
        (["sweep.space.optim.lr={low: 3}"], "sweep.space.optim.lr: low=3.0, high=None: both must be given"),
        (
            ["sweep.space.optim.lr=[]"],
            "sweep.space.optim.lr: needs either choices, such as [1e-4, 3e-4], or low and high",
        ),
        (
            ["sweep.space.optim.lr=3"],
            "sweep.space.optim.lr=3: is no range. Give sweep.space.optim.lr={low: 1e-5, high: 1e-3} or",
        ),
        (
            ["sweep.space.model.architecture.hidden_size={low: 1, high: 2}"],
            "the key may be anything. Give choices=[...]",
        ),
        ([], "sweep.space: is empty"),
        (
            ["sweep=lr", "sweep.sampler=grid"],
            "sweep.space.optim.lr: sweep.sampler=grid tries all values. Give choices or step",
        ),
        (["sweep=lr", "run=mine"], "run=mine: trials get theirs from study=s"),
        (["sweep=lr", "sweep.value=at_tokens"], "Give both value=at_tokens and tokens"),
        (["sweep=lr", "sweep.parallel=3", "cluster=local"], "= 3 GPUs, but 0 are visible"),
        (["sweep=lr", "cluster=slurm"], "there is no sbatch on the path"),
        (["sweep=lr", "global_batch_size=3", "micro_batch_size=2"], "global_batch_size=3: must be a multiple"),
    ],
)
def test_bad_input_starts_no_trial(verb, tmp_path: Path, arguments: list[str], expected: str) -> None:
    defaults = ["study=s", "model=./base", "data=./store", "optim.steps=3", "cluster=local_cpu"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": str(Path(sys.executable).parent)}
    completed = verb("sweep", *defaults, *arguments, check=False, env=environment)
    assert completed.returncode == 2
    assert expected in completed.stderr
    assert not (tmp_path / "runs").exists()


def test_another_search_in_the_same_study_is_refused(verb, tmp_path: Path) -> None:
    (tmp_path / "runs/s").mkdir(parents=True)
    defaults = ["study=s", "sweep=lr", "model=./base", "data=./store", "optim.steps=3", "cluster=local_cpu"]
    recorded_study = {"train": sorted(defaults[2:-1]), "metric": "loss", "seed": 1}
    (tmp_path / "runs/s/study.json").write_text(json.dumps(recorded_study))
    completed = verb("sweep", *defaults, check=False)
    assert completed.returncode == 2
    assert "study=s: was started with other settings (" in completed.stderr
    assert "seed: 1 -> 0" in completed.stderr
    assert not (tmp_path / "runs/s/study.journal").exists()


def test_an_interrupt_stops_every_trial_once_and_waits_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class GracefulRuns(FakeRuns):
        stop_requests: ClassVar[list[str]] = []

        def stop(self, run_dir: Path) -> bool:
            self.stop_requests.append(run_dir.name)
            return True

        def _advance(self, run_dir: Path) -> None:
            if self.stop_requests.count(run_dir.name) and len(watch.metric_history(run_dir, "loss")) >= 4:
                self.alive[run_dir] = False
                self._write_status(run_dir, "stopped", exit_code=75, message="SIGTERM")
                return
            super()._advance(run_dir)

    fake_runs, config = GracefulRuns(tmp_path), search_config(retries=0)
    study = Study(tmp_path / "study.journal", "s", config)
    sweep = Sweep(study, config, "s", tmp_path, freeze, fake_runs)
    monkeypatch.setattr(
        "fireflyds.cluster.sweep.sweep_runner.time.sleep",
        lambda seconds: None if sweep.stopping else sweep.handle_signal(15, None),
    )
    assert not sweep.run()
    assert fake_runs.stop_requests == ["trial-0000", "trial-0001"]
    assert not any(fake_runs.alive.values())
    monkeypatch.setattr("fireflyds.cluster.sweep.sweep_runner.time.sleep", lambda seconds: None)
    # With retries=0 a dead trial would have failed; an interrupted one has not died.
    assert [trial.state.name for trial in run(tmp_path, FakeRuns(tmp_path), config).trials] == ["COMPLETE"] * 6


def test_a_trial_that_dies_after_a_stop_request_is_pruned(tmp_path: Path) -> None:
    class RunsWithoutStatus(FakeRuns):
        def _advance(self, run_dir: Path) -> None:
            if (run_dir / "STOP").exists():
                self.alive[run_dir] = False
                return
            super()._advance(run_dir)

    fake_runs = RunsWithoutStatus(tmp_path)
    study = run(tmp_path, fake_runs, search_config(trials=12, pruner=Pruner.median))
    pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
    assert pruned
    assert all(trial.user_attrs["outcome"] == "pruned" for trial in pruned)
    assert len(fake_runs.started) == 12
