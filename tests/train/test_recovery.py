"""What a run does when it is asked to stop, when a rank is lost, and when its loss spikes."""

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
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield StopSignals(tmp_path)
    dist.destroy_process_group()
    for number, handler in kept.items():
        signal.signal(number, handler)


def poll(requests: StopSignals, failed: bool = False) -> StopRequest:
    return requests.poll(torch.device("cpu"), failed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_to_stop(requests: StopSignals, number: signal.Signals) -> None:
    assert poll(requests) == StopRequest(save=False, stop=False, no_requeue=False, failed=False)
    os.kill(os.getpid(), number)
    assert poll(requests) == StopRequest(save=False, stop=True, no_requeue=False, failed=False)
    assert requests.reason == number.name


def test_a_launchers_echo_of_ctrl_c_is_no_second_one(requests: StopSignals) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert poll(requests).stop
    assert requests.reason == "SIGINT"


def test_files_ask_once(requests: StopSignals, tmp_path: Path) -> None:
    (tmp_path / "SAVE").touch()
    assert poll(requests) == StopRequest(save=True, stop=False, no_requeue=False, failed=False)
    assert poll(requests) == StopRequest(save=False, stop=False, no_requeue=False, failed=False)
    (tmp_path / "STOP").touch()
    assert poll(requests, failed=True) == StopRequest(save=False, stop=True, no_requeue=True, failed=True)
    assert not (tmp_path / "STOP").exists()
    assert requests.reason == "STOP file"


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    script = f"""
import os, signal, time
from pathlib import Path
from fireflyds.distributed.signals import StopSignals
StopSignals(Path({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert "interrupted again: leaving at once" in done.stderr


class Store:
    """The ranks' meeting place, with rank 1 played by the test."""

    def __init__(self, folder: Path, seconds: float = 5.0) -> None:
        port = free_port()
        self.store = dist.TCPStore("127.0.0.1", port, is_master=True)
        self.others = dist.PrefixStore("fireflyds/0", self.store)
        self.beating = Heartbeat(RankInfo(0, 0, 2, "127.0.0.1", port), folder, seconds, Status(folder, 0, 9))

    def beat(self, pid: int, host: str = "", step: int = 4) -> None:
        here = host or socket.gethostname()
        about = {
            "host": here,
            "machine": "another" if host else process_namespace(),
            "pid": pid,
            "step": step,
            "time": 0,
        }
        self.others.set("beat/1", json.dumps(about))


def test_a_rank_that_lives_is_left_alone_and_one_that_died_is_named(tmp_path: Path) -> None:
    here = Store(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with here.beating:
        here.beat(child.pid)
        assert here.beating.look() is None
        child.kill()
        lost = None
        until = time.monotonic() + 20
        while lost is None and time.monotonic() < until:
            lost = here.beating.look()
        here.beating.left.set()  # before it ends this process too
    child.wait()
    assert lost is not None
    assert str(lost).startswith(
        f"rank 1 on {socket.gethostname()} died (process {child.pid}, after step 4); its log: {tmp_path}"
    )
    assert json.loads(here.others.get("lost"))[0] == lost.rank == 1


def test_a_silent_rank_on_another_host_is_lost_after_the_time_given(tmp_path: Path, monkeypatch) -> None:
    here, now = Store(tmp_path, seconds=30), [100.0]
    here.beating.store = here.others
    monkeypatch.setattr("fireflyds.distributed.heartbeat.time.monotonic", lambda: now[0])
    here.beat(1, "elsewhere", step=1)
    assert here.beating.look() is None
    now[0] += 29
    assert here.beating.look() is None
    here.beat(1, "elsewhere", step=2)
    now[0] += 29
    assert here.beating.look() is None
    now[0] += 31
    assert "rank 1 on elsewhere has been silent for 30 s" in str(here.beating.look())


def test_when_a_collective_has_failed_whoever_beats_no_more_is_named_soon(tmp_path: Path, monkeypatch) -> None:
    here, now = Store(tmp_path, seconds=60), [100.0]
    here.beating.store = here.others
    monkeypatch.setattr("fireflyds.distributed.heartbeat.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "fireflyds.distributed.heartbeat.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    here.beat(1, "elsewhere", step=1)
    assert here.beating.look() is None
    now[0] += 1
    assert "rank 1 on elsewhere has been silent for 4 s" in str(here.beating.wait_for_lost_rank())
    # The others, which may wait in a collective of their own, hear of it.
    assert here.others.get("trouble") == b"yes"
    assert b"rank 1 on elsewhere" in here.others.get("lost")


def test_a_rank_that_refuses_alone_is_named_when_the_others_wait_on(tmp_path: Path, monkeypatch) -> None:
    here, now = Store(tmp_path), [100.0]
    here.beating.store = here.others
    monkeypatch.setattr("fireflyds.distributed.heartbeat.time.monotonic", lambda: now[0])
    here.beat(1, "elsewhere")
    assert here.beating.look() is None
    here.others.set("refused/1", "model.path=/local/base: is not there")
    here.others.set("left/1", "yes")
    assert here.beating.look() is None
    now[0] += 89
    assert here.beating.look() is None
    now[0] += 2
    assert "rank 1 on elsewhere refused (model.path=/local/base: is not there)" in str(here.beating.look())


def test_a_disk_that_is_gone_does_not_keep_a_rank(tmp_path: Path, monkeypatch) -> None:
    ended, status = [], Status(tmp_path / "gone", 0, 9)
    monkeypatch.setattr("fireflyds.distributed.heartbeat.os._exit", ended.append)
    monkeypatch.setattr("fireflyds.distributed.heartbeat._INTERVAL", 0.01)
    beating = Heartbeat(RankInfo(0, 0, 2, "10.0.0.1", 29500), tmp_path, 30, status)
    beating.end_process(LostRankError("rank 1 died", rank=1))
    monkeypatch.setattr(status, "_write", lambda *words, **more: time.sleep(30))
    beating.end_process(LostRankError("rank 1 died", rank=1))
    assert ended == [1, 1]


@pytest.mark.parametrize(
    ("heard", "left"),
    [
        ([(0, "SIGUSR1"), (5, "SIGTERM")], []),
        ([(0, "SIGUSR1"), (5, "SIGTERM"), (9, "SIGTERM")], [143]),
        ([(0, "SIGINT"), (0.5, "SIGTERM")], []),
        ([(0, "SIGINT"), (0.5, "SIGINT")], [130]),
        ([(0, "SIGTERM"), (2, "SIGUSR1")], []),
    ],
)
def test_only_a_second_wish_to_end_leaves_at_once(monkeypatch, tmp_path: Path, heard, left) -> None:
    now, ended = [0.0], []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        asked = StopSignals(tmp_path)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    monkeypatch.setattr("fireflyds.distributed.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fireflyds.distributed.signals.os._exit", ended.append)
    for when, name in heard:
        now[0] = when
        asked.handle_signal(signal.Signals[name], None)
    assert ended == left
    assert asked.reason == heard[0][1]


def test_what_a_failing_rank_said_is_told_and_one_that_left_is_not_missed(tmp_path: Path) -> None:
    here = Store(tmp_path)
    here.beating.store = here.others
    here.beat(1, "elsewhere")
    here.others.set("failed/1", "OutOfMemoryError: no more")
    assert "rank 1 on elsewhere failed (OutOfMemoryError: no more)" in str(here.beating.look())
    fresh = Store(tmp_path)
    fresh.beating.store = fresh.others
    fresh.others.set("left/1", "yes")
    assert fresh.beating.look() is None


def test_a_failed_collective_is_blamed_on_the_rank_that_was_lost(tmp_path: Path) -> None:
    here = Store(tmp_path)
    here.others.set("failed/1", "ValueError: x")
    with pytest.raises(UserError, match="rank 1 failed"), here.beating:
        raise RuntimeError("Connection closed by peer")


def test_a_store_that_answers_no_more_ends_the_rank_that_asks_it(tmp_path: Path, monkeypatch, capsys) -> None:
    """Over a link that is down the store's client waits for ever."""
    now, ended, status = [100.0], [], Status(tmp_path, 1, 9)
    monkeypatch.setattr("fireflyds.distributed.heartbeat.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fireflyds.distributed.heartbeat._INTERVAL", 0.01)
    beating = Heartbeat(RankInfo(1, 0, 2, "10.0.0.1", 29500), tmp_path, 30, status)
    beating.seen[0] = (json.dumps({"host": "host-a", "pid": 1}), 100.0)

    def end(code: int) -> None:
        ended.append(code)
        beating.left.set()

    monkeypatch.setattr("fireflyds.distributed.heartbeat.os._exit", end)
    watch = threading.Thread(target=beating.watch_monitor)
    watch.start()
    now[0] += 29
    time.sleep(0.2)
    assert not ended
    now[0] += 2
    watch.join(20)
    assert ended == [1]
    here = socket.gethostname()
    said = (
        f"rank 0 on host-a cannot be reached from {here} at 10.0.0.1:29500 (no answer for 30 s); its log: "
        f"{tmp_path}/logs/rank_0.log"
    )
    assert f"error: {said}" in capsys.readouterr().err
    assert json.loads((tmp_path / "status.json").read_text())["message"].startswith(said)


def test_of_two_that_miss_each_other_the_word_of_rank_zero_counts(tmp_path: Path) -> None:
    first, second = Status(tmp_path, 0, 9), Status(tmp_path, 1, 9)
    first.write("running")
    second.failed(LostRankError("rank 0 on host-a cannot be reached", rank=0))
    assert json.loads((tmp_path / "status.json").read_text())["message"] == "rank 0 on host-a cannot be reached"
    first.write("running")
    first.failed(LostRankError("rank 1 on host-b has been silent for 5 s", rank=1))
    second.failed(LostRankError("rank 0 on host-a cannot be reached", rank=0))
    assert json.loads((tmp_path / "status.json").read_text())["message"].startswith("rank 1 on host-b")


def test_a_spike_stands_out_of_the_last_losses(tmp_path: Path) -> None:
    config, state = RecoveryConfig(rollback_above=1.5), TrainState()
    assert not any(loss_spike.is_spike(state, loss, config) for loss in [9.0, *[2.0] * 9])
    assert not loss_spike.is_spike(state, 3.9, config)
    assert loss_spike.is_spike(state, 4.4, config)
    assert not loss_spike.is_spike(state, float("nan"), config)
    assert not loss_spike.is_spike(state, 400.0, RecoveryConfig())
    assert len(state.recent_losses) == 11


def test_the_data_of_a_spike_are_passed_over_so_many_times(tmp_path: Path) -> None:
    config = RecoveryConfig(rollback_above=1.5, max_rollbacks=2)
    saved = TrainState(step=20, skipped_batches=3)
    loss_spike.rollback(TrainState(step=27, skipped_batches=3, rollbacks=1), saved, config)
    assert (saved.step, saved.skipped_batches, saved.rollbacks) == (20, 10, 2)
    with pytest.raises(UserError, match=r"step 27: recovery.max_rollbacks=2: the loss spikes again after 2 rollbacks"):
        loss_spike.rollback(TrainState(step=27, rollbacks=2), TrainState(step=20), config)


def test_where_nobody_looked_nothing_is_said_to_be_finite(requests: StopSignals) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(1, 1))
    detector = NonFiniteDetector(layer)
    detector.reset()
    unseen = detector.report(str)
    assert unseen.startswith("which tensor was the first is not known")
    assert "with recovery.max_skipped=2 it is named" in unseen
    with detector.watch(0):
        layer(torch.ones(1))
    assert detector.report(str).startswith("every output and every gradient of one micro-batch was finite")
    with detector.watch(1):
        layer(torch.tensor([float("nan")]))
    assert "is the output of 0, in micro-batch 2 of rank 0, which holds 1" in detector.report(str)
    detector.reset()
    assert detector.report(str) == unseen
