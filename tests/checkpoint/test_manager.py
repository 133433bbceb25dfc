"""Checkpoints of one process: atomic writes, retention, and damaged checkpoints, which are skipped."""

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fireflyds.checkpoint import shard_files, storage
from fireflyds.checkpoint.manager import CheckpointManager
from fireflyds.checkpoint.restore import find_checkpoint, restore_latest
from fireflyds.checkpoint.retention import CheckpointInfo, checkpoints_to_delete
from fireflyds.checkpoint.storage import LocalStorage
from fireflyds.config import CheckpointConfig
from fireflyds.errors import UserError
from fireflyds.runs import layout
from fireflyds.types import StepMetrics, TrainState


class Engine(SimpleNamespace):
    """The part of DeepSpeed's engine that checkpoints use at stage 0 in float32."""

    def zero_optimization_stage(self) -> int:
        return 0

    def fp16_enabled(self) -> bool:
        return False


class WeightsSink:
    def __init__(self) -> None:
        self.error: Exception | None = None

    def write(self, folder: Path, step: int, skipped: int) -> None:
        if self.error:
            raise self.error
        (folder / "trainable").mkdir()
        (folder / "trainable" / "note.txt").write_text(f"{step}", encoding="utf-8")


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_engine() -> Engine:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    return Engine(
        module=module, optimizer=torch.optim.AdamW(module.parameters(), lr=0.1), skipped_steps=0, global_steps=0
    )


def take_step(engine: Engine, state: TrainState) -> StepMetrics:
    engine.module(torch.ones(2, 6)).square().sum().backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    state.step += 1
    return metrics(state.step)


def metrics(step: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(
        step=step, loss=loss, lr=0.1, grad_norm=1.0, tokens=1, learned_tokens=1, tokens_per_second=1.0, seconds=1.0
    )


def run_to(
    folder: Path, steps: int, weights_sink: WeightsSink | None = None, **checkpoint_options
) -> tuple[Engine, list[dict]]:
    """A run that saves every step. Returns the engine and the weights after each step."""
    engine, state, weights = make_engine(), TrainState(), []
    with CheckpointManager(
        engine, LocalStorage(folder), CheckpointConfig(**checkpoint_options), weights_sink or WeightsSink()
    ) as manager:
        for _ in range(steps):
            step_metrics = take_step(engine, state)
            weights.append({name: tensor.clone() for name, tensor in engine.module.state_dict().items()})
            manager.save(state, step_metrics)
    return engine, weights


def has_weights(engine: Engine, weights: dict) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in engine.module.state_dict().items())


def test_restored_weights_and_optimizer_continue_identically(group, tmp_path: Path) -> None:
    engine, weights = run_to(tmp_path, 3)
    restored = make_engine()
    state = restore_latest(restored, LocalStorage(tmp_path), pytest.fail)
    assert (state.step, restored.global_steps) == (3, 3)
    assert has_weights(restored, weights[-1])
    for model_engine in (engine, restored):
        take_step(model_engine, TrainState())
    assert has_weights(restored, engine.module.state_dict())
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"


def test_a_checkpoint_is_written_while_training_continues(group, tmp_path: Path, monkeypatch) -> None:
    write_allowed, write = threading.Event(), shard_files.write_shard

    def delayed_write(*arguments) -> None:
        assert write_allowed.wait(30)
        write(*arguments)

    monkeypatch.setattr(shard_files, "write_shard", delayed_write)
    engine, state = make_engine(), TrainState()
    with CheckpointManager(engine, LocalStorage(tmp_path), CheckpointConfig(), WeightsSink()) as manager:
        step_metrics = take_step(engine, state)
        saved = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
        manager.save(state, step_metrics)
        take_step(engine, state)  # before the checkpoint is written
        assert not LocalStorage(tmp_path).list()
        write_allowed.set()
    restored = make_engine()
    assert restore_latest(restored, LocalStorage(tmp_path), pytest.fail).step == 1
    assert has_weights(restored, saved)
    assert not has_weights(restored, engine.module.state_dict())


