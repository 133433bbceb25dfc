"""The machines that a run is planned for."""

from dataclasses import dataclass

from omegaconf import MISSING

from fireflyds.config.values import require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    gpu: str = MISSING
    """Name of the GPU, as V100, A100, H100, H200, `RTX 4090`; or `cpu`, whose ranks take a GPU's place."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 1
    """GPUs (ranks) of one machine."""
    gpu_memory_gib: float = MISSING
    """Memory of one GPU, GiB; on the CPU of one rank."""
    host_memory_gib: float = MISSING
    """Memory of one machine, GiB."""
    mfu: float = 0.4
    """Share of the peak that a run is expected to reach without recomputation; times are reckoned with it."""
    link_gb_per_s: float = 50.0
    """From one GPU to the others, GB/s each way, over the slowest link between them."""
    host_link_gb_per_s: float = 12.0
    """From one GPU to its host, GB/s each way: what offloading goes through."""

    def __post_init__(self) -> None:
        require_at_least(self, "cluster.", nodes=1, gpus_per_node=1)
        for name in ("gpu_memory_gib", "host_memory_gib", "mfu", "link_gb_per_s", "host_link_gb_per_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"cluster.{name}={getattr(self, name)}: must be greater than 0")
        if self.mfu > 1:
            raise UserError(f"cluster.mfu={self.mfu}: is a share of the peak, at most 1. Real runs reach 0.3 to 0.6")

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node
