"""Cluster options: the hardware that `plan` calculates with, and the settings of the jobs that `submit` starts."""

import re
from dataclasses import dataclass, field

from fireflyds.config.enums import Container, Scheduler, require_above, require_at_least
from fireflyds.errors import UserError

# Formats of `sbatch --time`, except minutes alone: YAML parses an unquoted 24:00:00 as the number 86400.
_TIME = r"\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"

_CONFIG_KEYS = {
    "--nodes": "nodes", "--ntasks-per-node": "gpus_per_node", "--gpus-per-node": "gpus_per_node", "--time": "time",
    "--cpus-per-task": "cpus_per_task", "--mem": "memory", "--partition": "partition", "--account": "account",
    "--qos": "qos", "--constraint": "constraint", "--signal": "signal_seconds",
    "--requeue": "requeue", "--no-requeue": "requeue",
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Section `cluster`: the hardware of the ranks, and the scheduler's settings for their jobs."""

    gpu: str = ""
    """GPU model, such as `V100`, `A100`, `H100`, `H200` or `RTX 4090`; or `cpu`, where every rank runs on the CPU."""
    nodes: int = 1
    """Number of nodes (hosts)."""
    gpus_per_node: int = 1
    """GPUs (ranks) per node."""
    gpu_memory_gib: float = 0.0
    """Memory of one GPU in GiB; with `gpu: cpu`, of one rank. Required by `plan`."""
    host_memory_gib: float = 0.0
    """Host memory of one node in GiB. Required by `plan`."""
    mfu: float = 0.4
    """Expected model FLOPs utilization without activation recomputation, as a fraction of the peak; used to estimate
    times."""
    link_gb_per_s: float = 50.0
    """Bandwidth from one GPU to the others over the slowest link between them, in GB/s per direction."""
    host_link_gb_per_s: float = 12.0
    """Bandwidth between one GPU and its host, in GB/s per direction; limits offloading."""

    scheduler: Scheduler = Scheduler.none
    """`slurm` submits jobs with `sbatch`; `none` starts processes on this machine."""
    partition: str = ""
    """Slurm partition; empty: the cluster's default."""
    cpu_partition: str = ""
    """Slurm partition of jobs without a GPU (such as `expand` and `prepare`); empty: `partition`."""
    account: str = ""
    """Slurm account that is charged."""
    qos: str = ""
    """Slurm quality of service."""
    constraint: str = ""
    """Features required of the nodes, such as `a100&nvlink`."""
    time: str = ""
    """Time limit of one job, such as `24:00:00` or `2-12:00:00` (quoted in a YAML file); empty: the partition's
    default."""
    memory: str = ""
    """Host memory of one node, such as `400G`; empty: the partition's default; 0: all of it."""
    cpus_per_task: int | None = None
    """CPU cores per rank; unset: Slurm's default."""
    mail_user: str = ""
    """E-mail address for Slurm's notifications; empty: no notifications."""
    mail_type: str = "END,FAIL"
    """Events that Slurm sends a notification for, separated by commas."""
    sbatch: str = ""
    """Additional `#SBATCH` options, such as `--exclusive --gres=gpu:8`."""
    modules: str = ""
    """Environment modules loaded before the command, such as `cuda/12.6 nccl`."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run before the command, such as `source /sw/conda.sh`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank, such as `NCCL_IB_HCA: mlx5`."""
    python: str = ""
    """Python interpreter on the nodes; empty: the one that runs `submit`, in a container `python`."""
    container: Container = Container.none
    """`pyxis` runs ranks in a container image through options of srun, `apptainer` through `apptainer exec`."""
    image: str = ""
    """Container image."""
    mounts: list[str] = field(default_factory=list)
    """Folders mounted into the container, as `from:to`; the working directory and the checkout are always mounted."""
    requeue: bool = True
    """Requeue and resume a job that is preempted, loses a node or reaches its time limit."""
    chain: int = 1
    """Number of jobs of one run that start one after the other and resume it, for clusters that forbid requeueing (with
    `requeue: false`)."""
    signal_seconds: int = 300
    """Seconds before the time limit at which a job receives the signal to save and exit."""
    max_failures: int = 3
    """A job that ends more often than this in a row without a newer checkpoint is not requeued."""

    def __post_init__(self) -> None:
        require_at_least(self, "cluster.", nodes=1, gpus_per_node=1, cpus_per_task=1, chain=1, signal_seconds=1)
        require_at_least(self, "cluster.", max_failures=0, gpu_memory_gib=0, host_memory_gib=0)
        require_above(self, "cluster.", mfu=0, link_gb_per_s=0, host_link_gb_per_s=0)
        if self.mfu > 1:
            raise UserError(
                "is a share of the peak, at most 1",
                key="cluster.mfu",
                value=self.mfu,
                remedy="Real runs reach 0.3 to 0.6",
            )
        self._check_job()

    def _check_job(self) -> None:
        for name in ("partition", "cpu_partition", "account", "qos", "constraint", "memory", "mail_user", "mail_type"):
            _reject_shell_syntax(f"cluster.{name}", getattr(self, name))
        _reject_shell_syntax("cluster.sbatch", self.sbatch)
        for option in self.sbatch.split():
            name = option.partition("=")[0]
            if not name.startswith("--"):
                raise UserError(
                    "options are written --name=value",
                    key="cluster.sbatch",
                    value=option,
                    remedy="Give options such as --exclusive",
                )
            if name in _CONFIG_KEYS:
                raise UserError(
                    f"has a key of its own, cluster.{_CONFIG_KEYS[name]}",
                    key="cluster.sbatch",
                    value=option,
                    remedy="Use that",
                )
        if self.time and not re.fullmatch(_TIME, self.time):
            raise UserError(
                "must be hours:minutes:seconds, such as 24:00:00 or 2-12:00:00",
                key="cluster.time",
                value=self.time,
                remedy="In a file put it in quotes: time: '24:00:00'",
            )
        if 0 < self.time_seconds <= self.signal_seconds:
            raise UserError(
                f"a job of cluster.time={self.time} would be signalled to save at its start",
                key="cluster.signal_seconds",
                value=self.signal_seconds,
                remedy=f"Give a longer cluster.time, or less than {self.time_seconds}",
            )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise UserError(
                    "is not a valid variable name",
                    key=f"cluster.environment.{name}",
                    remedy="Use letters, digits and _",
                )
        if self.container is not Container.none and not self.image:
            raise UserError(
                "needs an image",
                key="cluster.container",
                value=self.container.name,
                remedy="Give cluster.image=<image>",
            )
        if self.chain > 1 and self.requeue:
            raise UserError(
                "is for clusters that forbid requeueing",
                key="cluster.chain",
                value=self.chain,
                remedy="Give cluster.requeue=false too, or no chain",
            )

    @property
    def time_seconds(self) -> int:
        """`time` in seconds; 0 where none is set."""
        if not self.time:
            return 0
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if days:
            hours, minutes, seconds = [*parts, 0, 0][:3]
        else:
            hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts)
        return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds

    @property
    def world_size(self) -> int:
        """Number of ranks on all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def on_cpu(self) -> bool:
        """True where the ranks run on the CPU (`gpu: cpu`)."""
        return self.gpu.lower() == "cpu"

    def require_machine(self) -> None:
        """Raises `UserError` where a value of the hardware that `plan` needs is not set."""
        for name in ("gpu", "gpu_memory_gib", "host_memory_gib"):
            if not getattr(self, name):
                raise UserError(
                    "is not set; a plan needs cluster.gpu, cluster.gpu_memory_gib and cluster.host_memory_gib",
                    key=f"cluster.{name}",
                    remedy=f"Give cluster.{name}=<value>, or a cluster file that sets it",
                )


def _reject_shell_syntax(key: str, value: str) -> None:
    """Raises `UserError` for shell syntax in `value`: Slurm parses `#SBATCH` lines itself, without a shell."""
    if match := re.search(r"[\n\r$`\"']", value):
        raise UserError(
            f"holds {match.group()!r}, which Slurm does not expand in an #SBATCH line",
            key=key,
            value=f"{value!r}",
            remedy="Write the value out, without shell syntax",
        )
