"""Options of ZeRO and of the devices: partitioning, precision, attention, timeouts and local files."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from fireflyds.config.enums import Offload, Precision, require_above, require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class ZeroConfig:
    """Section `zero`: partitioning and offloading by DeepSpeed's ZeRO."""

    stage: int = MISSING
    """ZeRO stage: 0 replicates all states, 1 partitions optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: Offload = Offload.none
    """Device that stores optimizer states (stages 1-3): `none`, the GPU; `cpu`, the host."""
    offload_param: Offload = Offload.none
    """Device that stores parameters (stage 3): `none`, the GPU; `cpu`, the host."""
    reduce_bucket_size: int = 50_000_000
    """Number of elements per gradient reduction."""
    overlap_comm: bool = False
    """Overlap gradient reduction with the backward pass; zero=stage3 does, as is DeepSpeed's default there."""
    json: str = ""
    """DeepSpeed JSON file of another project: keys that this configuration has too must agree with it, keys that
    DeepSpeed has removed are errors, the others are passed on (and printed)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional DeepSpeed configuration, treated like the content of `json`."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise UserError("must be 0, 1, 2 or 3", key="zero.stage", value=self.stage, remedy="Give one of them")
        if self.offload_param is not Offload.none and self.stage != 3:
            raise UserError(
                f"needs zero.stage=3, got {self.stage}",
                key="zero.offload_param",
                value=self.offload_param.name,
                remedy="Give zero=stage3, or zero.offload_param=none",
            )
        if self.offload_optimizer is not Offload.none and self.stage == 0:
            raise UserError(
                "needs zero.stage of at least 1, got 0",
                key="zero.offload_optimizer",
                value=self.offload_optimizer.name,
                remedy="Give zero.stage=1 or more, or zero.offload_optimizer=none",
            )


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """Section `hardware`: precision, attention, activation recomputation, timeouts and local files."""

    precision: Precision = MISSING
    """Training precision; `auto`: bf16 on a GPU that supports it, fp16 on an older GPU, fp32 on the CPU."""
    attention: str = "auto"
    """Implementation of packed attention (`launch/doctor.py` lists them); `auto`: the preferred one of those that run
    here."""
    initial_scale_power: int = 16
    """fp16: the initial loss scale is 2 to this power."""
    loss_scale_window: int = 1000
    """fp16: steps without an overflow before the loss scale doubles."""
    hysteresis: int = 2
    """fp16: overflows before the loss scale halves."""
    min_loss_scale: float = 1.0
    """fp16: smallest loss scale; an overflow at it ends the run with an error that names the tensor."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    timeout_minutes: float = 30.0
    """Timeout of a collective in minutes; exceeding it ends the run."""
    start_timeout_minutes: float = 10.0
    """Minutes that the ranks wait for each other at the start; the error names the missing ranks."""
    network_interface: str = ""
    """Network interface that NCCL and gloo use between hosts, such as `ib0`, or several separated by commas; empty:
    NCCL and gloo choose."""
    local_cache: str = ""
    """Folder on a local disk of every host: base model and token store are copied to it once, within
    `hardware.timeout_minutes`, and read from it. Empty: they are read from their own paths."""
    peak_tflops: float | None = None
    """Peak matrix multiplication throughput of one device in the training precision, in TFLOP/s: the reference of MFU.
    Unset: the published peak of a known GPU; no MFU on other devices."""

    def __post_init__(self) -> None:
        require_at_least(self, "hardware.", loss_scale_window=1, hysteresis=1, min_loss_scale=2.0**-14)
        require_above(self, "hardware.", timeout_minutes=0, start_timeout_minutes=0, peak_tflops=0)
        if not 0 <= self.initial_scale_power <= 32 or 2.0**self.initial_scale_power < self.min_loss_scale:
            raise UserError(
                f"must be from 0 to 32, and 2 to it at least hardware.min_loss_scale={self.min_loss_scale:g}",
                key="hardware.initial_scale_power",
                value=self.initial_scale_power,
                remedy="Give a power in this range, or lower hardware.min_loss_scale",
            )
