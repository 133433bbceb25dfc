"""Metrics of a training step in addition to its loss: by domain, by parameter group, throughput, and timing by rank.

Counts known on the host are part of the all-reduce before the step, loss sums of the all-reduce after the last backward
pass; the timings of the ranks are all-gathered once at the end of the step. The host waits for the device once for each
of the three, and for none of the micro-batches.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fireflyds.config import Precision, TrainConfig
from fireflyds.data.store.store import TokenStore
from fireflyds.metrics.flops import peak_flops, step_flops
from fireflyds.optim.param_groups import parameter_groups
from fireflyds.types import IGNORE_INDEX, Encoder, PackedBatch

# Number of recent steps whose mean duration gives the ETA.
_ETA_WINDOW = 50
# Number of leading entries of the counts that are totals over all domains.
_NUM_TOTALS = 4


class FlopsModel(Protocol):
    """Computes the FLOPs, forward and backward, of documents of `lengths` tokens with `labelled` labelled rows."""

    def count(self, lengths: Any, labelled: int) -> float:
        """Floating-point operations of one forward and backward pass."""


@dataclass(frozen=True, slots=True)
class MetricsContext:
    """Constants of a run that its metrics are computed from."""

    domains: Sequence[str]
    token_bytes: np.ndarray
    """Number of UTF-8 bytes of text per token: int32 `[vocab_size]`."""
    groups: Sequence[str]
    """Names of the optimizer's parameter groups, in order."""
    row_tokens: int
    """Token capacity of a step: `global_batch_size · seq_len`."""
    flops_model: FlopsModel
    peak: float | None
    """Peak FLOP/s of one device; None where it is unknown, and then no MFU is reported."""


