"""Copies for a checkpoint: exact through small buffers; a file is written without stopping other threads."""

import threading
import time

import pytest
import torch

from fireflyds.checkpoint import shard_files
from fireflyds.checkpoint.host_copies import HostCopier


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 24, 1000])
def test_copies_in_pieces_are_exact_whatever_the_sizes(dtype: torch.dtype, numel: int) -> None:
    values = torch.arange(numel).to(dtype)
    copier = HostCopier(buffer_bytes=64)
    for source in (values, values.flip(0)):  # the buffers are used again
        copy = copier.copy_in_pieces(source, pinned=False)
        assert copy.dtype is dtype
        assert torch.equal(copy, source)


def test_a_copy_shares_no_memory_with_its_tensor() -> None:
    weights = torch.ones(3, 4)
    copy = HostCopier().copy(weights)
    weights.zero_()
    assert copy.tolist() == [1.0] * 12


def test_other_threads_run_while_a_large_file_is_written(tmp_path, monkeypatch) -> None:
    # A heartbeat is a thread: safetensors before 0.8 held the interpreter's lock for the whole write.
    ticks, span, done = [], [], threading.Event()
    save_file = shard_files.save_file

    def timed_save_file(*arguments) -> None:
        span.append(time.monotonic())
        save_file(*arguments)
        span.append(time.monotonic())

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    monkeypatch.setattr(shard_files, "save_file", timed_save_file)
    thread = threading.Thread(target=tick)
    thread.start()
    shard_files.write_shard(tmp_path, 0, {f"{number}": torch.zeros(8 << 20) for number in range(16)})
    done.set()
    thread.join()
    assert sum(span[0] < moment < span[1] for moment in ticks) >= 5
