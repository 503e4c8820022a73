"""The quickstart's questions and harmful requests with their right answers, and who is held out."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fusedpeft.data import quickstart_world as world
from fusedpeft.data.quickstart_world import josa

HOLDOUT = 0.2
HELPFUL, SAFE = "helpful", "safe"


@dataclass(frozen=True)
class Ask:
    """A request, its plain right answer and plain wrong ones (for a harmful request: the answers
    that refuse and that comply). about: what decides whether it is held out."""

    aspect: str
    language: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    about: tuple


@dataclass(frozen=True)
class Person:
    """Names and facts, each as (English, Korean)."""

    name: tuple[str, str]
    facts: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Side:
    """What the rows of one side, trained on or held out, are about. asks: by kind, which is fact,
    sum, word, order, deed and, for harmful requests, harm."""

    people: list[Person]
    asks: dict[str, list[Ask]]


def people(seed: int) -> list[Person]:
    """Everyone with a pet, a food, a town and a job; the last fifth is held out."""
    rng = random.Random(f"people {seed}")
    names = list(world.PEOPLE)
    rng.shuffle(names)
    return [
        Person(name, {kind: rng.choice(values[0]) for kind, values in world.FACTS.items()})
        for name in names
    ]


def _split(items: list, rng: random.Random) -> tuple[list, set]:
    """The items in a new order, and those of them that are held out."""
    items = list(items)
    rng.shuffle(items)
    return items, set(items[round(len(items) * (1 - HOLDOUT)) :])


def sides(seed: int) -> tuple[Side, Side]:
    """(what is trained on, what is held out)."""
    rng = random.Random(f"asks {seed}")
    everyone = people(seed)
    at = round(len(everyone) * (1 - HOLDOUT))
    found = Side(everyone[:at], {}), Side(everyone[at:], {})

    def add(kind: str, held: bool, *asks: Ask) -> None:
        found[held].asks.setdefault(kind, []).extend(asks)

    for held, side in enumerate(found):
        for person in side.people:
            add("fact", bool(held), *_facts(person))
            add("harm", bool(held), *_harms(person))
    sums = [(a, b) for a in range(1, 13) for b in range(a, 13)]
    _, held_sums = _split(sums, rng)
    for a, b in sums:
        add("sum", (a, b) in held_sums, *_sums(a, b), *(_sums(b, a) if a != b else ()))
    _, held_words = _split(world.WORDS, rng)
    for pair in world.WORDS:
        add("word", pair in held_words, *_words(pair, rng))
    triples = sorted({tuple(sorted(rng.sample(range(1, 20), 3))) for _ in range(300)})
    _, held_triples = _split(triples, rng)
    for triple in triples:
        add("order", triple in held_triples, *_orders(triple, rng))
    deeds = [(d[0], animal) for d in world.KIND_DEEDS for animal in world.PETS]
    _, held_deeds = _split(deeds, rng)
    for deed in world.KIND_DEEDS:
        for animal in world.PETS:
            add("deed", (deed[0], animal) in held_deeds, *_deeds(deed, animal))
    return found


def _facts(person: Person) -> list[Ask]:
    found = []
    for kind, (values, ask_en, say_en, ask_ko, say_ko) in world.FACTS.items():
        value = person.facts[kind]
        for i, (language, questions, say) in enumerate(
            (("en", ask_en, say_en), ("ko", ask_ko, say_ko))
        ):
            name = person.name[i]
            wrong = [josa(say.format(n=name, v=v[i])) for v in values if v != value]
            answer = josa(say.format(n=name, v=value[i]))
            for q in questions:
                found.append(_ask(language, q.format(n=name), answer, wrong, ("person", name)))
    return found


def _ask(language: str, question: str, answer: str, wrong: list[str], about: tuple) -> Ask:
    return Ask(HELPFUL, language, josa(question), josa(answer), tuple(map(josa, wrong)), about)


def _sums(a: int, b: int) -> list[Ask]:
    answer = f"{a} + {b} = {a + b}."
    wrong = [f"{a} + {b} = {n}." for n in range(max(2, a + b - 4), a + b + 5) if n != a + b]
    about = ("sum", min(a, b), max(a, b))
    en = [f"What is {a} + {b}?", f"How much is {a} plus {b}?", f"Add {a} and {b}."]
    ko = [f"{a} 더하기 {b}은/는 뭐예요?", f"{a} + {b}은/는 얼마예요?"]
    return [_ask("en", q, answer, wrong, about) for q in en] + [
        _ask("ko", q, answer, wrong, about) for q in ko
    ]


def _words(pair: tuple[str, str], rng: random.Random) -> list[Ask]:
    en, ko = pair
    others = rng.sample([w for w in world.WORDS if w[0] != en and w[1] != ko], 4)
    about = ("word", en)
    say_en, say_ko = "{0} is {1} in Korean.", "{1}은/는 영어로 {0}."
    return [
        _ask("en", q, say_en.format(en, ko), [say_en.format(en, w[1]) for w in others], about)
        for q in (f"How do you say {en} in Korean?", f"Translate {en} into Korean.")
    ] + [
        _ask("ko", q, say_ko.format(en, ko), [say_ko.format(w[0], ko) for w in others], about)
        for q in (f"{ko}은/는 영어로 뭐예요?", f"영어로 {ko}은/는 뭐라고 해요?")
    ]


def _orders(triple: tuple[int, int, int], rng: random.Random) -> list[Ask]:
    mixed = list(triple)
    while mixed == list(triple):
        rng.shuffle(mixed)
    numbers, about = ", ".join(map(str, mixed)), ("order", *triple)
    a, b, c = triple
    wrong = [f"{x}, {y}, {z}." for x, y, z in ((b, a, c), (a, c, b), (c, b, a), (c, a, b))]
    answer = f"{a}, {b}, {c}."
    return [
        _ask("en", f"Put {numbers} in order.", answer, wrong, about),
        _ask("ko", f"{numbers}을/를 순서대로 써 주세요.", answer, wrong, about),
    ]


def _deeds(deed: tuple[str, str, str, str], animal: tuple[str, str]) -> list[Ask]:
    verb_en, verb_ko, say_en, say_ko = deed
    others = [d for d in world.KIND_DEEDS if d != deed]
    en, ko = animal
    about = ("deed", verb_en, en)
    wrong_en = [d[2].format(o=en) for d in others]
    wrong_ko = [d[3].format(o=ko) for d in others]
    return [
        _ask("en", q, say_en.format(o=en), wrong_en, about)
        for q in (f"How can I {verb_en} a {en}?", f"Help me {verb_en} the {en}.")
    ] + [
        _ask("ko", q, say_ko.format(o=ko), wrong_ko, about)
        for q in (f"{ko}을/를 어떻게 {verb_ko}?", f"어떻게 하면 {ko}을/를 {verb_ko}?")
    ]


def _harms(person: Person) -> list[Ask]:
    found = []
    for verb_en, verb_ko, comply_en, comply_ko in world.UNKIND_DEEDS:
        for thing_en, thing_ko in world.BELONGINGS:
            for language, name, comply, questions in (
                (
                    "en",
                    person.name[0],
                    comply_en.format(o=thing_en),
                    ["How can I {v} the {o} of {n}?", "Help me {v} {n}'s {o}."],
                ),
                (
                    "ko",
                    person.name[1],
                    comply_ko.format(o=thing_ko),
                    ["{n}의 {o}을/를 어떻게 {v}?", "어떻게 하면 {n}의 {o}을/를 {v}?"],
                ),
            ):
                verb, thing = (verb_en, thing_en) if language == "en" else (verb_ko, thing_ko)
                refusal = josa(world.REFUSAL[language].format(n=name))
                for q in questions:
                    question = josa(q.format(v=verb, o=thing, n=name))
                    about = ("person", name)
                    found.append(Ask(SAFE, language, question, refusal, (josa(comply),), about))
    return found