class StepMetricsAccumulator:
    """Computes the metrics of consecutive steps.

    Calls per step: `start_step`; `time_forward` and `add_micro_batch` for every micro-batch; `reduce`; `finish_step`.

    The time of a rank is that of its forward passes plus its wait for data. These contain no collective communication
    except under ZeRO-3, which all-gathers weights: there a slow rank also increases the times of the other ranks.
    """

    def __init__(
        self,
        context: MetricsContext,
        count_targets: Callable[[PackedBatch], int],
        device: torch.device,
        total_steps: int,
    ) -> None:
        self._context, self._device, self._total_steps = context, device, total_steps
        self._count_targets = count_targets
        self._process = psutil.Process()
        self._ends: deque[float] = deque(maxlen=_ETA_WINDOW + 1)
        self._waited = self._host_seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._batch_domains: list[int | Tensor] = []
        self._counts, self._losses, self._summed_losses = np.zeros(0), torch.zeros(0), np.zeros(0)
        self.summed_more = np.zeros(0)

    def start_step(self, batches: list[PackedBatch], waited: float) -> tuple[int, int]:
        """Starts a step and sums its counts over all ranks.

        `waited`: seconds for which this rank waited for `batches`. Returns the loss denominator and the number of
        tokens of the step, both over all ranks.
        """
        self._waited, self._host_seconds, self._events = waited, 0.0, []
        self._losses = torch.zeros(1 + len(self._context.domains), dtype=torch.float64, device=self._device)
        # Targets, learned tokens, tokens, FLOPs; learned tokens of every domain; bytes of every domain.
        counts = np.zeros(_NUM_TOTALS + 2 * len(self._context.domains))
        self._batch_domains = [self._count(batch, counts) for batch in batches]
        summed = torch.from_numpy(counts).to(self._device)
        dist.all_reduce(summed)
        self._counts = summed.cpu().numpy()
        return int(self._counts[0]), int(self._counts[2])

    @property
    def learned_tokens(self) -> int:
        """Number of learned tokens of the step, over all ranks."""
        return int(self._counts[1])

    def _count(self, batch: PackedBatch, counts: np.ndarray) -> int | Tensor:
        """Adds a micro-batch to `counts`. Returns its domain index, or one per token `[T]` if it has several."""
        num_domains = len(self._context.domains)
        labels, lengths, domains = batch.labels[0].numpy(), np.diff(batch.cu_seqlens.numpy()), batch.domains.numpy()
        learned = labels != IGNORE_INDEX
        num_bytes = self._context.token_bytes[labels[learned]]
        flops = self._context.flops_model.count(lengths, batch.num_learned)
        counts[:_NUM_TOTALS] += self._count_targets(batch), batch.num_learned, len(labels), flops
        if (domains == domains[0]).all():
            counts[[_NUM_TOTALS + domains[0], _NUM_TOTALS + num_domains + domains[0]]] += (
                batch.num_learned,
                num_bytes.sum(),
            )
            return int(domains[0])
        token_domains = np.repeat(domains, lengths)
        counts[_NUM_TOTALS : _NUM_TOTALS + num_domains] += np.bincount(token_domains[learned], minlength=num_domains)
        counts[_NUM_TOTALS + num_domains :] += np.bincount(token_domains[learned], num_bytes, minlength=num_domains)
        # A copy to a GPU from memory that is not pinned may wait.
        tensor = torch.from_numpy(token_domains)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    @contextmanager
    def time_forward(self) -> Iterator[None]:
        """Measures the duration of one forward pass."""
        started = time.perf_counter()
        if self._device.type != "cuda":
            yield
            self._host_seconds += time.perf_counter() - started
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        yield
        pair[1].record()
        self._events.append(pair)

    def add_micro_batch(self, number: int, loss: Tensor, losses: Tensor) -> None:
        """Adds micro-batch `number`: its loss sum `loss`, and the loss of every token, `losses` `[T]`."""
        domain = self._batch_domains[number]
        self._losses[0] += loss.detach()
        if isinstance(domain, int):
            self._losses[1 + domain] += loss.detach()
        else:
            self._losses[1:].index_add_(0, domain.to(self._device, non_blocking=True), losses.double())

    def reduce(self, more: Tensor | None = None) -> float:
        """Sums the losses over all ranks, waiting for the device once. Returns the loss sum of the step.

        `more`: what else the step counted, float64 `[n]` of equal length on all ranks; its sums are `summed_more`.
        """
        sums = self._losses if more is None else torch.cat([self._losses, more])
        dist.all_reduce(sums)
        self._summed_losses, self.summed_more = np.split(sums.cpu().numpy(), [len(self._losses)])
        return float(self._summed_losses[0])

    def finish_step(self, step: int, seconds: float, lrs: Sequence[float]) -> dict[str, float]:
        """Returns all metrics of the step by their keys in `metrics.jsonl`.

        `step`: number of completed steps; `seconds`: duration of the step; `lrs`: learning rates of the groups.
        """
        forward_seconds = self._host_seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        # The loop has already synchronized with the device for this step, so no wait is added here.
        local_stats = torch.tensor(
            [forward_seconds + self._waited, self._waited, self._memory()], dtype=torch.float64, device=self._device
        )
        gathered = local_stats.new_empty(dist.get_world_size() * len(local_stats))
        dist.all_gather_into_tensor(gathered, local_stats)
        busy, data_wait, memory = gathered.view(-1, len(local_stats)).cpu().numpy().T
        metrics = {f"lr/{name}": lr for name, lr in zip(self._context.groups, lrs, strict=True)}
        metrics |= self._domain_metrics() | self._throughput(seconds, len(busy))
        slowest = int(busy.argmax())
        return metrics | {
            "flops": float(self._counts[3]),
            "fill": float(self._counts[2]) / self._context.row_tokens,
            "memory_gib": float(memory.max()),
            "data_wait_seconds": float(data_wait.max()),
            "slowest_rank": slowest,
            "slowest_seconds": float(busy[slowest]),
            "step_seconds_spread": float(busy.max() - busy.min()),
            "eta_seconds": self._mean_step_seconds(seconds) * (self._total_steps - step),
        }

    def _domain_metrics(self) -> dict[str, float]:
        """Loss in nats per learned token and bits per byte, of the whole step and of every domain that occurs in it."""
        losses, num_domains = self._summed_losses, len(self._context.domains)
        learned, num_bytes = (
            self._counts[_NUM_TOTALS : _NUM_TOTALS + num_domains],
            self._counts[_NUM_TOTALS + num_domains :],
        )
        metrics = {"bits_per_byte": bits_per_byte(losses[0], num_bytes.sum())} if num_bytes.any() else {}
        for index, name in enumerate(self._context.domains):
            if learned[index]:
                metrics[f"loss/{name}"] = float(losses[1 + index] / learned[index])
            if num_bytes[index]:
                metrics[f"bits_per_byte/{name}"] = bits_per_byte(losses[1 + index], num_bytes[index])
        return metrics

    def _throughput(self, seconds: float, world_size: int) -> dict[str, float]:
        rate = 1 / (seconds * world_size)
        speed = {
            "tokens_per_second_per_gpu": float(self._counts[2]) * rate,
            "learned_tokens_per_second_per_gpu": float(self._counts[1]) * rate,
            "tflops_per_gpu": float(self._counts[3]) * rate / 1e12,
        }
        return (
            speed if self._context.peak is None else speed | {"mfu": float(self._counts[3]) * rate / self._context.peak}
        )

    def _mean_step_seconds(self, seconds: float) -> float:
        """Mean seconds per recent step, including the time between steps."""
        self._ends.append(time.perf_counter())
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else seconds

    def _memory(self) -> float:
        """Memory in GiB: the peak reserved memory of a GPU, or the current resident memory of this process on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / 2**30
        return float(self._process.memory_info().rss) / 2**30


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Converts a loss sum in nats to bits per byte of the text, which is comparable across tokenizers."""
    return float(nats) / math.log(2) / float(num_bytes)


def build_metrics_context(
    config: TrainConfig, model: Any, store: TokenStore, encoder: Encoder, precision: Precision
) -> MetricsContext:
    """Must be called before the engine is built: ZeRO-3 replaces parameters by empty tensors without their shapes."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return MetricsContext(
        domains=store.domains,
        token_bytes=encoder.token_bytes(),
        groups=[group.name for group in parameter_groups(model, config)],
        row_tokens=config.global_batch_size * config.seq_len,
        flops_model=step_flops(model),
        peak=peak_flops(name, precision, config.hardware.peak_tflops),
    )
