"""Options of the profiler: which steps of which ranks a training run records."""

from dataclasses import dataclass, field

from fireflyds.config.enums import require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Section `profile`: the steps and ranks that the profiler records."""

    start: int = 0
    """First optimizer step to record with `torch.profiler`, counted from 1 over all starts of the run; 0: none. Traces
    and tables of operators are written to `profile/` of the run directory."""
    steps: int = 3
    """Number of consecutive steps to record."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that record, each to its own files."""
    memory: bool = False
    """Also record allocations and releases of tensor memory."""
    stacks: bool = False
    """Also record the Python call stack of every operator; slows the recorded steps down."""

    def __post_init__(self) -> None:
        require_at_least(self, "profile.", start=0, steps=1)
        if self.start and not self.ranks:
            raise UserError(
                "names no rank, so nothing would be recorded",
                key="profile.ranks",
                value=self.ranks,
                remedy="Give profile.ranks=[0], or profile.start=0 to record nothing",
            )
        if any(rank < 0 for rank in self.ranks):
            raise UserError(
                "must be numbers of at least 0", key="profile.ranks", value=self.ranks, remedy="Give ranks such as [0]"
            )

    @property
    def last(self) -> int:
        """The last step to record."""
        return self.start + self.steps - 1

    def check_world_size(self, world_size: int) -> None:
        """Raises `UserError` where the profiler is on for a rank that this start does not have."""
        if self.start and max(self.ranks) >= world_size:
            raise UserError(
                f"this start has ranks 0 to {world_size - 1}",
                key="profile.ranks",
                value=self.ranks,
                remedy="Give ranks among them",
            )
