"""Options of roads: pipelines that run verbs in order."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """An item of `road.stages`: one verb with its arguments."""

    name: str = MISSING
    """Name of the stage, and its key in `summary.json`."""
    verb: str = MISSING
    """Script of `launch/`."""
    ranks: int = 1
    """Number of ranks; more than one are started by `deepspeed --num_gpus`."""
    overrides: list[str] = field(default_factory=list)
    """Command-line arguments of the verb."""
    output: str = MISSING
    """File that exists when the stage is complete."""


@dataclass(kw_only=True, slots=True)
class PipelineConfig:
    """Section `road`: a pipeline of stages that run in order."""

    name: str = MISSING
    """Name of the road, and of its folder `runs/<name>`."""
    stages: list[StageConfig] = field(default_factory=list)
    """Stages in order."""

    @property
    def out(self) -> str:
        """Folder of the pipeline's outputs."""
        return f"runs/{self.name}"


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    """Keys of the verb `demo`."""

    road: PipelineConfig = MISSING
    corpus: str = ""
    """User-provided text (.txt .jsonl .json .csv .parquet; file, folder or glob) instead of the generated Chinese
    text."""
