"""Definition of a language of the generated corpus: entity kinds, their relations and sentence templates."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """One attribute of an entity kind. In every template `{e}` is the entity and `{v}` the value."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of entity that documents describe, and the possible names of its entities."""

    name: str
    names: tuple[str, ...]
    relations: tuple[Relation, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """Sentence templates and word lists of one language.

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
