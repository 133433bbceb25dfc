"""What a step says beside its loss: by domain, by parameter group, by second, by rank.

Counts that the host knows go with the one sum over ranks that the loop takes before the step, sums of losses with the one
it takes after the last backward pass; the ranks' times are gathered once, when the step is over. The device is waited for
no more often than the loop itself waits.
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

# Steps whose mean time foretells the rest.
_RECENT = 50
# Of the counts, those that are not of a domain.
_TOTALS = 4


class FlopsModel(Protocol):
    """FLOPs of documents of these lengths, forward and backward, with so many labelled rows."""

    def count(self, lengths: Any, labelled: int) -> float: ...


@dataclass(frozen=True, slots=True)
class MetricsContext:
    """What the statistics of a run are taken by."""

    domains: Sequence[str]
    token_bytes: np.ndarray
    """Int32 `[vocab_size]`: bytes of text that each token stands for."""
    groups: Sequence[str]
    """The optimizer's parameter groups, in order."""
    row_tokens: int
    """Room for tokens in a step: `global_batch_size · seq_len`."""
    flops_model: FlopsModel
    peak: float | None
    """FLOP/s of one device at most; None: not known, so no MFU."""


class StepMetricsAccumulator:
    """Of one step after another: `begin`, for every micro-batch `forward` and `add`, `reduce`, `finish`.

    A rank's own time is that of its forward passes and of waiting for data. No other rank is waited for in them, but under
    ZeRO-3, which gathers weights there: then a slow rank shows in the others' times too.
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
        self._ends: deque[float] = deque(maxlen=_RECENT + 1)
        self._waited = self._host_seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._places: list[int | Tensor] = []
        self._counts, self._losses = np.zeros(0), torch.zeros(0)

    def start_step(self, batches: list[PackedBatch], waited: float) -> tuple[int, int]:
        """Of the step, over all ranks: what its loss is divided by, and tokens. `waited`: seconds until this rank had its
        batches."""
        self._waited, self._host_seconds, self._events = waited, 0.0, []
        self._losses = torch.zeros(1 + len(self._context.domains), dtype=torch.float64, device=self._device)
        # Targets, learned tokens, tokens, FLOPs; learned tokens of every domain; their bytes.
        counts = np.zeros(_TOTALS + 2 * len(self._context.domains))
        self._places = [self._count(batch, counts) for batch in batches]
        summed = torch.from_numpy(counts).to(self._device)
        dist.all_reduce(summed)
        self._counts = summed.cpu().numpy()
        return int(self._counts[0]), int(self._counts[2])

    @property
    def learned_tokens(self) -> int:
        """Of the step, over all ranks."""
        return int(self._counts[1])

    def _count(self, batch: PackedBatch, counts: np.ndarray) -> int | Tensor:
        """Add a micro-batch to the counts. Returns the domain of all its tokens, or of each of them `[T]`."""
        number = len(self._context.domains)
        labels, lengths, domains = batch.labels[0].numpy(), np.diff(batch.cu_seqlens.numpy()), batch.domains.numpy()
        learned = labels != IGNORE_INDEX
        num_bytes = self._context.token_bytes[labels[learned]]
        flops = self._context.flops_model.count(lengths, batch.num_learned)
        counts[:_TOTALS] += self._count_targets(batch), batch.num_learned, len(labels), flops
        if (domains == domains[0]).all():
            counts[[_TOTALS + domains[0], _TOTALS + number + domains[0]]] += batch.num_learned, num_bytes.sum()
            return int(domains[0])
        places = np.repeat(domains, lengths)
        counts[_TOTALS : _TOTALS + number] += np.bincount(places[learned], minlength=number)
        counts[_TOTALS + number :] += np.bincount(places[learned], num_bytes, minlength=number)
        return torch.from_numpy(places)

    @contextmanager
    def time_forward(self) -> Iterator[None]:
        """Around each forward pass."""
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
        """The loss sum of micro-batch `number` and the losses `[T]` that it sums."""
        place = self._places[number]
        self._losses[0] += loss.detach()
        if isinstance(place, int):
            self._losses[1 + place] += loss.detach()
        else:
            self._losses[1:].index_add_(0, place.to(self._device, non_blocking=True), losses.double())

    def reduce(self) -> Tensor:
        """The loss sum over all ranks and micro-batches, not yet waited for."""
        dist.all_reduce(self._losses)
        return self._losses[0]

    def finish_step(self, step: int, seconds: float, lrs: Sequence[float]) -> dict[str, float]:
        """Everything by its key in `metrics.jsonl`. `step`: how many are done; `lrs`: of the groups."""
        own = self._host_seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        # Called behind the loop's own wait for the step, so this is no further one.
        mine = torch.tensor(
            [own + self._waited, self._waited, self._memory()], dtype=torch.float64, device=self._device
        )
        gathered = mine.new_empty(dist.get_world_size() * len(mine))
        dist.all_gather_into_tensor(gathered, mine)
        busy, waited, memory = gathered.view(-1, len(mine)).cpu().numpy().T
        rows = {f"lr/{name}": lr for name, lr in zip(self._context.groups, lrs, strict=True)}
        rows |= self._by_domain() | self._speed(seconds, len(busy))
        slowest = int(busy.argmax())
        return rows | {
            "flops": float(self._counts[3]),
            "fill": float(self._counts[2]) / self._context.row_tokens,
            "memory_gib": float(memory.max()),
            "data_wait_seconds": float(waited.max()),
            "slowest_rank": slowest,
            "slowest_seconds": float(busy[slowest]),
            "step_seconds_spread": float(busy.max() - busy.min()),
            "eta_seconds": self._per_step(seconds) * (self._total_steps - step),
        }

    def _by_domain(self) -> dict[str, float]:
        """Nats per learned token and bits per byte, of the whole step and of every domain in it."""
        losses, number = self._losses.cpu().numpy(), len(self._context.domains)
        learned, num_bytes = self._counts[_TOTALS : _TOTALS + number], self._counts[_TOTALS + number :]
        found = {"bits_per_byte": bits_per_byte(losses[0], num_bytes.sum())} if num_bytes.any() else {}
        for place, name in enumerate(self._context.domains):
            if learned[place]:
                found[f"loss/{name}"] = float(losses[1 + place] / learned[place])
            if num_bytes[place]:
                found[f"bits_per_byte/{name}"] = bits_per_byte(losses[1 + place], num_bytes[place])
        return found

    def _speed(self, seconds: float, world_size: int) -> dict[str, float]:
        rate = 1 / (seconds * world_size)
        found = {
            "tokens_per_second_per_gpu": float(self._counts[2]) * rate,
            "learned_tokens_per_second_per_gpu": float(self._counts[1]) * rate,
            "tflops_per_gpu": float(self._counts[3]) * rate / 1e12,
        }
        return (
            found if self._context.peak is None else found | {"mfu": float(self._counts[3]) * rate / self._context.peak}
        )

    def _per_step(self, seconds: float) -> float:
        """Mean seconds from step to step, with all that lies between them."""
        self._ends.append(time.perf_counter())
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else seconds

    def _memory(self) -> float:
        """GiB: of a GPU what was reserved at most, of a CPU what this process holds now."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / 2**30
        return float(self._process.memory_info().rss) / 2**30


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Nats over tokens as bits over the bytes they stand for: comparable across tokenizers."""
    return float(nats) / math.log(2) / float(num_bytes)


def build_metrics_context(
    config: TrainConfig, model: Any, store: TokenStore, encoder: Encoder, precision: Precision
) -> MetricsContext:
    """To be asked before the engine is built: ZeRO-3 takes the parameters' shapes away."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return MetricsContext(
        domains=store.domains,
        token_bytes=encoder.token_bytes(),
        groups=[group.name for group in parameter_groups(model, config)],
        row_tokens=config.global_batch_size * config.seq_len,
        flops_model=step_flops(model),
        peak=peak_flops(name, precision, config.hardware.peak_tflops),
    )
