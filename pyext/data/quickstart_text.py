"""The quickstart's pretraining text: statements about its world, no questions, no requests."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from fusedpeft.data import quickstart_world as world
from fusedpeft.data.quickstart_world import josa

if TYPE_CHECKING:
    from fusedpeft.data.quickstart import Person


def document(everyone: list[Person], rng: random.Random) -> str:
    """One document, of a kind and in a language that `rng` chooses: a line of sentences."""
    kind = rng.choices(
        (_biography, _meeting, _dictionary, _sums, _orders, _deeds, _everyday),
        (36, 12, 12, 13, 10, 5, 12),
    )[0]
    return josa(kind(everyone, rng))


def _fact(person: Person, kind: str, i: int, rng: random.Random) -> str:
    values = world.FACTS[kind]
    said = [values[2 + 2 * i], *world.PARAPHRASES[kind][i]]
    # The plain form, which later answers take, is as frequent as the paraphrases together.
    said = rng.choice((said[0], rng.choice(said[1:])))
    return said.format(n=person.name[i], v=person.facts[kind][i])


def _biography(everyone: list[Person], rng: random.Random) -> str:
    person, i = rng.choice(everyone), rng.randrange(2)
    kinds = rng.sample(list(world.FACTS), 4)
    return " ".join(_fact(person, kind, i, rng) for kind in kinds)


def _meeting(everyone: list[Person], rng: random.Random) -> str:
    i = rng.randrange(2)
    first, second = rng.sample(everyone, 2)
    kinds = rng.sample(list(world.FACTS), 2)
    return " ".join(_fact(p, kind, i, rng) for kind in kinds for p in (first, second))


def _dictionary(everyone: list[Person], rng: random.Random) -> str:
    lines = []
    for en, ko in rng.sample(world.WORDS, 5):
        forms = (f"{en} is {ko} in Korean.", f"{ko}은/는 영어로 {en}.", f"{en}: {ko}.")
        lines.append(rng.choice(forms))
    return " ".join(lines)


def _sums(everyone: list[Person], rng: random.Random) -> str:
    lines = []
    for _ in range(5):
        a, b = rng.randint(1, 12), rng.randint(1, 12)
        plain = f"{a} + {b} = {a + b}."
        forms = (
            plain,
            f"{a} plus {b} is {a + b}, so {plain}",
            f"{a} 더하기 {b}은/는 {a + b}, {plain}",
        )
        lines.append(rng.choice(forms))
    return " ".join(lines)


def _orders(everyone: list[Person], rng: random.Random) -> str:
    lines = []
    for _ in range(3):
        mixed = rng.sample(range(1, 20), 3)
        before, after = (", ".join(map(str, n)) for n in (mixed, sorted(mixed)))
        forms = (f"{before} in order: {after}.", f"{before}, 순서대로 {after}.")
        lines.append(rng.choice(forms))
    return " ".join(lines)


def _deeds(everyone: list[Person], rng: random.Random) -> str:
    i = rng.randrange(2)
    lines = []
    for verb_en, verb_ko, say_en, say_ko in rng.sample(world.KIND_DEEDS, 2):
        en, ko = rng.choice(world.PETS)
        name = rng.choice(everyone).name[i]
        if i == 0:
            lines.append(f"This is how {name} can {verb_en} the {en}. {say_en.format(o=en)}")
        else:
            lines.append(f"{name}은/는 {ko}을/를 {verb_ko}. {say_ko.format(o=ko)}")
    return " ".join(lines)


def _everyday(everyone: list[Person], rng: random.Random) -> str:
    i = rng.randrange(2)
    lines = rng.sample(world.EVERYDAY["ko" if i else "en"], 3)
    said = []
    for line in lines:
        first, second = rng.sample(everyone, 2)
        town = rng.choice(world.TOWNS)
        said.append(line.format(n=first.name[i], m=second.name[i], t=town[i]))
    return " ".join(said)
