"""Options of `evaluate`: the model, the tasks, and a section for every task."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from fireflyds.config.enums import PromptStyle, require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class BitsPerByteConfig:
    """Section `bits_per_byte`: the held-out texts of this task."""

    texts: dict[str, str] = field(default_factory=dict)
    """Held-out text: name to file, folder or glob."""


@dataclass(kw_only=True, slots=True)
class MultipleChoiceConfig:
    """Section `multiple_choice`: the questions of this task."""

    questions: str = ""
    """JSON lines with `question`, `choices` and `answer` (an index)."""


@dataclass(kw_only=True, slots=True)
class CmmluConfig:
    """Section `cmmlu`: the data and the prompts of this task."""

    data: str = ""
    """Folder of CMMLU with `dev/` and `test/`."""
    subjects: list[str] = field(default_factory=list)
    """Subjects to evaluate; empty: all."""
    num_shots: int = 0
    """Number of worked examples before each question."""

    def __post_init__(self) -> None:
        require_at_least(self, "cmmlu.", num_shots=0)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Keys of the verb `evaluate`."""

    model: str = MISSING
    """Hugging Face directory."""
    tasks: list[str] = field(default_factory=lambda: ["bits_per_byte"])
    """Entries of `fireflyds/evaluation/tasks`; each reads the section of its name."""
    out: str = ""
    """Folder for `scores.json`, to which results are appended; empty: `<model>/eval`."""
    limit: int | None = None
    """Maximum number of documents or questions per task (per subject where a task has subjects); unset: all."""
    prompt: PromptStyle = PromptStyle.auto
    """`chat` applies the model's chat template to questions, `plain` does not, `auto` does where the model has one."""
    packing: bool = True
    """Run many texts in one forward pass. `false`: every text runs by itself, exact for any causal model, and slow."""
    max_tokens: int = 4096
    """Maximum number of tokens in one forward pass."""
    bits_per_byte: BitsPerByteConfig = field(default_factory=BitsPerByteConfig)
    multiple_choice: MultipleChoiceConfig = field(default_factory=MultipleChoiceConfig)
    cmmlu: CmmluConfig = field(default_factory=CmmluConfig)

    def __post_init__(self) -> None:
        require_at_least(self, max_tokens=2, limit=1)
        if not self.tasks:
            raise UserError(
                "nothing to do", key="tasks", value="[]", remedy="Name entries of fireflyds/evaluation/tasks"
            )
