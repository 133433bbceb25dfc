"""The logic of a study, with runs that are played; real ones: test_sweeps_for_real.py and test_slurm.py."""

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
    """The sweep's process is gone."""


class Played:
    """Runs whose loss is far from, or near, 0 as their `lr` is from, or to, 0.1. Each look at a run lets it make a
    step."""

    def __init__(self, folder: Path, kill_at: int | None = None) -> None:
        self.folder, self.kill_at = folder, kill_at
        self.calls, self.started, self.slots, self.alive_now = 0, [], {}, {}
        self.die = {}
        """Run to what ends it: a dictionary for its `status.json`, or None for nothing at all."""

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self.kill_at:
            raise KilledError

    def start(self, place: Path, slot: int) -> None:
        self._call()
        self.started.append(place.name)
        self.alive_now[place] = True
        assert slot not in [self.slots[other] for other, alive in self.alive_now.items() if alive and other != place]
        self.slots[place] = slot
        (place / "logs").mkdir(exist_ok=True)
        self._say(place, "running")
        self._call()

    def is_running(self, place: Path) -> bool:
        self._call()
        if self.alive_now.get(place):
            self._step(place)
        return self.alive_now.get(place, False)

    def stop(self, place: Path) -> bool:
        return False

    def kill(self, place: Path) -> None:
        self.alive_now[place] = False

    def _step(self, place: Path) -> None:
        done = len(watch.metric_history(place, "loss"))
        if place.name in self.die and done == 2:
            self.alive_now[place] = False
            ending = self.die.pop(place.name)
            return None if ending is None else self._say(place, **ending)
        if (place / "STOP").exists():
            self.alive_now[place] = False
            return self._say(place, "stopped", exit_code=76, message="STOP file")
        params = json.loads((place / "config.yaml").read_text())
        loss = abs(params["lr"] - 0.1) + 1 / (done + 1)
        row = {"step": done + 1, "loss": loss, "tokens": 100 * (done + 1), "seconds": 1.0}
        with (place / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        if done + 1 == STEPS:
            self.alive_now[place] = False
            self._say(place, "finished", exit_code=0)
        return None

    def _say(self, place: Path, state: str, exit_code: int | None = None, message: str = "", kind: str = "") -> None:
        about = {
            "state": state,
            "exit_code": exit_code,
            "message": message,
            "kind": kind,
            "step": 0,
            "total_steps": STEPS,
        }
        (place / "status.json").write_text(json.dumps(about))


def search(**changes) -> SearchConfig:
    space = {"optim.lr": RangeConfig(low=0.01, high=0.9)}
    usual = {
        "space": space,
        "trials": 6,
        "parallel": 2,
        "poll_seconds": 0.05,
        "startup_trials": 2,
        "pruner": Pruner.none,
    }
    return SearchConfig(**(usual | changes))


def freeze(run: str, params) -> str:
    return json.dumps({"run": run, "lr": params.get("optim.lr", 0.1)})


def run(folder: Path, played: Played, looking: SearchConfig) -> Study:
    folder.mkdir(exist_ok=True)
    study = Study(folder / "study.journal", "s", looking)
    assert Sweep(study, looking, "s", folder, freeze, played).run()
    return study


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fireflyds.cluster.sweep.sweep_runner.time.sleep", lambda seconds: None)


def test_every_trial_is_started_once_and_its_value_told(tmp_path: Path) -> None:
    played = Played(tmp_path)
    study = run(tmp_path, played, search())
    assert played.started == [f"trial-{number:04d}" for number in range(6)]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6
    for trial in study.trials:
        assert trial.value == pytest.approx(abs(trial.params["optim.lr"] - 0.1) + 1 / STEPS)
        assert trial.user_attrs["outcome"] == "finished"
        assert (trial.user_attrs["steps"], trial.user_attrs["tokens"], trial.user_attrs["seconds"]) == (8, 800, 8.0)
    assert study.best is not None
    assert study.best.value == min(trial.value for trial in study.trials)


def test_a_sweep_killed_at_any_moment_runs_nothing_twice(tmp_path: Path) -> None:
    whole = Played(tmp_path / "whole")
    run(tmp_path / "whole", whole, search(trials=3))
    assert whole.calls > 20
    for moment in range(1, whole.calls + 1):
        folder = tmp_path / str(moment)
        played = Played(folder, kill_at=moment)
        with pytest.raises(KilledError):
            run(folder, played, search(trials=3))
        study = run(folder, played, search(trials=3))
        assert sorted(played.started) == ["trial-0000", "trial-0001", "trial-0002"]
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
        assert len({trial.params["optim.lr"] for trial in study.trials}) == 3


def test_half_a_line_in_the_journal_is_no_harm(tmp_path: Path) -> None:
    run(tmp_path, Played(tmp_path), search(trials=2))
    with (tmp_path / "study.journal").open("a") as stream:
        stream.write('{"op_code": 4, "worker')
    assert [trial.state.name for trial in run(tmp_path, Played(tmp_path), search(trials=3)).trials] == ["COMPLETE"] * 3
    assert len(run(tmp_path, Played(tmp_path), search(trials=3)).trials) == 3


def test_a_grid_tries_every_combination_once(tmp_path: Path) -> None:
    space = {"optim.lr": RangeConfig(low=0.1, high=0.3, step=0.1), "tuning.r": RangeConfig(choices=[4, 8])}
    looking = search(space=space, sampler=Sampler.grid, trials=20)
    study = run(tmp_path, Played(tmp_path), looking)
    found = sorted((trial.params["optim.lr"], trial.params["tuning.r"]) for trial in study.trials)
    assert found == [(lr, r) for lr in (0.1, 0.2, 0.3) for r in (4, 8)]
    assert len(run(tmp_path, Played(tmp_path), looking).trials) == 6


def test_a_grid_is_cut_at_the_number_of_trials(tmp_path: Path) -> None:
    space = {"optim.lr": RangeConfig(low=0.1, high=0.9, step=0.1)}
    assert len(run(tmp_path, Played(tmp_path), search(space=space, sampler=Sampler.grid, trials=4)).trials) == 4


@pytest.mark.parametrize("pruner", [Pruner.median, Pruner.hyperband])
def test_hopeless_trials_are_stopped_and_recorded_as_pruned(tmp_path: Path, pruner: Pruner, capsys) -> None:
    study = run(tmp_path, Played(tmp_path), search(trials=16, pruner=pruner, reduction_factor=2))
    pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
    assert 3 <= len(pruned) <= 13
    assert all(trial.user_attrs["outcome"] == "pruned" and 1 <= trial.user_attrs["steps"] < STEPS for trial in pruned)
    whole = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert min(trial.user_attrs["last_value"] for trial in whole) < 0.3
    if pruner is Pruner.median:
        # What was ended was worse than what was not.
        mean = [sum(abs(trial.params["optim.lr"] - 0.1) for trial in kind) / len(kind) for kind in (whole, pruned)]
        assert mean[0] < mean[1]
    assert "pruned at step" in capsys.readouterr().out
    assert not list(tmp_path.rglob("STOP"))


def test_tpe_finds_better_values_than_chance(tmp_path: Path) -> None:
    found = {}
    for sampler in (Sampler.tpe, Sampler.random):
        study = run(tmp_path / sampler.name, Played(tmp_path), search(trials=24, sampler=sampler, startup_trials=6))
        found[sampler] = sum(abs(trial.params["optim.lr"] - 0.1) for trial in study.trials[12:])
    assert found[Sampler.tpe] < 0.5 * found[Sampler.random]


def test_no_draw_is_repeated_after_a_restart(tmp_path: Path) -> None:
    first = [trial.params for trial in run(tmp_path, Played(tmp_path), search(trials=3, sampler=Sampler.random)).trials]
    second = run(tmp_path, Played(tmp_path), search(trials=6, sampler=Sampler.random))
    assert first == [trial.params for trial in second.trials[:3]]
    assert len({trial.params["optim.lr"] for trial in second.trials}) == 6


ENDINGS = {
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


@pytest.mark.parametrize("name", ENDINGS)
def test_what_did_not_end_well_is_recorded_as_such(tmp_path: Path, name: str) -> None:
    status, outcome, message = ENDINGS[name]
    played = Played(tmp_path)
    played.die["trial-0001"] = status
    trial = run(tmp_path, played, search(trials=3)).trials[1]
    assert trial.state.name == ("PRUNED" if name == "stopped" else "FAIL")
    assert trial.user_attrs["outcome"] == outcome
    assert message in trial.user_attrs["message"]
    assert played.started.count("trial-0001") == 1


def test_a_trial_whose_processes_died_goes_on(tmp_path: Path) -> None:
    played = Played(tmp_path)
    played.die["trial-0001"] = None
    study = run(tmp_path, played, search(trials=3))
    assert played.started.count("trial-0001") == 2
    assert study.trials[1].state.name == "COMPLETE"


def test_a_trial_that_lost_a_rank_goes_on(tmp_path: Path) -> None:
    played = Played(tmp_path)
    played.die["trial-0000"] = {"state": "failed", "exit_code": 1, "message": "rank 1 died", "kind": "lost_rank"}
    study = run(tmp_path, played, search(trials=3))
    assert played.started.count("trial-0000") == 2
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3


def test_a_draw_that_is_refused_is_recorded_and_the_next_is_drawn(tmp_path: Path, monkeypatch) -> None:
    def refusing(name: str, params) -> str:
        if name.endswith("1"):
            raise UserError("global_batch_size=13: must be a multiple of 8")
        return freeze(name, params)

    looking, played = search(trials=4), Played(tmp_path)
    study = Study(tmp_path / "study.journal", "s", looking)
    assert Sweep(study, looking, "s", tmp_path, refusing, played).run()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].user_attrs["message"] == "global_batch_size=13: must be a multiple of 8"
    assert "trial-0001" not in played.started


def test_a_controller_that_is_away_for_a_while_ends_nothing(tmp_path: Path, capsys) -> None:
    class Away(Played):
        away = 0

        def is_running(self, place: Path) -> bool:
            if self.calls >= 10 and self.away < 4:
                self.away += 1
                raise slurm.UnavailableError("scontrol: no answer within 60 s")
            return super().is_running(place)

    played = Away(tmp_path)
    study = run(tmp_path, played, search(trials=3))
    assert played.away == 4
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert capsys.readouterr().out.count("no answer within 60 s. Retrying until Slurm responds") == 1


def test_a_controller_that_is_away_from_the_start_is_told(tmp_path: Path) -> None:
    class Away(Played):
        def start(self, place: Path, slot: int) -> None:
            raise slurm.UnavailableError("sbatch: no answer within 60 s")

    with pytest.raises(slurm.UnavailableError, match="no answer within 60 s"):
        run(tmp_path, Away(tmp_path), search())


def test_a_trial_that_dies_again_and_again_has_failed(tmp_path: Path) -> None:
    class Dying(Played):
        def start(self, place: Path, slot: int) -> None:
            super().start(place, slot)
            (place / "logs/launcher.log").write_text("Bus error\n")
            self.alive_now[place] = place.name != "trial-0001"

    played = Dying(tmp_path)
    trial = run(tmp_path, played, search(trials=3, retries=2)).trials[1]
    assert played.started.count("trial-0001") == 3
    assert trial.user_attrs["outcome"] == "failed"
    assert "its processes died 3 times, at last with: Bus error" in trial.user_attrs["message"]


def test_when_nothing_can_begin_no_more_is_drawn(tmp_path: Path) -> None:
    class Refusing(Played):
        def start(self, place: Path, slot: int) -> None:
            super().start(place, slot)
            (place / "status.json").unlink()
            (place / "logs/launcher.log").write_text("error: data.store=x: no store\n")
            self.alive_now[place] = False

    with pytest.raises(UserError, match="trial 0 ended before its first step: error: data.store=x: no store"):
        run(tmp_path, Refusing(tmp_path), search())
    study = run(tmp_path, Played(tmp_path), search())
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6


def test_a_first_trial_that_cannot_begin_twice_makes_room_for_others(tmp_path: Path) -> None:
    class TooLarge(Played):
        def start(self, place: Path, slot: int) -> None:
            super().start(place, slot)
            if place.name == "trial-0000":
                self.alive_now[place] = False
                self._say(place, "failed", exit_code=1, message="out of memory")

    played = TooLarge(tmp_path)
    with pytest.raises(UserError, match="trial 0 ended before its first step: out of memory"):
        run(tmp_path, played, search(parallel=1))
    study = run(tmp_path, played, search(parallel=1))
    assert [trial.state.name for trial in study.trials] == ["FAIL", *["COMPLETE"] * 5]


def test_a_metric_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    played = Played(tmp_path)
    expected = r"sweep\.metric=accuracy was not measured as asked\. There is: loss, seconds, step, tokens"
    with pytest.raises(UserError, match=expected):
        run(tmp_path, played, search(metric="accuracy"))
    # Not one more than those that ran at the same time.
    assert played.started == ["trial-0000", "trial-0001"]


def test_values_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    rows = [
        {"step": step, "loss": loss, "tokens": 10 * step, "seconds": 1} for step, loss in enumerate([5, 2, None, 3], 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    (tmp_path / "validation.jsonl").write_text('{"step": 2, "validation/loss": 7.5}\n')
    assert watch.objective_value(tmp_path, search()) == 3
    assert watch.objective_value(tmp_path, search(value=ObjectiveAt.best)) == 2
    assert watch.objective_value(tmp_path, search(value=ObjectiveAt.best, direction=Direction.max)) == 5
    assert watch.objective_value(tmp_path, search(value=ObjectiveAt.at_tokens, tokens=15)) == 2
    assert watch.objective_value(tmp_path, search(value=ObjectiveAt.at_tokens, tokens=41)) is None
    found = watch.objective_value(tmp_path, search(value=ObjectiveAt.at_tokens, tokens=30))
    assert found is not None
    assert math.isnan(found)
    assert watch.objective_value(tmp_path, search(metric="validation/loss")) == 7.5
    assert watch.pruner_reports(tmp_path, search()) == {1: 5, 2: 2, 4: 3}


def test_the_best_values_compose_as_an_experiment(tmp_path: Path, monkeypatch) -> None:
    params = {"optim": "muon", "optim.lr": 0.02, "data.weights.zh": 0.5, "tuning": "rslora", "tuning.dropout": 0.25}
    shutil.copytree(app.CONF, tmp_path / "conf")
    monkeypatch.setattr(app, "CONF", tmp_path / "conf")
    (app.CONF / "experiment" / "best.yaml").write_text(trial_table.option_file(params, "Trial 1."))
    usual = ["run=a", "model=./base", "data=./store", "optim.steps=3"]
    told = app.compose("train", [*usual, *ranges.words(params)])
    assert (told.optim.lr, told.tuning.use_rslora, told.data.weights) == (0.02, True, {"zh": 0.5})
    assert app.to_yaml(app.compose("train", [*usual, "experiment=best"])) == app.to_yaml(told)


def test_results_are_a_table_an_option_file_and_charts(tmp_path: Path) -> None:
    space = {"optim.lr": RangeConfig(low=0.01, high=0.9), "tuning.r": RangeConfig(choices=[4, 8])}
    looking = search(space=space)
    study = run(tmp_path, Played(tmp_path), looking)
    shown = trial_table.write(study, looking, "s", tmp_path, ["experiment=demo_sft", "optim.lr=1"])
    best = study.best
    assert best is not None
    lr, r = best.params["optim.lr"], best.params["tuning.r"]
    assert f"python launch/train.py experiment=demo_sft optim.lr={lr} tuning.r={r} run=<name>" in shown
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
def test_bad_input_starts_nothing(verb, tmp_path: Path, arguments: list[str], expected: str) -> None:
    usual = ["study=s", "model=./base", "data=./store", "optim.steps=3", "cluster=local_cpu"]
    plain = {"CUDA_VISIBLE_DEVICES": "", "PATH": str(Path(sys.executable).parent)}
    done = verb("sweep", *usual, *arguments, check=False, env=plain)
    assert done.returncode == 2
    assert expected in done.stderr
    assert not (tmp_path / "runs").exists()


def test_another_search_under_the_same_name_is_refused(verb, tmp_path: Path) -> None:
    (tmp_path / "runs/s").mkdir(parents=True)
    usual = ["study=s", "sweep=lr", "model=./base", "data=./store", "optim.steps=3", "cluster=local_cpu"]
    asked = {"train": sorted(usual[2:-1]), "metric": "loss", "seed": 1}
    (tmp_path / "runs/s/study.json").write_text(json.dumps(asked))
    done = verb("sweep", *usual, check=False)
    assert done.returncode == 2
    assert "study=s: was started with other settings (" in done.stderr
    assert "seed: 1 -> 0" in done.stderr
    assert not (tmp_path / "runs/s/study.journal").exists()


def test_an_interrupt_asks_every_trial_once_and_waits_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Polite(Played):
        asked: ClassVar[list[str]] = []

        def stop(self, place: Path) -> bool:
            self.asked.append(place.name)
            return True

        def _step(self, place: Path) -> None:
            if self.asked.count(place.name) and len(watch.metric_history(place, "loss")) >= 4:
                self.alive_now[place] = False
                self._say(place, "stopped", exit_code=75, message="SIGTERM")
                return
            super()._step(place)

    played, looking = Polite(tmp_path), search(retries=0)
    study = Study(tmp_path / "study.journal", "s", looking)
    sweep = Sweep(study, looking, "s", tmp_path, freeze, played)
    monkeypatch.setattr(
        "fireflyds.cluster.sweep.sweep_runner.time.sleep",
        lambda seconds: None if sweep.stopping else sweep.handle_signal(15, None),
    )
    assert not sweep.run()
    assert played.asked == ["trial-0000", "trial-0001"]
    assert not any(played.alive_now.values())
    monkeypatch.setattr("fireflyds.cluster.sweep.sweep_runner.time.sleep", lambda seconds: None)
    # Not even one death is allowed here, and none has died.
    assert [trial.state.name for trial in run(tmp_path, Played(tmp_path), looking).trials] == ["COMPLETE"] * 6


def test_a_trial_that_is_ended_while_it_is_asked_to_stop_is_pruned(tmp_path: Path) -> None:
    class Deaf(Played):
        def _step(self, place: Path) -> None:
            if (place / "STOP").exists():
                self.alive_now[place] = False
                return
            super()._step(place)

    played = Deaf(tmp_path)
    study = run(tmp_path, played, search(trials=12, pruner=Pruner.median))
    pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
    assert pruned
    assert all(trial.user_attrs["outcome"] == "pruned" for trial in pruned)
    assert len(played.started) == 12
