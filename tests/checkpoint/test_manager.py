"""Checkpoints of one process: whole or absent, kept and dropped, damaged ones passed over."""

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
    """What of DeepSpeed's engine is asked at stage 0 in float32."""

    def zero_optimization_stage(self) -> int:
        return 0

    def fp16_enabled(self) -> bool:
        return False


class Keeper:
    def __init__(self) -> None:
        self.error: Exception | None = None

    def write(self, folder: Path, step: int, skipped: int) -> None:
        if self.error:
            raise self.error
        (folder / "trainable").mkdir()
        (folder / "trainable" / "note.txt").write_text(f"{step}", encoding="utf-8")


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
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


def run_to(folder: Path, steps: int, keeper: Keeper | None = None, **config) -> tuple[Engine, list[dict]]:
    """A run that saves every step. Returns the engine and the weights after each step."""
    engine, state, weights = make_engine(), TrainState(), []
    with CheckpointManager(engine, LocalStorage(folder), CheckpointConfig(**config), keeper or Keeper()) as manager:
        for _ in range(steps):
            taken = take_step(engine, state)
            weights.append({name: tensor.clone() for name, tensor in engine.module.state_dict().items()})
            manager.save(state, taken)
    return engine, weights


def same(engine: Engine, weights: dict) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in engine.module.state_dict().items())


def test_weights_and_optimizer_come_back_and_go_on_alike(group, tmp_path: Path) -> None:
    engine, weights = run_to(tmp_path, 3)
    other = make_engine()
    state = restore_latest(other, LocalStorage(tmp_path), pytest.fail)
    assert (state.step, other.global_steps) == (3, 3)
    assert same(other, weights[-1])
    for each in (engine, other):
        take_step(each, TrainState())
    assert same(other, engine.module.state_dict())
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"


def test_a_copy_is_written_while_training_goes_on(group, tmp_path: Path, monkeypatch) -> None:
    may_write, write = threading.Event(), shard_files.write_shard

    def slowly(*arguments) -> None:
        assert may_write.wait(30)
        write(*arguments)

    monkeypatch.setattr(shard_files, "write_shard", slowly)
    engine, state = make_engine(), TrainState()
    with CheckpointManager(engine, LocalStorage(tmp_path), CheckpointConfig(), Keeper()) as manager:
        taken = take_step(engine, state)
        saved = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
        manager.save(state, taken)
        take_step(engine, state)  # while nothing is written yet
        assert not LocalStorage(tmp_path).list()
        may_write.set()
    other = make_engine()
    assert restore_latest(other, LocalStorage(tmp_path), pytest.fail).step == 1
    assert same(other, saved)
    assert not same(other, engine.module.state_dict())


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "unseal"])
def test_a_damaged_checkpoint_is_passed_over_with_a_line(group, tmp_path: Path, harm: str) -> None:
    _, weights = run_to(tmp_path, 3, keep=3)
    newest = tmp_path / "checkpoints" / "step-000003"
    file = newest / "rank-00000.safetensors"
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-10])
    elif harm == "flip":
        file.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    elif harm == "remove":
        (newest / "trainable" / "note.txt").unlink()
    else:
        (newest / "checksums.json").unlink()
    said: list[str] = []
    other = make_engine()
    assert restore_latest(other, LocalStorage(tmp_path), said.append).step == 2
    assert same(other, weights[1])
    assert "step-000003 is damaged (" in said[0]
    assert find_checkpoint(tmp_path, None).name == "step-000002"
    with pytest.raises(UserError, match="step-000003: is damaged"):
        find_checkpoint(tmp_path, 3)


