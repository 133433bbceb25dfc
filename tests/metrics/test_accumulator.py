"""The metrics of a step equal values counted by hand."""

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
def process_group(tmp_path: Path):
    """One rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class QuadraticFlops:
    """FLOPs of a step that are easily added up."""

    def count(self, lengths, labelled: int) -> float:
        return float((np.asarray(lengths) ** 2).sum() + 1000 * labelled)


def metrics_context(peak: float | None = None) -> MetricsContext:
    # Token i stands for i bytes, but 0 is a special token.
    return MetricsContext(DOMAINS, np.arange(50, dtype=np.int32), ["matrices", "norms"], 40, QuadraticFlops(), peak)


def batch(lengths: list[int], domains: list[int], labels: list[int]) -> PackedBatch:
    assert sum(lengths) == len(labels)
    targets = np.array(labels)
    return PackedBatch.from_flat(np.zeros_like(targets), targets, np.array(lengths), np.array(domains))


NO_LABEL = IGNORE_INDEX
BATCHES = [
    batch([3, 2, 3], [0, 1, 0], [7, 0, NO_LABEL, 5, NO_LABEL, NO_LABEL, 9, NO_LABEL]),
    batch([4], [1], [2, 3, NO_LABEL, NO_LABEL]),
]
LOSSES = [torch.tensor([1.0, 2.0, 0, 4.0, 0, 0, 8.0, 0]), torch.tensor([16.0, 32.0, 0, 0])]


def one_step(accumulator: StepMetricsAccumulator) -> torch.Tensor:
    for number, losses in enumerate(LOSSES):
        with accumulator.time_forward():
            pass
        accumulator.add_micro_batch(number, losses.sum(), losses)
    return accumulator.reduce()


def test_losses_and_bits_per_byte_are_counted_by_domain(process_group: None) -> None:
    accumulator = StepMetricsAccumulator(metrics_context(), CausalLM().count, torch.device("cpu"), 10)
    assert accumulator.start_step(BATCHES, 0.25) == (6, 12)
    assert one_step(accumulator) == 63
    metrics = accumulator.finish_step(1, 2.0, [0.1, 0.2])
    assert metrics["loss/zh"] == pytest.approx(11 / 3)
    assert metrics["loss/en"] == pytest.approx(52 / 3)
    # zh learned tokens 7, 0, 9 (16 bytes); en 5, 2, 3 (10 bytes); nothing of code.
    assert metrics["bits_per_byte/zh"] == pytest.approx(11 / math.log(2) / 16)
    assert metrics["bits_per_byte/en"] == pytest.approx(52 / math.log(2) / 10)
    assert metrics["bits_per_byte"] == pytest.approx(63 / math.log(2) / 26)
    assert not [key for key in metrics if key.endswith("/code")]


def test_throughput_fill_and_eta_of_a_step(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 1.0, 1.5, 100.0, 0.0, 0.0, 0.0, 0.0, 103.0])
    accumulator = StepMetricsAccumulator(metrics_context(peak=1e5), CausalLM().count, torch.device("cpu"), 10)
    monkeypatch.setattr("fireflyds.metrics.accumulator.time.perf_counter", lambda: next(clock))
    accumulator.start_step(BATCHES, 0.25)
    one_step(accumulator)
    metrics = accumulator.finish_step(1, 2.0, [0.1, 0.2])
    assert (metrics["lr/matrices"], metrics["lr/norms"]) == (0.1, 0.2)
    assert metrics["fill"] == 12 / 40
    assert metrics["tokens_per_second_per_gpu"] == 6
    assert metrics["learned_tokens_per_second_per_gpu"] == 3
    flops = 9 + 4 + 9 + 16 + 6000
    assert metrics["flops"] == flops
    assert metrics["tflops_per_gpu"] == pytest.approx(flops / 2 / 1e12)
    assert metrics["mfu"] == pytest.approx(flops / 2 / 1e5)
    assert metrics["data_wait_seconds"] == 0.25
    # Half a second for each of two forward passes, and the wait.
    assert (metrics["slowest_rank"], metrics["slowest_seconds"], metrics["step_seconds_spread"]) == (0, 1.25, 0)
    assert metrics["eta_seconds"] == 9 * 2.0
    assert metrics["memory_gib"] > 0.05
    accumulator.start_step(BATCHES, 0.0)
    one_step(accumulator)
    # Time between two steps counts: saving, validation.
    assert accumulator.finish_step(2, 2.0, [0.1, 0.2])["eta_seconds"] == 8 * 3.0


def test_without_a_known_peak_there_is_no_mfu(process_group: None) -> None:
    accumulator = StepMetricsAccumulator(metrics_context(), CausalLM().count, torch.device("cpu"), 10)
    accumulator.start_step(BATCHES, 0.0)
    one_step(accumulator)
    assert "mfu" not in accumulator.finish_step(1, 2.0, [0.1, 0.2])


def test_the_single_domain_path_equals_the_general_path(process_group: None) -> None:
    """The fast path: one domain per batch instead of one per token."""
    metrics = []
    for domains in ([1, 1, 1], [1, 1, 1, 1]):
        accumulator = StepMetricsAccumulator(metrics_context(), CausalLM().count, torch.device("cpu"), 10)
        # An empty last document of another domain selects the general path.
        lengths, domain_indices = ([3, 2, 3], domains) if len(domains) == 3 else ([3, 2, 3, 0], [*domains[:3], 0])
        accumulator.start_step([batch(lengths, domain_indices, BATCHES[0].labels[0].tolist())], 0.0)
        accumulator.add_micro_batch(0, LOSSES[0].sum(), LOSSES[0])
        accumulator.reduce()
        metrics.append(accumulator.finish_step(1, 2.0, [0.1, 0.2]))
    assert metrics[0]["loss/en"] == metrics[1]["loss/en"] == 15 / 4
    assert metrics[0]["bits_per_byte/en"] == metrics[1]["bits_per_byte/en"]
    assert "loss/zh" not in metrics[1]
