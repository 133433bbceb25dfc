"""Options of validation during training: held-out data, a guarded domain, generated samples."""

from dataclasses import dataclass, field

from fireflyds.config.enums import require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """Section `validation`: held-out loss, the guarded domain and generated samples during training."""

    store: str = ""
    """Token store of held-out data, made with the run's tokenizer; empty: no held-out loss is measured."""
    every: int = 500
    """Steps between two validations; validation also runs before the first and after the last step."""
    rows: int = 64
    """Maximum number of packed rows of each domain."""
    guard: str = "en"
    """Domain whose bits per byte are monitored, because training must not make it worse. Empty: none."""
    max_rise: float = 0.05
    """Relative rise of the guarded domain's bits per byte over its initial value above which a warning is logged (0.05:
    5 %)."""
    stop: bool = False
    """Save and end the run, instead of the warning, where the guarded domain rises by more."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the model continues after every validation, or questions that it answers where the data are
    dialogues."""
    max_new_tokens: int = 64
    """Number of tokens generated for each prompt, by greedy decoding."""

    def __post_init__(self) -> None:
        require_at_least(self, "validation.", every=1, rows=1, max_rise=0, max_new_tokens=1)
        if self.stop and not (self.store and self.guard):
            raise UserError(
                "needs validation.store and validation.guard",
                key="validation.stop",
                value="true",
                remedy="Give validation.store=<store of held-out data> and validation.guard=<domain in it>",
            )
        if "" in self.prompts:
            raise UserError("one is empty", key="validation.prompts", remedy="Leave it out")

    @property
    def wanted(self) -> bool:
        """True where there is something to validate: held-out data or prompts."""
        return bool(self.store or self.prompts)
