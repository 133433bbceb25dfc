"""Options of jobs that a scheduler starts."""

from dataclasses import dataclass

from omegaconf import MISSING

from fireflyds.config.cluster import ClusterConfig
from fireflyds.config.enums import SubmitAction, require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class SubmitConfig:
    """Keys of the verb `submit`."""

    action: SubmitAction = SubmitAction.submit
    """`submit`; or `status`, `logs`, `cancel` of the jobs submitted as `run`."""
    verb: str = ""
    """Script of `launch/`; all keys that are not listed here are passed to it."""
    road: str = ""
    """File name in `conf/road`, or a path, instead of a verb: each of its stages becomes a job that depends on the one
    before."""
    run: str = ""
    """Name of the jobs, and of the folder of their files below `runs`; empty: the verb's own `run`, or the pipeline's
    name."""
    runs: str = "runs"
    """Folder that contains the runs."""
    dry_run: bool = False
    """Check the configuration, write the files and print the script, without submitting."""
    lines: int = 40
    """`logs`: number of last lines of each log that are printed."""
    cluster: ClusterConfig = MISSING

    def __post_init__(self) -> None:
        require_at_least(self, lines=1)
        if self.action is SubmitAction.submit:
            if bool(self.verb) == bool(self.road):
                raise UserError(
                    "submit needs verb or road, and one of them only",
                    key="verb",
                    value=f"{self.verb!r}",
                    remedy="Give verb=train and its keys, or road=<file of conf/road>",
                )
        elif not self.run:
            raise UserError(
                f"is not set; action={self.action.name} needs it",
                key="run",
                remedy="Give run=<name under which it was submitted>",
            )
        if self.run.startswith("/") or ".." in self.run.split("/"):
            raise UserError(
                "must be a name below the folder of runs",
                key="run",
                value=f"{self.run!r}",
                remedy="Give a name such as run=cpt or run=demo/cpt",
            )
