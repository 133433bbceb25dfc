"""The machines that a run is planned for and that a scheduler gives out."""

import re
from dataclasses import dataclass, field

from fireflyds.config.enums import Container, Scheduler, require_at_least
from fireflyds.errors import UserError

# What `sbatch --time` understands, but for minutes alone: YAML reads 24:00:00 without quotes as the number 86400.
_TIME = r"\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"

_OWN_KEYS = {
    "--nodes": "nodes", "--ntasks-per-node": "gpus_per_node", "--gpus-per-node": "gpus_per_node", "--time": "time",
    "--cpus-per-task": "cpus_per_task", "--mem": "memory", "--partition": "partition", "--account": "account", "--qos": "qos",
    "--constraint": "constraint", "--signal": "signal_seconds", "--requeue": "requeue", "--no-requeue": "requeue",
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    gpu: str = ""
    """Name of the GPU, as V100, A100, H100, H200, `RTX 4090`; or `cpu`, whose ranks take a GPU's place."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 1
    """GPUs (ranks) of one machine."""
    gpu_memory_gib: float = 0.0
    """Memory of one GPU, GiB; on the CPU of one rank. `plan` needs it."""
    host_memory_gib: float = 0.0
    """Memory of one machine, GiB. `plan` needs it."""
    mfu: float = 0.4
    """Share of the peak that a run is expected to reach without recomputation; times are reckoned with it."""
    link_gb_per_s: float = 50.0
    """From one GPU to the others, GB/s each way, over the slowest link between them."""
    host_link_gb_per_s: float = 12.0
    """From one GPU to its host, GB/s each way: what offloading goes through."""

    scheduler: Scheduler = Scheduler.none
    """`slurm` gives jobs to `sbatch`; `none` starts processes on this machine."""
    partition: str = ""
    """Slurm partition; empty: the cluster's default."""
    cpu_partition: str = ""
    """Partition of jobs that need no GPU (expand, prepare, export); empty: `partition`."""
    account: str = ""
    """Slurm account that is charged."""
    qos: str = ""
    """Slurm quality of service."""
    constraint: str = ""
    """Features that nodes must have, such as `a100&nvlink`."""
    time: str = ""
    """Longest time of one job, such as `24:00:00` or `2-12:00:00` (in a file in quotes); empty: the partition's."""
    memory: str = ""
    """Memory of one machine, such as `400G`; empty: the partition's default, 0: all of it."""
    cpus_per_task: int | None = None
    """Cores of one rank; unset: Slurm's default."""
    mail_user: str = ""
    """Address that Slurm writes to."""
    mail_type: str = "END,FAIL"
    """On what."""
    sbatch: str = ""
    """Further `#SBATCH` options, such as `--exclusive --gres=gpu:8`."""
    modules: str = ""
    """Environment modules to load, such as `cuda/12.6 nccl`."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the command, such as `source /sw/conda.sh`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every rank, such as `NCCL_IB_HCA: mlx5`."""
    python: str = ""
    """The interpreter on the nodes; empty: the one that submits, in a container `python`."""
    container: Container = Container.none
    """`pyxis` runs ranks in an image by srun's own options, `apptainer` by `apptainer exec`."""
    image: str = ""
    """The container's image."""
    mounts: list[str] = field(default_factory=list)
    """`from:to` folders seen in the container; the working directory and the checkout always are."""
    requeue: bool = True
    """A job that is preempted, loses a node or comes to its time limit is put back into the queue and goes on."""
    chain: int = 1
    """Where requeueing is forbidden: so many jobs of one run, each after the other, go on where the last one stopped."""
    signal_seconds: int = 300
    """So long before its time limit a job is told to save."""
    max_failures: int = 3
    """A job that ends more often than this in a row without a newer checkpoint is not put back."""

    def __post_init__(self) -> None:
        require_at_least(self, "cluster.", nodes=1, gpus_per_node=1, cpus_per_task=1, chain=1, signal_seconds=1)
        require_at_least(self, "cluster.", max_failures=0, gpu_memory_gib=0, host_memory_gib=0)
        for name in ("mfu", "link_gb_per_s", "host_link_gb_per_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"cluster.{name}={getattr(self, name)}: must be greater than 0")
        if self.mfu > 1:
            raise UserError(f"cluster.mfu={self.mfu}: is a share of the peak, at most 1. Real runs reach 0.3 to 0.6")
        self._check_job()

    def _check_job(self) -> None:
        for name in ("partition", "cpu_partition", "account", "qos", "constraint", "memory", "mail_user", "mail_type"):
            _refuse_shell(f"cluster.{name}", getattr(self, name))
        _refuse_shell("cluster.sbatch", self.sbatch)
        for option in self.sbatch.split():
            name = option.partition("=")[0]
            if not name.startswith("--"):
                raise UserError(f"cluster.sbatch={option}: options are written --name=value, such as --exclusive")
            if name in _OWN_KEYS:
                raise UserError(f"cluster.sbatch={option}: has a key of its own, cluster.{_OWN_KEYS[name]}. Use that")
        if self.time and not re.fullmatch(_TIME, self.time):
            raise UserError(
                f"cluster.time={self.time}: must be hours:minutes:seconds, such as 24:00:00 or 2-12:00:00. In a file put it in quotes: time: '24:00:00'"
            )
        if 0 < self.time_seconds <= self.signal_seconds:
            raise UserError(
                f"cluster.signal_seconds={self.signal_seconds}: a job of cluster.time={self.time} would be told to save at its "
                f"start. Give a longer cluster.time, or less than {self.time_seconds}"
            )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise UserError(f"cluster.environment.{name}: is no name of a variable. Use letters, digits and _")
        if self.container is not Container.none and not self.image:
            raise UserError(f"cluster.container={self.container.name} needs an image: give cluster.image=<image>")
        if self.chain > 1 and self.requeue:
            raise UserError(
                f"cluster.chain={self.chain}: is for clusters that forbid requeueing. Give cluster.requeue=false too, or no chain"
            )

    @property
    def time_seconds(self) -> int:
        """`time` in seconds; 0 where none is set."""
        if not self.time:
            return 0
        days, _, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        if days:
            hours, minutes, seconds = [*parts, 0, 0][:3]
        else:
            hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts)
        return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def on_cpu(self) -> bool:
        return self.gpu.lower() == "cpu"

    def require_machine(self) -> None:
        """Raises `UserError` when it says too little of the machines to plan for them."""
        for name in ("gpu", "gpu_memory_gib", "host_memory_gib"):
            if not getattr(self, name):
                raise UserError(
                    f"cluster.{name} is not set: a plan needs cluster.gpu, cluster.gpu_memory_gib and cluster.host_memory_gib. "
                    f"Give cluster.{name}=<value>, or a cluster that says it"
                )


def _refuse_shell(key: str, value: str) -> None:
    """Slurm reads `#SBATCH` lines itself: no shell expands them."""
    if found := re.search(r"[\n\r$`\"']", value):
        raise UserError(f"{key}={value!r}: holds {found.group()!r}, which Slurm does not expand in an #SBATCH line")
