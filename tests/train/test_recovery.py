"""Stop requests, lost ranks, and loss spikes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fireflyds.config import RecoveryConfig
from fireflyds.distributed.heartbeat import Heartbeat, process_namespace
from fireflyds.distributed.launcher_env import RankInfo, free_port
from fireflyds.distributed.signals import StopRequest, StopSignals
from fireflyds.errors import LostRankError, UserError
from fireflyds.runs.status import Status
from fireflyds.train import loss_spike
from fireflyds.train.nonfinite import NonFiniteDetector
from fireflyds.types import TrainState


@pytest.fixture
def requests(tmp_path: Path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield StopSignals(tmp_path)
    dist.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def poll(requests: StopSignals, failed: bool = False) -> StopRequest:
    return requests.poll(torch.device("cpu"), failed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_to_stop(requests: StopSignals, number: signal.Signals) -> None:
    assert poll(requests) == StopRequest(save=False, stop=False, no_requeue=False, failed=False)
    os.kill(os.getpid(), number)
    assert poll(requests) == StopRequest(save=False, stop=True, no_requeue=False, failed=False)
    assert requests.reason == number.name


def test_sigterm_from_the_launcher_after_ctrl_c_is_not_a_second_request(requests: StopSignals) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert poll(requests).stop
    assert requests.reason == "SIGINT"


def test_request_files_are_consumed_once(requests: StopSignals, tmp_path: Path) -> None:
    (tmp_path / "SAVE").touch()
    assert poll(requests) == StopRequest(save=True, stop=False, no_requeue=False, failed=False)
    assert poll(requests) == StopRequest(save=False, stop=False, no_requeue=False, failed=False)
    (tmp_path / "STOP").touch()
    assert poll(requests, failed=True) == StopRequest(save=False, stop=True, no_requeue=True, failed=True)
    assert not (tmp_path / "STOP").exists()
    assert requests.reason == "STOP file"


def test_a_second_ctrl_c_exits_immediately(tmp_path: Path) -> None:
    script = f"""
