"""Roads: verbs in order."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True, slots=True)
class StageConfig:
    name: str = MISSING
    """Name of the stage: its key in `summary.json`."""
    verb: str = MISSING
    """A file of `launch/`."""
    ranks: int = 1
    """More than one: started by `deepspeed --num_gpus`."""
    overrides: list[str] = field(default_factory=list)
    """What is typed after the verb."""
    output: str = MISSING
    """The file that stands when the stage is done."""


@dataclass(kw_only=True, slots=True)
class RoadConfig:
    name: str = MISSING
    """Name of the road. Its folder is `runs/<name>`."""
    stages: list[StageConfig] = field(default_factory=list)
    """Verbs in order."""

    @property
    def out(self) -> str:
        return f"runs/{self.name}"


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    road: RoadConfig = MISSING
    corpus: str = ""
    """A person's own text (.txt .jsonl .json .csv .parquet; file, folder or glob) instead of the generated Chinese."""
