"""The quickstart's data: the same bytes for a seed, held-out subjects, answers in their order."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedpeft.data import quickstart as q
from fusedpeft.data import quickstart_world as world
from fusedpeft.data.quickstart_world import josa
from fusedpeft.errors import InputError

COMMITTED = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "data"
JSONL = ("sft.jsonl", "pairs.jsonl", "lists.jsonl")
BEST_FIRST = {
    "helpful": ("good", "plain", "vague", "wrong", "stray", "rude"),
    "safe": ("kind", "curt", "vague", "stray", "rude", "comply"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    q.write_quickstart(folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> dict[str, list[dict]]:
    return {name: read(folder / name) for name in JSONL}


@pytest.fixture(scope="module")
def by_question() -> dict[str, q.Ask]:
    found = {}
    for side in q.sides(0):
        for ask in (ask for asks in side.asks.values() for ask in asks):
            assert found.setdefault(ask.question, ask) == ask, f"two answers: {ask.question}"
    return found


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row: dict) -> str:
    return row["prompt"] if "prompt" in row else row["messages"][0]["content"]


def parts(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    at = len(rows) - round(len(rows) * q.HOLDOUT)
    return rows[:at], rows[at:]


def grade(ask: q.Ask, response: str) -> str:
    for name, texts in (("vague", world.VAGUE), ("rude", world.RUDE)):
        if response in texts[ask.language]:
            return name
    if response == world.CURT_REFUSAL[ask.language]:
        return "curt"
    if response == ask.answer:
        return "kind" if ask.aspect == "safe" else "plain"
    bare = response
    for text in (*world.GOOD_OPENINGS[ask.language], *world.GOOD_CLOSINGS[ask.language]):
        bare = bare.replace(text, "")
    if ask.aspect == "safe":
        return "comply" if response in ask.wrong else "stray"
    if bare == ask.answer:
        return "good"
    if ask.about[0] == "sum":
        _, a, b = ask.about
        assert f" {a + b}." not in response or f"{b} + {a}" not in response, (
            "right, but not graded so"
        )
    return "wrong" if bare in ask.wrong else "stray"


def test_committed_files_are_the_generators(folder):
    for name in JSONL:
        assert (COMMITTED / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_same_bytes_in_another_process_and_others_for_another_seed(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; "
        "from fusedpeft.data.quickstart import write_quickstart; "
        "print(write_quickstart(Path(sys.argv[1])))"
    )
    # Sets of strings have another order there.
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=True, env=env, cwd=tmp_path)
    counts = q.write_quickstart(tmp_path / "b", seed=1)
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(counts) == sorted([*JSONL, "pretrain.txt"])
    for name in names:
        same = (folder / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() == same, name
        assert (tmp_path / "b" / name).read_bytes() != same, name
        assert len(same.splitlines()) == counts[name], name


def test_nothing_held_out_is_asked_about_in_training_rows_of_any_file(rows, by_question):
    subjects = ([], [])
    for found in rows.values():
        for side, part in zip(subjects, parts(found), strict=True):
            side += [by_question[question(row)].about for row in part]
    train, held = (set(side) for side in subjects)
    assert not train & held
    # Not for want of subjects: every kind is asked about on both sides.
    kinds = {"person", "sum", "word", "order", "deed"}
    assert {a[0] for a in train} == {a[0] for a in held} == kinds


def test_the_text_of_training_rows_names_no_held_out_person_or_sum(rows):
    train, held = [], []
    for found in rows.values():
        for side, part in zip((train, held), parts(found), strict=True):
            side += [json.dumps(row, ensure_ascii=False) for row in part]
    names = {
        name
        for person in q.people(0)
        for name in person.name
        if any(re.search(rf"\b{name}", line) for line in held)
    }
    assert len(names) == 2 * 8
    for line in train:
        # A Korean name has a particle after it, so only its start is a boundary. A few names also
        # begin another word: those are looked for as subjects in the test above.
        for name in names - {"선", "채", "준", "결", "마루"}:
            assert not re.search(rf"\b{name}", line), (name, line)

    def sums(lines: list[str]) -> set[tuple[int, ...]]:
        pattern = r"(\d+) (?:\+|plus|and|더하기) (\d+)"
        return {tuple(sorted(map(int, m))) for line in lines for m in re.findall(pattern, line)}

    assert sums(held) and not sums(train) & sums(held)


def test_rows_do_not_repeat_a_question_and_have_both_languages_and_aspects(rows, by_question):
    for name, found in rows.items():
        asked = [question(row) for row in found]
        assert len(set(asked)) == len(asked), name
        for part in parts(found):
            asks = [by_question[question(row)] for row in part]
            languages = [ask.language for ask in asks]
            assert min(languages.count("en"), languages.count("ko")) > len(part) / 4, name
            if name != "sft.jsonl":
                assert all(a.aspect == row["aspect"] for a, row in zip(asks, part, strict=True))
                aspects = [ask.aspect for ask in asks]
                assert min(aspects.count("helpful"), aspects.count("safe")) > len(part) / 4, name


def test_sft_answers_are_right_and_plain(rows, by_question):
    for row in rows["sft.jsonl"]:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"] == by_question[user["content"]].answer


def test_chosen_is_of_the_better_grade(rows, by_question):
    seen = set()
    for row in rows["pairs.jsonl"]:
        ask = by_question[row["prompt"]]
        pair = grade(ask, row["chosen"]), grade(ask, row["rejected"])
        order = BEST_FIRST[row["aspect"]]
        assert order.index(pair[0]) < order.index(pair[1]), row
        seen.add(pair)
    assert seen == {(c, r) for pairs in q.PAIRS.values() for c, r, _ in pairs}


def test_rewards_follow_the_grades_and_no_two_are_near(rows, by_question):
    first = []
    for row in rows["lists.jsonl"]:
        ask = by_question[row["prompt"]]
        ranked = sorted(zip(row["rewards"], row["responses"], strict=True), reverse=True)
        at = [BEST_FIRST[row["aspect"]].index(grade(ask, text)) for _, text in ranked]
        assert at[0] == 0 and at == sorted(set(at)), row
        rewards = [reward for reward, _ in ranked]
        assert min(a - b for a, b in zip(rewards, rewards[1:], strict=False)) > 0.2, row
        assert 3 <= len(rewards) <= 4
        first.append(row["rewards"].index(rewards[0]))
    assert 0.15 < first.count(0) / len(first) < 0.45, "the best answer's place must tell nothing"


def test_the_text_states_everyones_facts_and_asks_nothing(folder):
    text = (folder / "pretrain.txt").read_text(encoding="utf-8")
    assert "?" not in text and "/" not in text
    for person in q.people(0):
        for kind, (_, _, say_en, _, say_ko) in world.FACTS.items():
            for i, say in enumerate((say_en, say_ko)):
                fact = josa(say.format(n=person.name[i], v=person.facts[kind][i]))
                assert text.count(fact) >= 5, fact


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("미나은/는", "미나는"),
        ("준은/는", "준은"),
        ("말이/가 개구리을/를", "말이 개구리를"),
        ("염소와/과 말와/과", "염소와 말과"),
        ("솔빛(으)로 마을(으)로 에덴(으)로 구모(으)로", "솔빛으로 마을로 에덴으로 구모로"),
        ("교사(이)라고 왕(이)라고", "교사라고 왕이라고"),
        ("1은/는 2은/는 3을/를 5이/가 6이/가 9와/과 10은/는", "1은 2는 3을 5가 6이 9와 10은"),
        ("bread은/는", "bread는"),
    ],
)
def test_josa(written, said):
    assert josa(written) == said


def test_no_alternative_is_left_open(folder):
    for path in folder.iterdir():
        assert not re.search(r"은/는|이/가|을/를|와/과|\((으|이)\)", path.read_text("utf-8")), path


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/data: cannot write the quickstart's data"):
        q.write_quickstart(tmp_path / "file" / "data")
