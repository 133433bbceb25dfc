"""A small invented world: every entity has one value for every relation of its kind, drawn once from the seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from fireflyds.errors import UserError

from .language import Kind, Language, Relation


@dataclass(frozen=True, slots=True)
class Fact:
    """The value of one relation of one entity."""

    entity: str
    relation: Relation
    value: str

    def answer(self, value: str | None = None) -> str:
        """Returns the answer sentence with the fact's value, or with `value` as a wrong choice."""
        return self.relation.answer.format(e=self.entity, v=value or self.value)


@dataclass(frozen=True, slots=True)
class Entity:
    """A named entity of the world, with one fact for every relation of its kind."""

    name: str
    kind: Kind
    facts: tuple[Fact, ...]


def build_world(language: Language, num_entities: int, rng: random.Random) -> list[Entity]:
    """Returns `num_entities` entities of each kind, with distinct names.

    Raises:
        UserError: a kind has fewer names than `num_entities`.
    """
    entities = []
    for kind in language.kinds:
        if num_entities > len(kind.names):
            raise UserError(
                f"{language.code}/{kind.name} has {len(kind.names)} names",
                key="num_entities",
                value=num_entities,
                remedy=f"Give {len(kind.names)} or fewer",
            )
        columns = [_balanced(relation.values, num_entities, rng) for relation in kind.relations]
        for name, *values in zip(rng.sample(kind.names, num_entities), *columns, strict=True):
            facts = tuple(Fact(name, relation, value) for relation, value in zip(kind.relations, values, strict=True))
            entities.append(Entity(name, kind, facts))
    return entities


def _balanced(values: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    """Returns `count` values in random order with equal frequencies, so that no value is a better guess than others."""
    column = [values[i % len(values)] for i in range(count)]
    rng.shuffle(column)
    return column


def write_documents(language: Language, world: list[Entity], rng: random.Random) -> Iterator[str]:
    """Yields documents endlessly: descriptions of one entity each, and sometimes (15 %) notes about several."""
    while True:
        for entity in rng.sample(world, len(world)):
            yield _description(language, entity, rng)
            if rng.random() < 0.15:
                yield _notes(language, rng.sample(world, rng.randint(2, 3)), rng)


def _scene(language: Language, rng: random.Random) -> str:
    slots = {name: rng.choice(values) for name, values in language.slots.items()}
    sentence = rng.choice(language.scenes).format(**slots)
    return sentence[0].upper() + sentence[1:]


def _statement(fact: Fact, rng: random.Random) -> str:
    return rng.choice(fact.relation.statements).format(e=fact.entity, v=fact.value)


def _description(language: Language, entity: Entity, rng: random.Random) -> str:
    facts = rng.sample(entity.facts, rng.randint(len(entity.facts) - 1, len(entity.facts)))
    sentences = [_statement(fact, rng) for fact in facts]
    sentences.insert(rng.randint(0, len(sentences)), _scene(language, rng))
    opening = rng.choice(entity.kind.openings).format(e=entity.name)
    closing = rng.choice(entity.kind.closings).format(e=entity.name)
    return language.space.join([opening, *sentences, closing])


def _notes(language: Language, entities: list[Entity], rng: random.Random) -> str:
    sentences = [rng.choice(language.travel)]
    for entity in entities:
        sentences += [_statement(fact, rng) for fact in rng.sample(entity.facts, 2)]
    sentences.append(_scene(language, rng))
    return language.space.join(sentences)
