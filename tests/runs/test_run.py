import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fireflyds
from fireflyds import app
from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.metrics.plots import plot_loss
from fireflyds.runs import fingerprint, provenance
from fireflyds.runs.directory import open_run
from fireflyds.runs.fingerprint import weights_hash
from fireflyds.runs.jsonl import MetricsFile, read_jsonl
from fireflyds.types import StepMetrics


def _open(tmp_path: Path, *overrides: str, base: str = "b") -> Path:
    config = app.compose("train", [f"runs={tmp_path}", "run=r", "model=a/b", "data=c/d", "optim.steps=3", *overrides])
    text = app.to_yaml(config)
    open_run(config, text, {"store": "s", "base": base}, "bf16").close()
    return tmp_path / "r"


def test_a_run_reopens_only_with_the_same_configuration(tmp_path: Path) -> None:
    run_dir = _open(tmp_path)
    # Before its first step a run may be opened with another configuration.
    _open(tmp_path, "optim.lr=0.25")
    _open(tmp_path)
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert _open(tmp_path, "log_every=3", "checkpoint.every=7") == run_dir
    config_yaml = (run_dir / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"optim.lr: 0.0002 -> 0.5"):
        _open(tmp_path, "optim.lr=0.5")
    with pytest.raises(UserError, match=r"base: b -> c"):
        _open(tmp_path, base="c")
    assert (run_dir / "config.yaml").read_bytes() == config_yaml
    assert json.loads((run_dir / "provenance.json").read_text())["libraries"]["torch"]


def test_a_run_is_locked_by_one_process(tmp_path: Path) -> None:
    import fcntl

    run_dir = _open(tmp_path)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process trains"):
            _open(tmp_path)


def _step(number: int) -> StepMetrics:
    return StepMetrics(
        step=number,
        loss=1 / number,
        lr=0.1,
        grad_norm=1.0,
        tokens=10 * number,
        learned_tokens=9,
        tokens_per_second=5.0,
        seconds=2.0,
    )


def test_metrics_are_truncated_to_the_resumed_step(tmp_path: Path) -> None:
    writer = MetricsFile(tmp_path, 0)
    for number in range(1, 6):
        writer.record(_step(number))
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # a kill in the middle of a line
    resumed_writer = MetricsFile(tmp_path, 3)
    resumed_writer.record(_step(4))
    resumed_writer.close()
    rows = list(read_jsonl(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"step", "loss", "tokens", "lr", "grad_norm"} <= rows[0].keys()
    plot_loss({"run": rows}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failed_metrics_write_names_the_file(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, 0)
    file._stream.close()
    # Every write raises ENOSPC.
    file._stream = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(UserError, match=r"/dev/full: cannot be written \(No space left on device\)\. Make room"):
        file.record(_step(1))


def test_other_new_rows_in_the_middle_of_a_shard_change_the_hash(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = {name: torch.zeros(1000, 500, dtype=torch.bfloat16) for name in ("a", "embed", "z")} | {
        "scale": torch.ones(())
    }
    save_file(weights, tmp_path / "model.safetensors")
    initial_hash = weights_hash(tmp_path)
    assert weights_hash(tmp_path) == initial_hash
    weights["embed"][-20:] = 1
    save_file(weights, tmp_path / "model.safetensors")
    assert weights_hash(tmp_path) != initial_hash
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        weights_hash(tmp_path)


def test_a_missing_or_changed_base_model_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    inputs = {"base": fingerprint.weights_hash(base)}
    fingerprint.require_base("r", str(base), inputs)
    fingerprint.require_base("r", "", {"base": None})
    (base / "config.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"run=r: its base model\.path=.*base has changed since"):
        fingerprint.require_base("r", str(base), inputs)
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"run=r: its base model\.path=.*base is gone"):
        fingerprint.require_base("r", str(base), inputs)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{half", "cannot be read as JSON"), ("{}", "has no base"), (None, "cannot be read as JSON")],
)
def test_a_damaged_inputs_file_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(UserError, match=message):
        fingerprint.read_inputs(tmp_path)


def test_provenance_without_package_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_package_not_found(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", raise_package_not_found)
    libraries = provenance.provenance()["libraries"]
    assert libraries["fireflyds"] == fireflyds.__version__
    assert libraries["torch"] is None


def test_the_number_format_is_recorded_and_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    config = app.compose("train", [f"runs={tmp_path}", "run=r", "model=a/b", "data=c/d", "optim.steps=3"])
    run_dir = _open(tmp_path)
    (run_dir / "checkpoints").mkdir()
    inputs = {"store": "s", "base": "b"}
    assert read_json(run_dir / "inputs.json") == inputs | {"precision": "bf16"}
    open_run(config, app.to_yaml(config), inputs, "fp16").close()
    assert read_json(run_dir / "inputs.json") == inputs | {"precision": "fp16"}
