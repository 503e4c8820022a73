"""Benchmark files as rows: the exact text of a prompt, and damaged files named by their line."""

import bz2
import json

import pytest

from fusedpeft.errors import InputError
from fusedpeft.evaluate.benchmarks import evenly, hellaswag_rows, mmlu_rows, mmlu_shots


def mmlu_row(subject="abstract_algebra", number=0, answer=1, **more):
    row = {
        "question": f"Question {number} of {subject}? ",
        "subject": subject,
        "choices": [f"first {number}", "second", "third", "fourth"],
        "answer": answer,
    }
    return row | more


@pytest.fixture
def mmlu(tmp_path):
    """Writes mmlu/dev.jsonl and mmlu/test.jsonl from rows (or lines) and gives the folder."""

    def write(dev, test):
        (tmp_path / "mmlu").mkdir(exist_ok=True)
        for name, rows in (("dev", dev), ("test", test)):
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / "mmlu" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path

    return write


@pytest.fixture
def hellaswag(tmp_path):
    def write(lines):
        (tmp_path / "hellaswag").mkdir(exist_ok=True)
        path = tmp_path / "hellaswag" / "hellaswag_val_full.txt.bz2"
        path.write_bytes(bz2.compress("".join(f"{line}\n" for line in lines).encode()))
        return tmp_path

    return write


def test_evenly_takes_from_all_over_and_never_twice():
    rows = list(range(10))
    assert evenly(rows, None) is rows and evenly(rows, 10) is rows and evenly(rows, 11) is rows
    assert evenly(rows, 1) == [0]
    assert evenly(rows, 3) == [0, 3, 6]
    assert evenly(rows, 9) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert all(len(set(evenly(list(range(1698)), n))) == n for n in (2, 7, 57, 1000, 1697))


def test_the_shots_are_the_published_prompt_to_the_letter():
    dev = [mmlu_row("high_school_us_history", n, answer=n) for n in range(3)]
    assert mmlu_shots("high_school_us_history", dev, 2) == (
        "The following are multiple choice questions (with answers) about high school us history."
        "\n\n"
        "Question 0 of high_school_us_history?\n"
        "A. first 0\nB. second\nC. third\nD. fourth\nAnswer: A\n\n"
        "Question 1 of high_school_us_history?\n"
        "A. first 1\nB. second\nC. third\nD. fourth\nAnswer: B\n\n"
    )


def test_no_shots_leave_the_heading(mmlu):
    folder = mmlu([mmlu_row("b_c")], [mmlu_row("a_b")])
    (row,) = mmlu_rows(folder, None, 0)
    assert row["shots"] == (
        "The following are multiple choice questions (with answers) about a b.\n\n"
    )


def test_a_question_gets_the_first_shots_of_its_own_subject(mmlu):
    dev = [mmlu_row(s, n) for n in range(6) for s in ("x", "y")]
    folder = mmlu(dev, [mmlu_row("y", 8, answer=3), mmlu_row("x", 9, source="kept out")])
    first, second = mmlu_rows(folder, None, 5)
    assert first["answer"] == 3 and set(second) == {
        "question", "subject", "choices", "answer", "shots",
    }  # fmt: skip
    for row, subject in ((first, "y"), (second, "x")):
        assert row["subject"] == subject and row["shots"].count("Answer: ") == 5
        assert f"about {subject}." in row["shots"]
        order = [row["shots"].index(f"Question {n} of {subject}?") for n in range(5)]
        assert order == sorted(order) and f"Question 5 of {subject}" not in row["shots"]


def test_too_few_shots_name_the_subject(mmlu):
    folder = mmlu([mmlu_row("x")] * 4, [mmlu_row("x")])
    with pytest.raises(InputError, match="expected 5 dev rows of x .* got 4: lower num_fewshot"):
        mmlu_rows(folder, None, 5)
    assert len(mmlu_rows(folder, None, 4)) == 1


def test_a_limit_reaches_every_subject_of_the_sorted_file(mmlu):
    names = ("a", "b", "c", "d")
    folder = mmlu([mmlu_row(s) for s in names], [mmlu_row(s, n) for s in names for n in range(9)])
    assert [row["subject"] for row in mmlu_rows(folder, 4, 1)] == list(names)