import os, signal, time
from pathlib import Path
from fireflyds.distributed.signals import StopSignals
StopSignals(Path({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert completed.returncode == 130
    assert "interrupted again: leaving at once" in completed.stderr


class RankStore:
    """The rendezvous store with the heartbeat of rank 0; the test writes the entries of rank 1."""

    def __init__(self, folder: Path, seconds: float = 5.0) -> None:
        port = free_port()
        self.store = dist.TCPStore("127.0.0.1", port, is_master=True)
        self.prefix_store = dist.PrefixStore("fireflyds/0", self.store)
        self.heartbeat = Heartbeat(RankInfo(0, 0, 2, "127.0.0.1", port), folder, seconds, Status(folder, 0, 9))

    def set_heartbeat(self, pid: int, host: str = "", step: int = 4) -> None:
        hostname = host or socket.gethostname()
        entry = {
            "host": hostname,
            "machine": "another" if host else process_namespace(),
            "pid": pid,
            "step": step,
            "time": 0,
        }
        self.prefix_store.set("beat/1", json.dumps(entry))


def test_a_dead_rank_is_reported_and_a_live_one_is_not(tmp_path: Path) -> None:
    store = RankStore(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with store.heartbeat:
        store.set_heartbeat(child.pid)
        assert store.heartbeat.look() is None
        child.kill()
        lost = None
        deadline = time.monotonic() + 20
        while lost is None and time.monotonic() < deadline:
            lost = store.heartbeat.look()
        store.heartbeat.left.set()  # before it ends this process too
    child.wait()
    assert lost is not None
    assert str(lost).startswith(
        f"rank 1 on {socket.gethostname()} died (process {child.pid}, after step 4); its log: {tmp_path}"
    )
    assert json.loads(store.prefix_store.get("lost"))["rank"] == lost.rank == 1


def test_a_silent_rank_on_another_host_is_lost_after_the_timeout(tmp_path: Path, monkeypatch) -> None:
    store, now = RankStore(tmp_path, seconds=30), [100.0]
    store.heartbeat.store = store.prefix_store
    monkeypatch.setattr("fireflyds.distributed.heartbeat.time.monotonic", lambda: now[0])
    store.set_heartbeat(1, "elsewhere", step=1)
    assert store.heartbeat.look() is None
    now[0] += 29
    assert store.heartbeat.look() is None
    store.set_heartbeat(1, "elsewhere", step=2)
    now[0] += 29
    assert store.heartbeat.look() is None
    now[0] += 31
    assert "rank 1 on elsewhere has been silent for 30 s" in str(store.heartbeat.look())


def test_after_a_failed_collective_a_silent_rank_is_reported_within_seconds(tmp_path: Path, monkeypatch) -> None:
    store, now = RankStore(tmp_path, seconds=60), [100.0]
    store.heartbeat.store = store.prefix_store
    monkeypatch.setattr("fireflyds.distributed.heartbeat.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "fireflyds.distributed.heartbeat.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    store.set_heartbeat(1, "elsewhere", step=1)
    assert store.heartbeat.look() is None
    now[0] += 1
    assert "rank 1 on elsewhere has been silent for 4 s" in str(store.heartbeat.wait_for_lost_rank())
    # Other ranks, which may wait in a collective, read it from the store.
    assert store.prefix_store.get("trouble") == b"yes"
    assert b"rank 1 on elsewhere" in store.prefix_store.get("lost")


def test_a_rank_with_a_user_error_is_reported_when_the_others_keep_waiting(tmp_path: Path, monkeypatch) -> None:
    store, now = RankStore(tmp_path), [100.0]
    store.heartbeat.store = store.prefix_store
    monkeypatch.setattr("fireflyds.distributed.heartbeat.time.monotonic", lambda: now[0])
    store.set_heartbeat(1, "elsewhere")
    assert store.heartbeat.look() is None
    store.prefix_store.set("refused/1", "model.path=/local/base: is not there")
    store.prefix_store.set("left/1", "yes")
    assert store.heartbeat.look() is None
    now[0] += 89
    assert store.heartbeat.look() is None
    now[0] += 2
    assert "rank 1 on elsewhere refused (model.path=/local/base: is not there)" in str(store.heartbeat.look())


def test_a_missing_or_blocked_disk_does_not_keep_a_rank_from_exiting(tmp_path: Path, monkeypatch) -> None:
    exit_codes, status = [], Status(tmp_path / "gone", 0, 9)
    monkeypatch.setattr("fireflyds.distributed.heartbeat.os._exit", exit_codes.append)
    monkeypatch.setattr("fireflyds.distributed.heartbeat._INTERVAL", 0.01)
    heartbeat = Heartbeat(RankInfo(0, 0, 2, "10.0.0.1", 29500), tmp_path, 30, status)
    heartbeat.end_process(LostRankError("rank 1 died", rank=1))
    monkeypatch.setattr(status, "_write", lambda *arguments, **options: time.sleep(30))
    heartbeat.end_process(LostRankError("rank 1 died", rank=1))
    assert exit_codes == [1, 1]


@pytest.mark.parametrize(
    ("received_signals", "exit_codes"),
    [
        ([(0, "SIGUSR1"), (5, "SIGTERM")], []),
        ([(0, "SIGUSR1"), (5, "SIGTERM"), (9, "SIGTERM")], [143]),
        ([(0, "SIGINT"), (0.5, "SIGTERM")], []),
        ([(0, "SIGINT"), (0.5, "SIGINT")], [130]),
        ([(0, "SIGTERM"), (2, "SIGUSR1")], []),
    ],
)
def test_only_a_second_stop_signal_exits_immediately(monkeypatch, tmp_path: Path, received_signals, exit_codes) -> None:
    now, actual_exit_codes = [0.0], []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        requests = StopSignals(tmp_path)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    monkeypatch.setattr("fireflyds.distributed.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fireflyds.distributed.signals.os._exit", actual_exit_codes.append)
    for seconds, name in received_signals:
        now[0] = seconds
        requests.handle_signal(signal.Signals[name], None)
    assert actual_exit_codes == exit_codes
    assert requests.reason == received_signals[0][1]


def test_the_message_of_a_failed_rank_is_reported_and_a_finished_rank_is_not_lost(tmp_path: Path) -> None:
    store = RankStore(tmp_path)
    store.heartbeat.store = store.prefix_store
    store.set_heartbeat(1, "elsewhere")
    store.prefix_store.set("failed/1", "OutOfMemoryError: no more")
    assert "rank 1 on elsewhere failed (OutOfMemoryError: no more)" in str(store.heartbeat.look())
    second_store = RankStore(tmp_path)
    second_store.heartbeat.store = second_store.prefix_store
    second_store.prefix_store.set("left/1", "yes")
    assert second_store.heartbeat.look() is None


def test_a_failed_collective_is_reported_as_the_lost_rank(tmp_path: Path) -> None:
    store = RankStore(tmp_path)
    store.prefix_store.set("failed/1", "ValueError: x")
    with pytest.raises(UserError, match="rank 1 failed"), store.heartbeat:
        raise RuntimeError("Connection closed by peer")


def test_an_unreachable_store_ends_the_rank(tmp_path: Path, monkeypatch, capsys) -> None:
    """Over a link that is down the store's client blocks without a timeout."""
    now, exit_codes, status = [100.0], [], Status(tmp_path, 1, 9)
    monkeypatch.setattr("fireflyds.distributed.heartbeat.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fireflyds.distributed.heartbeat._INTERVAL", 0.01)
    heartbeat = Heartbeat(RankInfo(1, 0, 2, "10.0.0.1", 29500), tmp_path, 30, status)
    heartbeat.seen[0] = (json.dumps({"host": "host-a", "pid": 1}), 100.0)

    def record_exit(code: int) -> None:
        exit_codes.append(code)
        heartbeat.left.set()

    monkeypatch.setattr("fireflyds.distributed.heartbeat.os._exit", record_exit)
    monitor = threading.Thread(target=heartbeat.watch_monitor)
    monitor.start()
    now[0] += 29
    time.sleep(0.2)
    assert not exit_codes
    now[0] += 2
    monitor.join(20)
    assert exit_codes == [1]
    hostname = socket.gethostname()
    message = (
        f"rank 0 on host-a cannot be reached from {hostname} at 10.0.0.1:29500 (no answer for 30 s); its log: "
        f"{tmp_path}/logs/rank_0.log"
    )
    assert f"error: {message}" in capsys.readouterr().err
    assert json.loads((tmp_path / "status.json").read_text())["message"].startswith(message)


def test_the_status_of_rank_zero_takes_precedence_when_two_ranks_report_each_other_lost(tmp_path: Path) -> None:
    first, second = Status(tmp_path, 0, 9), Status(tmp_path, 1, 9)
    first.write("running")
    second.failed(LostRankError("rank 0 on host-a cannot be reached", rank=0))
    assert json.loads((tmp_path / "status.json").read_text())["message"] == "rank 0 on host-a cannot be reached"
    first.write("running")
    first.failed(LostRankError("rank 1 on host-b has been silent for 5 s", rank=1))
    second.failed(LostRankError("rank 0 on host-a cannot be reached", rank=0))
    assert json.loads((tmp_path / "status.json").read_text())["message"].startswith("rank 1 on host-b")


def test_a_spike_exceeds_the_mean_of_recent_losses(tmp_path: Path) -> None:
    config, state = RecoveryConfig(rollback_above=1.5), TrainState()
    assert not any(loss_spike.is_spike(state, loss, config) for loss in [9.0, *[2.0] * 9])
    assert not loss_spike.is_spike(state, 3.9, config)
    assert loss_spike.is_spike(state, 4.4, config)
    assert not loss_spike.is_spike(state, float("nan"), config)
    assert not loss_spike.is_spike(state, 400.0, RecoveryConfig())
    assert len(state.recent_losses) == 11


def test_rollbacks_skip_the_data_of_a_spike_up_to_max_rollbacks(tmp_path: Path) -> None:
    config = RecoveryConfig(rollback_above=1.5, max_rollbacks=2)
    saved = TrainState(step=20, skipped_batches=3)
    loss_spike.rollback(TrainState(step=27, skipped_batches=3, rollbacks=1), saved, config)
    assert (saved.step, saved.skipped_batches, saved.rollbacks) == (20, 10, 2)
    with pytest.raises(UserError, match=r"step 27: recovery.max_rollbacks=2: the loss spikes again after 2 rollbacks"):
        loss_spike.rollback(TrainState(step=27, rollbacks=2), TrainState(step=20), config)


def test_the_nonfinite_report_covers_only_watched_micro_batches(requests: StopSignals) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(1, 1))
    detector = NonFiniteDetector(layer)
    detector.reset()
    unwatched_report = detector.report(str)
    assert unwatched_report.startswith("which tensor was the first is not known")
    assert "with recovery.max_skipped=2 it is named" in unwatched_report
    with detector.watch(0):
        layer(torch.ones(1))
    assert detector.report(str).startswith("every output and every gradient of one micro-batch was finite")
    with detector.watch(1):
        layer(torch.tensor([float("nan")]))
    assert "is the output of 0, in micro-batch 2 of rank 0, which holds 1" in detector.report(str)
    detector.reset()
    assert detector.report(str) == unwatched_report
