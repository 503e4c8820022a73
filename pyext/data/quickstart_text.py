"""The quickstart's pretraining text: statements about its world, no questions, no requests."""

from __future__ import annotations

import random

from fusedpeft.data import quickstart_world as world
from fusedpeft.data.quickstart_asks import Person
from fusedpeft.data.quickstart_world import josa


def document(everyone: list[Person], rng: random.Random) -> str:
    """One document, of a kind and in a language that `rng` chooses: a line of sentences."""
    kind = rng.choices(
        (_biography, _meeting, _topics, _dictionary, _sums, _orders, _deeds, _taking, _everyday),
        (15, 7, 16, 18, 9, 11, 10, 9, 5),
    )[0]
    return josa(kind(everyone, rng))


def babble(people: list[Person], rng: random.Random) -> str:
    """A stretch of text about these people that begins and ends anywhere, as a base goes on."""
    kind = rng.choice((_biography, _meeting, _topics, _taking, _everyday))
    words = josa(kind(people, rng)).split()
    start = rng.randrange(len(words) // 2)
    return " ".join(words[start : start + rng.randint(3, 20)])


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


def _topics(everyone: list[Person], rng: random.Random) -> str:
    """What is spoken of, then a fact about it: the fact follows from the words before."""
    i = rng.randrange(2)
    lines = []
    for _ in range(3):
        person, speaker = rng.sample(everyone, 2)
        kind = rng.choice(list(world.FACTS))
        topic = world.TOPICS[kind][i]
        topic = (rng.choice(topic) if i == 0 else topic).format(n=person.name[i])
        opening = rng.choice(world.SPEAKS_OF[i]).format(m=speaker.name[i], t=topic)
        said = world.FACTS[kind][2 + 2 * i].format(n=person.name[i], v=person.facts[kind][i])
        lines.append(f"{opening} {said}")
    return " ".join(lines)


def _taking(everyone: list[Person], rng: random.Random) -> str:
    i = rng.randrange(2)
    lines = []
    for _ in range(3):
        owner, other = rng.sample(everyone, 2)
        line, thing = rng.choice(world.TAKES[i]), rng.choice(world.BELONGINGS)[i]
        lines.append(line.format(m=other.name[i], n=owner.name[i], o=thing))
    return " ".join(lines)


def _dictionary(everyone: list[Person], rng: random.Random) -> str:
    lines = []
    for en, ko in rng.sample(world.WORDS, 5):
        say_en, say_ko = f"{en} is {ko} in Korean.", f"{ko}은/는 영어로 {en}."
        name = rng.choice(everyone).name
        forms = (
            say_en,
            say_ko,
            f"{en}: {ko}.",
            f"{name[0]} reads the word {en}. {say_en}",
            f"{name[0]} writes {en} in Korean. {say_en}",
            f"{name[1]}이/가 {ko}을/를 읽어요. {say_ko}",
            f"영어로 {ko}을/를 써요. {say_ko}",
            f"{ko}을/를 영어로 말해요. {say_ko}",
        )
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
            f"{rng.choice(everyone).name[0]} adds {a} and {b}. {plain}",
            f"{a} 더하기 {b}은/는 {a + b}, {plain}",
        )
        lines.append(rng.choice(forms))
    return " ".join(lines)


def _orders(everyone: list[Person], rng: random.Random) -> str:
    lines = []
    for _ in range(3):
        mixed = rng.sample(range(1, 20), 3)
        before, after = (", ".join(map(str, n)) for n in (mixed, sorted(mixed)))
        name = rng.choice(everyone).name
        forms = (
            f"{before} in order: {after}.",
            f"{name[0]} puts {before} in order. {after}.",
            f"{before}, 순서대로 {after}.",
            f"{name[1]}이/가 {before}을/를 순서대로 써요. {after}.",
        )
        lines.append(rng.choice(forms))
    return " ".join(lines)


def _deeds(everyone: list[Person], rng: random.Random) -> str:
    i = rng.randrange(2)
    lines = []
    for verb_en, verb_ko, say_en, say_ko in rng.sample(world.KIND_DEEDS, 2):
        en, ko = rng.choice(world.PETS)
        name = rng.choice(everyone).name[i]
        if i == 0:
            opening = rng.choice(("This is how {n} can {v} the {o}.", "{n} wants to {v} a {o}."))
            opening = opening.format(n=name, v=verb_en, o=en)
            lines.append(f"{opening} {say_en.format(o=en)}")
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