@pytest.mark.parametrize("corruption", ["cut", "flip", "remove", "unseal"])
def test_a_damaged_checkpoint_is_skipped_with_a_log_line(group, tmp_path: Path, corruption: str) -> None:
    _, weights = run_to(tmp_path, 3, keep=3)
    newest = tmp_path / "checkpoints" / "step-000003"
    file = newest / "rank-00000.safetensors"
    content = file.read_bytes()
    if corruption == "cut":
        file.write_bytes(content[:-10])
    elif corruption == "flip":
        file.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    elif corruption == "remove":
        (newest / "trainable" / "note.txt").unlink()
    else:
        (newest / "checksums.json").unlink()
    log_lines: list[str] = []
    restored = make_engine()
    assert restore_latest(restored, LocalStorage(tmp_path), log_lines.append).step == 2
    assert has_weights(restored, weights[1])
    assert "step-000003 is damaged (" in log_lines[0]
    assert find_checkpoint(tmp_path, None).name == "step-000002"
    with pytest.raises(UserError, match="step-000003: is damaged"):
        find_checkpoint(tmp_path, 3)


def test_a_checkpoint_that_cannot_be_read_is_skipped(group, tmp_path: Path, monkeypatch) -> None:
    run_to(tmp_path, 2, keep=3)
    sha256_of = shard_files.sha256_of

    def failing_sha256_of(file: Path) -> str:
        if "step-000002" in str(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return sha256_of(file)

    monkeypatch.setattr(shard_files, "sha256_of", failing_sha256_of)
    log_lines: list[str] = []
    assert restore_latest(make_engine(), LocalStorage(tmp_path), log_lines.append).step == 1
    assert "cannot be read: Input/output error" in log_lines[0]


def test_a_copy_of_a_checkpoint_made_by_the_user_is_kept(group, tmp_path: Path) -> None:
    run_to(tmp_path, 2, keep=1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / "step-000002.bak")
    assert find_checkpoint(tmp_path, None).name == "step-000002"
    run_to(tmp_path, 3, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000002.bak", "step-000003"]


def test_a_failure_to_remove_old_checkpoints_does_not_affect_the_new_one(
    group, tmp_path: Path, monkeypatch, capsys
) -> None:
    run_to(tmp_path, 1)

    def raise_permission_error(*arguments) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fireflyds.checkpoint.manager.checkpoints_to_delete", raise_permission_error)
    run_to(tmp_path, 2)
    assert find_checkpoint(tmp_path, None).name == "step-000002"
    assert "old checkpoints were not removed ([Errno 13] Permission denied)" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(group, tmp_path: Path) -> None:
    run_to(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000001" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
        restore_latest(make_engine(), LocalStorage(tmp_path), lambda line: None)


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_write_leaves_the_previous_checkpoint_intact(
    group, tmp_path: Path, monkeypatch, background: bool
) -> None:
    run_to(tmp_path, 1)

    def raise_no_space(tensors, file) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_files, "save_file", raise_no_space)
    with pytest.raises(UserError, match="rank 0: .*No space left on device.*The previous one is intact"):
        run_to(tmp_path, 2, background=background)
    assert LocalStorage(tmp_path).list() == ["step-000001"]
    assert restore_latest(make_engine(), LocalStorage(tmp_path), pytest.fail).step == 1


def test_an_error_of_the_weights_sink_leaves_no_checkpoint(group, tmp_path: Path) -> None:
    weights_sink = WeightsSink()
    weights_sink.error = UserError("lora_B was saved as zeros only")
    with pytest.raises(UserError, match="lora_B was saved as zeros only"):
        run_to(tmp_path, 1, weights_sink)
    assert not LocalStorage(tmp_path).list()


def test_insufficient_disk_space_is_reported_before_the_first_step(group, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=300))
    with pytest.raises(UserError, match=r"a checkpoint takes .* GiB and the disk has .* Free space"):
        run_to(tmp_path, 1)


def test_partial_folders_of_a_killed_process_are_removed(group, tmp_path: Path) -> None:
    run_to(tmp_path, 1)
    for name in (".step-000002.partial", ".step-000000.dropped"):
        (tmp_path / "checkpoints" / name).mkdir()
    run_to(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000001"]


def test_the_latest_the_periodic_and_the_best_checkpoints_are_kept(group, tmp_path: Path) -> None:
    engine, state = make_engine(), TrainState()
    config = CheckpointConfig(keep=2, keep_every=4, best_metric="loss")
    with CheckpointManager(engine, LocalStorage(tmp_path), config, WeightsSink()) as manager:
        for loss in (5.0, 3.0, 1.0, 2.0, 4.0, 4.0, 4.0):
            take_step(engine, state)
            manager.save(state, metrics(state.step, loss))
    assert [int(name[-3:]) for name in LocalStorage(tmp_path).list()] == [3, 4, 6, 7]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.none() | st.integers(1, 5),
    st.none() | st.floats(0, 100),
)
def test_retention_keeps_the_newest_and_the_configured_checkpoints(
    sizes, keep: int, keep_every: int | None, max_gib: float | None
) -> None:
    checkpoints = [CheckpointInfo(step, size << 30, metric) for step, (size, metric) in enumerate(sizes, start=1)]
    config = CheckpointConfig(keep=keep, keep_every=keep_every, max_gib=max_gib)
    kept_steps = {checkpoint.step for checkpoint in checkpoints} - set(checkpoints_to_delete(checkpoints, config))
    assert len(checkpoints) in kept_steps
    total = sum(checkpoint.num_bytes for checkpoint in checkpoints if checkpoint.step in kept_steps)
    assert max_gib is None or len(kept_steps) == 1 or total <= max_gib * 2**30
    if max_gib is None:
        best = min(checkpoints, key=lambda checkpoint: (checkpoint.metric, checkpoint.step)).step
        expected = (
            {checkpoint.step for checkpoint in checkpoints[-keep:]}
            | {best}
            | {s for s in range(1, len(checkpoints) + 1) if keep_every and s % keep_every == 0}
        )
        assert kept_steps == expected


def test_a_run_that_ends_by_an_error_completes_the_pending_write(group, tmp_path: Path, monkeypatch) -> None:
    write = shard_files.write_shard

    def delayed_write(*arguments) -> None:
        threading.Event().wait(0.3)
        write(*arguments)

    monkeypatch.setattr(shard_files, "write_shard", delayed_write)
    engine, state = make_engine(), TrainState()
    manager = CheckpointManager(engine, LocalStorage(tmp_path), CheckpointConfig(), WeightsSink())
    manager.save(state, take_step(engine, state))
    manager.__exit__(UserError, UserError("the loss spikes"), None)
    assert LocalStorage(tmp_path).list() == ["step-000001"]


def save_at(folder: Path, *steps: int, **checkpoint_options) -> int:
    """A process that resumes and saves after these steps. Returns the step that it resumed at."""
    engine = make_engine()
    with CheckpointManager(
        engine, LocalStorage(folder), CheckpointConfig(**checkpoint_options), WeightsSink()
    ) as manager:
        state = manager.restore_latest(lambda line: None)
        resumed_step = state.step
        for step in steps:
            state.step = step - 1
            manager.save(state, take_step(engine, state))
    return resumed_step


def corrupt(folder: Path, step: int, file: str = "rank-00000.safetensors") -> None:
    (folder / "checkpoints" / layout.step_name(step) / file).write_bytes(b"{")


def steps_of(folder: Path) -> list[int]:
    return [int(name[-6:]) for name in LocalStorage(folder).list()]


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json"])
def test_a_skipped_damaged_checkpoint_displaces_no_intact_one(group, tmp_path: Path, file: str) -> None:
    save_at(tmp_path, 100, 200, keep=2)
    corrupt(tmp_path, 200, file)
    # It is kept until the run has passed its step, then deleted. Of equal losses the first is the best.
    assert save_at(tmp_path, 110, keep=1, best_metric="loss") == 100
    assert steps_of(tmp_path) == [100, 110, 200]
    assert save_at(tmp_path, 210, keep=2) == 110
    assert steps_of(tmp_path) == [110, 210]
    assert restore_latest(make_engine(), LocalStorage(tmp_path), pytest.fail).step == 210


def test_a_step_that_is_saved_again_over_a_damaged_checkpoint_is_kept(group, tmp_path: Path) -> None:
    save_at(tmp_path, 100, 200, keep=2)
    corrupt(tmp_path, 200)
    save_at(tmp_path, 200, 300, keep=2)
    assert steps_of(tmp_path) == [200, 300]
    assert restore_latest(make_engine(), LocalStorage(tmp_path), pytest.fail).step == 300


def test_a_checkpoint_whose_manifest_is_damaged_during_the_run_is_never_the_best(group, tmp_path: Path) -> None:
    engine, state = make_engine(), TrainState()
    config = CheckpointConfig(keep=1, best_metric="loss")
    with CheckpointManager(engine, LocalStorage(tmp_path), config, WeightsSink()) as manager:
        for step in (100, 110, 120):
            state.step = step - 1
            manager.save(state, take_step(engine, state))
            manager.wait()
            if step == 100:
                corrupt(tmp_path, 100, "manifest.json")
    assert steps_of(tmp_path) == [110, 120]