def test_a_line_separator_inside_a_question_is_no_end_of_line(mmlu):
    odd = json.dumps(mmlu_row("x", question="one\u2028two\u0085three"), ensure_ascii=False)
    (row,) = mmlu_rows(mmlu([mmlu_row("x")], [odd]), None, 1)
    assert row["question"] == "one\u2028two\u0085three"


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        "[" * 10**5,
        "[1, 2]",
        "7",
        "",
        json.dumps({"question": "q", "subject": "x", "choices": ["a"] * 4}),
        json.dumps(mmlu_row(choices=["a", "b", "c"])),
        json.dumps(mmlu_row(choices="abcd")),
        json.dumps(mmlu_row(choices=["a", "b", "c", 4])),
        json.dumps(mmlu_row(answer=4)),
        json.dumps(mmlu_row(answer=-1)),
        json.dumps(mmlu_row(answer="B")),
        json.dumps(mmlu_row(answer=True)),
        json.dumps(mmlu_row(answer=1.0)),
        json.dumps(mmlu_row(question=None)),
        json.dumps(mmlu_row(subject=3)),
    ],
)
def test_a_damaged_line_of_mmlu_is_named(mmlu, line):
    folder = mmlu([mmlu_row()], [mmlu_row(), mmlu_row(), line, mmlu_row()])
    with pytest.raises(InputError, match="test.jsonl line 3: expected question, subject") as error:
        mmlu_rows(folder, 1, 1)
    assert "\n" not in str(error.value)


def test_rows_of_hellaswag(hellaswag):
    folder = hellaswag(
        ["Baking: She mixes ", "2", " one", "two ", "three", "four"]
        + ["Golf: He swings", " 0", "five", "six", "seven", "eight"]
    )
    assert hellaswag_rows(folder, None) == [
        {"query": "Baking: She mixes", "choices": ["one", "two", "three", "four"], "label": 2},
        {"query": "Golf: He swings", "choices": ["five", "six", "seven", "eight"], "label": 0},
    ]
    assert [row["label"] for row in hellaswag_rows(folder, 1)] == [2]


@pytest.mark.parametrize("label", ["4", "-1", "x", "", "1.0"])
def test_a_damaged_line_of_hellaswag_is_named(hellaswag, label):
    folder = hellaswag(["c", "0", *"abcd"] + ["c", label, *"abcd"])
    with pytest.raises(InputError, match="bz2 line 8: expected the right ending's number"):
        hellaswag_rows(folder, 1)


@pytest.mark.parametrize("at", [0, 3])
def test_an_empty_text_of_hellaswag_is_named(hellaswag, at):
    lines = ["c", "0", *"abcd"]
    lines[at] = " "
    with pytest.raises(InputError, match=f"bz2 line {at + 1}: expected text, got an empty line"):
        hellaswag_rows(hellaswag(lines), None)


def test_half_a_question_is_told(hellaswag):
    with pytest.raises(InputError, match="expected six lines a question, got 9 lines"):
        hellaswag_rows(hellaswag(["c", "0", *"abcd", "c", "1", "a"]), None)


@pytest.mark.parametrize("load", [lambda f: mmlu_rows(f, 1, 0), lambda f: hellaswag_rows(f, 1)])
def test_a_missing_file_is_named_with_the_fix(tmp_path, load):
    with pytest.raises(InputError, match="expected this benchmark file .*: give the folder"):
        load(tmp_path)


def test_damaged_bytes_are_named(mmlu, hellaswag):
    folder = hellaswag(["c", "0", *"abcd"] * 50)
    path = folder / "hellaswag" / "hellaswag_val_full.txt.bz2"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"no archive", whole[:30] + b"?" + whole[31:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="bz2: expected this benchmark file"):
            hellaswag_rows(folder, None)
    mmlu([mmlu_row()], [mmlu_row()])
    (folder / "mmlu" / "test.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(InputError, match="test.jsonl: expected this benchmark file"):
        mmlu_rows(folder, None, 0)


def test_an_empty_file_is_told(mmlu):
    folder = mmlu([mmlu_row()], [])
    (folder / "mmlu" / "test.jsonl").write_text("")
    with pytest.raises(InputError, match="expected questions, the file is empty"):
        mmlu_rows(folder, None, 0)


def test_the_real_files(shared_data):
    rows = mmlu_rows(shared_data, 57, 5)
    assert len(rows) == 57 and len({row["subject"] for row in rows}) == 12
    assert all(row["shots"].count("\nAnswer: ") == 5 for row in rows)
    assert len(mmlu_rows(shared_data, None, 5)) == 1698
    rows = hellaswag_rows(shared_data, None)
    assert len(rows) == 10_042 and {row["label"] for row in rows} == {0, 1, 2, 3}