def test_a_checkpoint_that_cannot_be_read_is_passed_over(group, tmp_path: Path, monkeypatch) -> None:
    run_to(tmp_path, 2, keep=3)
    digest = shard_files.sha256_of

    def bad_sector(file: Path) -> str:
        if "step-000002" in str(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return digest(file)

    monkeypatch.setattr(shard_files, "sha256_of", bad_sector)
    said: list[str] = []
    assert restore_latest(make_engine(), LocalStorage(tmp_path), said.append).step == 1
    assert "cannot be read: Input/output error" in said[0]


def test_a_copy_that_somebody_made_is_left_alone(group, tmp_path: Path) -> None:
    run_to(tmp_path, 2, keep=1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / "step-000002.bak")
    assert find_checkpoint(tmp_path, None).name == "step-000002"
    run_to(tmp_path, 3, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000002.bak", "step-000003"]


def test_old_checkpoints_that_cannot_be_removed_do_not_spoil_the_new_one(
    group, tmp_path: Path, monkeypatch, capsys
) -> None:
    run_to(tmp_path, 1)

    def refused(*arguments) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fireflyds.checkpoint.manager.checkpoints_to_delete", refused)
    run_to(tmp_path, 2)
    assert find_checkpoint(tmp_path, None).name == "step-000002"
    assert "old checkpoints were not removed ([Errno 13] Permission denied)" in capsys.readouterr().err


def test_when_all_are_damaged_the_run_is_not_started_anew_silently(group, tmp_path: Path) -> None:
    run_to(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000001" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
        restore_latest(make_engine(), LocalStorage(tmp_path), lambda line: None)


@pytest.mark.parametrize("background", [True, False])
def test_what_cannot_be_written_leaves_the_one_before(group, tmp_path: Path, monkeypatch, background: bool) -> None:
    run_to(tmp_path, 1)

    def full(tensors, file) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_files, "save_file", full)
    with pytest.raises(UserError, match="rank 0: .*No space left on device.*The previous one is intact"):
        run_to(tmp_path, 2, background=background)
    assert LocalStorage(tmp_path).list() == ["step-000001"]
    assert restore_latest(make_engine(), LocalStorage(tmp_path), pytest.fail).step == 1


def test_what_was_learnt_and_is_not_whole_is_no_checkpoint(group, tmp_path: Path) -> None:
    keeper = Keeper()
    keeper.error = UserError("lora_B was saved as zeros only")
    with pytest.raises(UserError, match="lora_B was saved as zeros only"):
        run_to(tmp_path, 1, keeper)
    assert not LocalStorage(tmp_path).list()


def test_a_full_disk_is_told_before_the_first_step(group, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=300))
    with pytest.raises(UserError, match=r"a checkpoint takes .* GiB and the disk has .* Free space"):
        run_to(tmp_path, 1)


def test_what_a_killed_process_left_is_removed(group, tmp_path: Path) -> None:
    run_to(tmp_path, 1)
    for name in (".step-000002.partial", ".step-000000.dropped"):
        (tmp_path / "checkpoints" / name).mkdir()
    run_to(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000001"]


def test_the_last_the_marked_and_the_best_are_kept(group, tmp_path: Path) -> None:
    engine, state = make_engine(), TrainState()
    config = CheckpointConfig(keep=2, keep_every=4, best_metric="loss")
    with CheckpointManager(engine, LocalStorage(tmp_path), config, Keeper()) as manager:
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
def test_retention_keeps_the_newest_and_what_was_asked(sizes, keep: int, every: int | None, most: float | None) -> None:
    kept = [CheckpointInfo(step, size << 30, metric) for step, (size, metric) in enumerate(sizes, start=1)]
    config = CheckpointConfig(keep=keep, keep_every=every, max_gib=most)
    stay = {each.step for each in kept} - set(checkpoints_to_delete(kept, config))
    assert len(kept) in stay
    total = sum(each.num_bytes for each in kept if each.step in stay)
    assert most is None or len(stay) == 1 or total <= most * 2**30
    if most is None:
        best = min(kept, key=lambda each: (each.metric, each.step)).step
        wanted = (
            {each.step for each in kept[-keep:]}
            | {best}
            | {s for s in range(1, len(kept) + 1) if every and s % every == 0}
        )
        assert stay == wanted


def test_a_run_that_ends_by_an_error_keeps_what_was_being_written(group, tmp_path: Path, monkeypatch) -> None:
    write = shard_files.write_shard

    def slowly(*arguments) -> None:
        threading.Event().wait(0.3)
        write(*arguments)

    monkeypatch.setattr(shard_files, "write_shard", slowly)
    engine, state = make_engine(), TrainState()
    saver = CheckpointManager(engine, LocalStorage(tmp_path), CheckpointConfig(), Keeper())
    saver.save(state, take_step(engine, state))
    saver.__exit__(UserError, UserError("the loss spikes"), None)
    assert LocalStorage(tmp_path).list() == ["step-000001"]


def save_at(folder: Path, *steps: int, **config) -> int:
    """A process that resumes and saves after these steps. Returns the step that it resumed at."""
    engine = make_engine()
    with CheckpointManager(engine, LocalStorage(folder), CheckpointConfig(**config), Keeper()) as manager:
        state = manager.restore_latest(lambda line: None)
        resumed = state.step
        for step in steps:
            state.step = step - 1
            manager.save(state, take_step(engine, state))
    return resumed


def spoil(folder: Path, step: int, file: str = "rank-00000.safetensors") -> None:
    (folder / "checkpoints" / layout.step_name(step) / file).write_bytes(b"{")


def steps_of(folder: Path) -> list[int]:
    return [int(name[-6:]) for name in LocalStorage(folder).list()]


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_that_was_passed_over_pushes_out_nothing_whole(group, tmp_path: Path, file: str) -> None:
    save_at(tmp_path, 100, 200, keep=2)
    spoil(tmp_path, 200, file)
    # It stays while it is ahead, and goes when the run has come by. Of equal losses the first is the best.
    assert save_at(tmp_path, 110, keep=1, best_metric="loss") == 100
    assert steps_of(tmp_path) == [100, 110, 200]
    assert save_at(tmp_path, 210, keep=2) == 110
    assert steps_of(tmp_path) == [110, 210]
    assert restore_latest(make_engine(), LocalStorage(tmp_path), pytest.fail).step == 210


def test_a_step_that_is_saved_again_over_a_damaged_checkpoint_is_kept(group, tmp_path: Path) -> None:
    save_at(tmp_path, 100, 200, keep=2)
    spoil(tmp_path, 200)
    save_at(tmp_path, 200, 300, keep=2)
    assert steps_of(tmp_path) == [200, 300]
    assert restore_latest(make_engine(), LocalStorage(tmp_path), pytest.fail).step == 300


def test_a_manifest_that_was_damaged_since_is_not_the_best_and_stops_nothing(group, tmp_path: Path) -> None:
    engine, state = make_engine(), TrainState()
    config = CheckpointConfig(keep=1, best_metric="loss")
    with CheckpointManager(engine, LocalStorage(tmp_path), config, Keeper()) as manager:
        for step in (100, 110, 120):
            state.step = step - 1
            manager.save(state, take_step(engine, state))
            manager.wait()
            if step == 100:
                spoil(tmp_path, 100, "manifest.json")
    assert steps_of(tmp_path) == [110, 120]
