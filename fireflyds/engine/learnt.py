"""What a run learnt: kept beside every checkpoint, read by the export, and by a later run that starts from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyds import app
from fireflyds.config import TrainConfig, TuningMethod
from fireflyds.directories import Output, write_aside
from fireflyds.engine import checkpoint
from fireflyds.engine.fragments import Fragments
from fireflyds.engine.run import read_inputs
from fireflyds.engine.run_names import find_run
from fireflyds.errors import UserError
from fireflyds.models import trained
from fireflyds.models.merge import set_magnitudes
from fireflyds.models.trained import Trained
from fireflyds.runs import layout

# Beside a checkpoint. What a run took over from an earlier one stands in its own folder, so that it no longer needs that.
LEARNT = "learnt"


@dataclass(frozen=True, slots=True)
class Keeper:
    """Writes what trained beside a checkpoint. Where the whole body trains, the shards themselves are that."""

    model: Any
    config: TrainConfig
    adapter_config: Any
    about: dict[str, Any]
    """What it is of: hashes of base and tokenizer, vocabulary size."""

    def keep(self, folder: Path, step: int, skipped: int) -> None:
        """Write and read back, on rank 0, into the folder of a checkpoint that is not yet in place.

        Raises:
            UserError: what was read back is not what trained.
        """
        about, saved = self.about | {"step": step}, Fragments(folder)
        saved.require(trained.trainable_shapes(self.model, by_plain_name=False))
        if self.config.tuning.method is TuningMethod.full:
            trained.save(trained.rows_alone(self.model, about), folder / LEARNT)
            return
        live = {name: tensor.float() for name, tensor in saved.weights()}
        trained.save(trained.collect(self.model, live, self.adapter_config, about), folder / LEARNT)
        trained.verify(folder / LEARNT, trained.trainable_shapes(self.model), updated=step > skipped)


def read(folder: Path) -> Trained:
    """What a checkpoint holds, in float32."""
    found = trained.load(folder / LEARNT)
    if not (found.adapters or found.weights):
        found.weights = {trained.plain_name(name): tensor.float() for name, tensor in Fragments(folder).weights()}
    return found


def restore(model: Any, run_dir: Path, folder: Path | None = None) -> None:
    """Give a freshly tuned model what its run took over from an earlier one, and what a checkpoint of it learnt."""
    if (run_dir / layout.START).is_dir():
        start = trained.load(run_dir / layout.START)
        trained.restore(model, start, run_dir / layout.START, must_cover=False)
        set_magnitudes(model, but=start.adapters)
    if folder is not None:
        trained.restore(model, read(folder), folder, must_cover=True)


def take_over(config: TrainConfig, about: dict[str, Any]) -> None:
    """On rank 0: put what the run of `init_from` learnt into this run's folder, once.

    Raises:
        UserError: no such run, no checkpoint of it, another base or tokenizer, or adapters that differ.
    """
    start = Path(config.run_dir) / layout.START
    if not config.init_from or start.is_dir():
        return
    earlier_dir = find_run(config.runs, "init_from", config.init_from)
    newest = checkpoint.find(earlier_dir, None)
    earlier = app.from_yaml(earlier_dir / "config.yaml", TrainConfig)
    recorded = read_inputs(earlier_dir)
    for key, remedy in (
        ("base", f"Give model={earlier.model.path or 'as there'}, or export that run and give model=<its export>"),
        ("tokenizer", f"Give model.tokenizer={earlier.model.tokenizer_path}"),
        ("vocab_size", f"Give model={earlier.model.path or 'as there'}"),
    ):
        if recorded.get(key) != about[key]:
            raise UserError(
                f"init_from={config.init_from}: that run's {key} is {_short(recorded.get(key))}, this one's {_short(about[key])}. {remedy}"
            )
    found = read(newest)
    if (earlier_dir / layout.START).is_dir():
        found = found.over(trained.load(earlier_dir / layout.START))
    _check_adapters(config, earlier, found)
    found.about = about | {"run": config.init_from, "checkpoint": newest.name}
    with write_aside(start, Output("start of a run")) as aside:
        trained.save(found, aside)


def _short(value: Any) -> str:
    return str(value)[:12]


def _check_adapters(config: TrainConfig, earlier: TrainConfig, found: Trained) -> None:
    """Adapters go on only as what they were: with another scale they would mean something else."""
    if not found.adapters:
        return
    before, now = earlier.tuning, config.tuning
    for key in ("r", "alpha", "use_rslora", "use_dora", "target_modules"):
        if not now.has_adapters or getattr(before, key) != getattr(now, key):
            value = getattr(now, key) if now.has_adapters else f"none, tuning={now.method.name}"
            raise UserError(
                f"init_from={config.init_from}: that run has adapters with {key}={getattr(before, key)}, this one {value}. Use "
                f"the same, or merge them: python launch/export.py run={config.init_from}, then model={earlier.run_dir}/export"
            )
