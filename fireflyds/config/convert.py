"""Options of `convert`: a checkpoint in its maker's layout, or a quantised one, becomes a plain directory."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(kw_only=True, slots=True)
class ConvertConfig:
    """Keys of the verb `convert`."""

    model: str = MISSING
    """Folder of the checkpoint, or its name on a hub."""
    out: str = MISSING
    """Hugging Face directory to write."""
    template: str = ""
    """Chat template to write, an entry of `fireflyds/data/templates`; empty: the checkpoint's own, if it has one."""
