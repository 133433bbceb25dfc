"""What a language brings to the generated corpus: its kinds of things, what can be said of them, and how."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """One attribute of a kind of thing. In every template `{e}` is the entity and `{v}` the value."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of thing that documents describe, and the names such things may have."""

    name: str
    names: tuple[str, ...]
    relations: tuple[Relation, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """All that the generator needs to write in one language.

    `scenes` are sentence patterns whose `{slots}` are drawn from `slots`: prose without facts, so that
    documents are more than lists. `small_talk` are question/answer pairs without facts.
    """

    code: str
    space: str
    kinds: tuple[Kind, ...]
    scenes: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]
    travel: tuple[str, ...]
    small_talk: tuple[tuple[str, str], ...]
    follow_up: tuple[str, ...]
