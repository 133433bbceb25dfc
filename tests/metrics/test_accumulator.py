"""What a step says beside its loss is what one would count by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fireflyds.metrics.accumulator import MetricsContext, StepMetricsAccumulator
from fireflyds.train.objectives.causal_lm import CausalLM
from fireflyds.types import IGNORE_INDEX, PackedBatch

DOMAINS = ["zh", "en", "code"]


@pytest.fixture
def alone(tmp_path: Path):
    """One rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Squares:
    """A cost that is easily added up."""

    def count(self, lengths, labelled: int) -> float:
        return float((np.asarray(lengths) ** 2).sum() + 1000 * labelled)


def measured(peak: float | None = None) -> MetricsContext:
    # Token i stands for i bytes, but 0 is a special token.
    return MetricsContext(DOMAINS, np.arange(50, dtype=np.int32), ["matrices", "norms"], 40, Squares(), peak)


def batch(lengths: list[int], domains: list[int], labels: list[int]) -> PackedBatch:
    assert sum(lengths) == len(labels)
    targets = np.array(labels)
    return PackedBatch.from_flat(np.zeros_like(targets), targets, np.array(lengths), np.array(domains))


N = IGNORE_INDEX
BATCHES = [
    batch([3, 2, 3], [0, 1, 0], [7, 0, N, 5, N, N, 9, N]),
    batch([4], [1], [2, 3, N, N]),
]
LOSSES = [torch.tensor([1.0, 2.0, 0, 4.0, 0, 0, 8.0, 0]), torch.tensor([16.0, 32.0, 0, 0])]


def one_step(statistics: StepMetricsAccumulator) -> torch.Tensor:
    for number, losses in enumerate(LOSSES):
        with statistics.time_forward():
            pass
        statistics.add_micro_batch(number, losses.sum(), losses)
    return statistics.reduce()


def test_losses_and_bytes_go_to_their_domains(alone: None) -> None:
    statistics = StepMetricsAccumulator(measured(), CausalLM().count, torch.device("cpu"), 10)
    assert statistics.start_step(BATCHES, 0.25) == (6, 12)
    assert one_step(statistics) == 63
    found = statistics.finish_step(1, 2.0, [0.1, 0.2])
    assert found["loss/zh"] == pytest.approx(11 / 3)
    assert found["loss/en"] == pytest.approx(52 / 3)
    # zh learned tokens 7, 0, 9 (16 bytes); en 5, 2, 3 (10 bytes); nothing of code.
    assert found["bits_per_byte/zh"] == pytest.approx(11 / math.log(2) / 16)
    assert found["bits_per_byte/en"] == pytest.approx(52 / math.log(2) / 10)
    assert found["bits_per_byte"] == pytest.approx(63 / math.log(2) / 26)
    assert not [key for key in found if key.endswith("/code")]


def test_rates_fill_and_time_left_are_those_of_the_step(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 1.0, 1.5, 100.0, 0.0, 0.0, 0.0, 0.0, 103.0])
    statistics = StepMetricsAccumulator(measured(peak=1e5), CausalLM().count, torch.device("cpu"), 10)
    monkeypatch.setattr("fireflyds.metrics.accumulator.time.perf_counter", lambda: next(clock))
    statistics.start_step(BATCHES, 0.25)
    one_step(statistics)
    found = statistics.finish_step(1, 2.0, [0.1, 0.2])
    assert (found["lr/matrices"], found["lr/norms"]) == (0.1, 0.2)
    assert found["fill"] == 12 / 40
    assert found["tokens_per_second_per_gpu"] == 6
    assert found["learned_tokens_per_second_per_gpu"] == 3
    flops = 9 + 4 + 9 + 16 + 6000
    assert found["flops"] == flops
    assert found["tflops_per_gpu"] == pytest.approx(flops / 2 / 1e12)
    assert found["mfu"] == pytest.approx(flops / 2 / 1e5)
    assert found["data_wait_seconds"] == 0.25
    # Half a second for each of two forward passes, and the wait.
    assert (found["slowest_rank"], found["slowest_seconds"], found["step_seconds_spread"]) == (0, 1.25, 0)
    assert found["eta_seconds"] == 9 * 2.0
    assert found["memory_gib"] > 0.05
    statistics.start_step(BATCHES, 0.0)
    one_step(statistics)
    # What lies between two steps counts: saving, validation.
    assert statistics.finish_step(2, 2.0, [0.1, 0.2])["eta_seconds"] == 8 * 3.0


def test_without_a_known_peak_there_is_no_mfu(alone: None) -> None:
    statistics = StepMetricsAccumulator(measured(), CausalLM().count, torch.device("cpu"), 10)
    statistics.start_step(BATCHES, 0.0)
    one_step(statistics)
    assert "mfu" not in statistics.finish_step(1, 2.0, [0.1, 0.2])


def test_a_batch_of_one_domain_counts_as_one_of_many_does(alone: None) -> None:
    """The short way: no domain for every token."""
    found = []
    for domains in ([1, 1, 1], [1, 1, 1, 1]):
        statistics = StepMetricsAccumulator(measured(), CausalLM().count, torch.device("cpu"), 10)
        # An empty last document of another domain sends all the others the long way.
        lengths, names = ([3, 2, 3], domains) if len(domains) == 3 else ([3, 2, 3, 0], [*domains[:3], 0])
        statistics.start_step([batch(lengths, names, BATCHES[0].labels[0].tolist())], 0.0)
        statistics.add_micro_batch(0, LOSSES[0].sum(), LOSSES[0])
        statistics.reduce()
        found.append(statistics.finish_step(1, 2.0, [0.1, 0.2]))
    assert found[0]["loss/en"] == found[1]["loss/en"] == 15 / 4
    assert found[0]["bits_per_byte/en"] == found[1]["bits_per_byte/en"]
    assert "loss/zh" not in found[1]
