"""Validation of a training run: held-out data, the guard of a domain, samples."""

from dataclasses import dataclass, field

from fireflyds.config.enums import require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    store: str = ""
    """Token store of held-out data, made with the run's tokenizer; empty: none is measured."""
    every: int = 500
    """Validate every so many steps; also before the first and after the last."""
    rows: int = 64
    """At most so many packed rows of each domain."""
    guard: str = "en"
    """Domain whose bits per byte are watched: what training may not make worse. Empty: none."""
    max_rise: float = 0.05
    """Share above its start that the guarded domain may rise before there is a warning."""
    stop: bool = False
    """Where the guarded domain rises more, save and end the run instead of warning."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the model goes on from after every validation, or questions it answers where the data are dialogues."""
    max_new_tokens: int = 64
    """Tokens written to each prompt, the likeliest ones."""

    def __post_init__(self) -> None:
        require_at_least(self, "validation.", every=1, rows=1, max_rise=0, max_new_tokens=1)
        if self.stop and not (self.store and self.guard):
            raise UserError(
                "validation.stop=true needs validation.store=<store of held-out data> and validation.guard=<domain in it>"
            )
        if "" in self.prompts:
            raise UserError("validation.prompts: one is empty. Leave it out")

    @property
    def wanted(self) -> bool:
        return bool(self.store or self.prompts)
