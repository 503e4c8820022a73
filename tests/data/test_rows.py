"""Rows of data files in every form they are written in, and what is said of bad ones."""

import gzip
import json

import pytest

from fusedpeft.data.rows import load_rows, split_rows
from fusedpeft.errors import InputError

USER = {"role": "user", "content": "안녕?"}
SAID = {"role": "assistant", "content": "네."}
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


def write(path, *rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def one(tmp_path, row, form, **kwargs):
    (found,) = load_rows(write(tmp_path / "r.jsonl", row), form, **kwargs)
    assert found.pop("where") == f"{tmp_path / 'r.jsonl'} row 1"
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, SAID]},
        {"prompt": "안녕?", "completion": "네."},
        {"prompt": [USER], "completion": [SAID]},
        {"prompt": "안녕?", "chosen": "네.", "rejected": "아니요."},
    ],
)
def test_sft_rows(tmp_path, row):
    assert one(tmp_path, row, "sft") == {"prompt": [USER], "response": "네."}


def test_only_the_last_turn_of_messages_is_the_answer(tmp_path):
    row = one(tmp_path, {"messages": [USER, SAID, USER, SAID]}, "sft")
    assert row["prompt"] == [USER, SAID, USER]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "안녕?", "chosen": "네.", "rejected": "아니요."},
        {"prompt": [USER], "chosen": [SAID], "rejected": "아니요."},
        {"chosen": [USER, SAID], "rejected": [USER, {**SAID, "content": "아니요."}]},
    ],
)
def test_pairs(tmp_path, row):
    want = {"prompt": [USER], "chosen": "네.", "rejected": "아니요.", "aspect": None}
    assert one(tmp_path, row, "pairs") == want
    assert one(tmp_path, row, "pairs", aspect="safe")["aspect"] == "safe"
    assert (
        one(tmp_path, {**row, "aspect": "helpful"}, "pairs", aspect="safe")["aspect"] == "helpful"
    )


def test_hh_text_is_split_where_the_answers_part(tmp_path):
    row = one(tmp_path, {"chosen": HH + " d", "rejected": HH + " e"}, "pairs")
    assert [m["content"] for m in row["prompt"]] == ["a", "b", "c"]
    assert (row["chosen"], row["rejected"]) == ("d", "e")


def test_an_answer_that_goes_on_keeps_its_further_turns(tmp_path):
    longer = HH + " d\n\nHuman: f\n\nAssistant: g"
    row = one(tmp_path, {"chosen": longer, "rejected": HH + " e"}, "pairs")
    assert row["chosen"] == "d\n\nHuman: f\n\nAssistant: g" and row["rejected"] == "e"
    assert row["prompt"][-1]["content"] == "c"


def test_lists_in_both_forms(tmp_path):
    row = {"prompt": "안녕?", "responses": ["a", "b", "c"], "rewards": [1, 0.5, -2]}
    found = one(tmp_path, row, "lists")
    assert found["responses"] == ["a", "b", "c"] and found["rewards"] == [1.0, 0.5, -2.0]
    assert one(tmp_path, {"prompt": "x", "responses": ["a", "b"]}, "lists")["rewards"] is None
    prefix = ["<|prompter|>hi", "<|assistant|>yes?", "<|prompter|>go", "<|assistant|>"]
    pro = {"prefix": [prefix, prefix], "suffix": ["a", "b"], "reward": [0.1, 0.2], "sft_index": 0}
    found = one(tmp_path, pro, "lists")
    assert [m["role"] for m in found["prompt"]] == ["user", "assistant", "user"]
    assert found["prompt"][-1]["content"] == "go" and found["rewards"] == [0.1, 0.2]


def test_json_and_gz_and_separators_inside_strings(tmp_path):
    rows = [{"prompt": "a\u2028b", "completion": str(i)} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    for name in ("a.json", "a.jsonl.gz"):
        found = load_rows(tmp_path / name, "sft")
        assert [r["response"] for r in found] == ["0", "1", "2"]
        assert found[0]["prompt"][0]["content"] == "a\u2028b"


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    "form, row, message",
    [
        ("sft", {"text": "a"}, "expected 'messages', .*got 'text'"),
        ("sft", [1], r"expected an object, got \[1\]"),
        ("sft", {"messages": []}, r"messages: expected a list of messages, got \[\]"),
        ("sft", {"messages": [USER]}, "expected a user's turn before|answer last"),
        (
            "sft",
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            r"messages\[1\]: expected r",
        ),
        ("sft", {"messages": [SAID]}, "expected a user's turn before the answer"),
        ("sft", {"prompt": " ", "completion": "b"}, "prompt: expected text or messages, got ' '"),
        ("sft", {"prompt": "a", "completion": 3}, "completion: expected text .*got 3"),
        ("pairs", {"prompt": "a", "chosen": "b"}, "expected 'chosen' and 'rejected'"),
        ("pairs", {"chosen": "b", "rejected": "c"}, "chosen: expected a 'prompt' beside it"),
        ("pairs", {"chosen": [SAID], "rejected": [USER, SAID]}, "answer different prompts"),
        ("pairs", {**GOOD, "chosen": "b", "rejected": "c", "aspect": "nice"}, "aspect: expected h"),
        ("lists", {"prompt": "a", "responses": ["b"]}, "responses: expected a list of at least 2"),
        ("lists", {"prompt": "a"}, "expected 'prompt' and 'responses'"),
        (
            "lists",
            {"prompt": "a", "responses": ["b", "c"], "rewards": [1]},
            "rewards: expected 2 f",
        ),
        (
            "lists",
            {"prompt": "a", "responses": ["b", "c"], "rewards": [1, float("nan")]},
            "rewards: expected 2 finite numbers",
        ),
        (
            "lists",
            {"prompt": "a", "responses": ["b", "c"], "rewards": [1, 10**400]},
            "rewards: expected 2 finite numbers",
        ),
        ("lists", {"prefix": [["a"], ["b"]], "suffix": ["a", "b"]}, "prefix: expected the same"),
        ("lists", {"prefix": [["hi"]], "suffix": ["a", "b"]}, r"prefix\[0\]\[0\]: expected <"),
    ],
)
def test_a_bad_row_is_named(tmp_path, form, row, message):
    good = {"sft": GOOD, "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"}}
    first = good.get(form, {"prompt": "a", "responses": ["b", "c"]})
    path = write(tmp_path / "r.jsonl", first, row)
    with pytest.raises(InputError, match=message) as error:
        load_rows(path, form)
    assert f"{path} row 2" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_half_a_character_is_named(tmp_path, field):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, field: "a \ud83d"}) + "\n")
    with pytest.raises(InputError, match=r"r.jsonl row 2: expected text, got '\\ud83d', one half"):
        load_rows(path, "sft")


def test_bad_files(tmp_path):
    cases = {
        "none.jsonl": (None, "there is no such file"),
        "a.csv": (b"a,b", "expected a .jsonl or .json file"),
        "empty.jsonl": (b"\n\n", "the file is empty"),
        "cut.jsonl": (b'{"prompt": "a"', "row 1: not valid JSON"),
        "bytes.jsonl": (b"\xff\xfe", "cannot be read as UTF-8"),
        "cut.jsonl.gz": (gzip.compress(b"{}" * 99)[:20], "cannot be read"),
        "plain.jsonl.gz": (b"{}", "cannot be read"),
        "object.json": (b"{}", "expected a list of rows"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            load_rows(tmp_path / name, "sft")
        assert name in str(error.value)


@pytest.mark.parametrize(
    "n, holdout, held", [(10, 0.2, 2), (3, 0.2, 1), (1, 0.5, 1), (10, 0.99, 10)]
)
def test_the_last_rows_are_held_out(n, holdout, held):
    train, out = split_rows(list(range(n)), holdout)
    assert len(out) == held and train + out == list(range(n))


def test_real_preference_data(shared_data):
    hh = shared_data / "hh_rlhf"
    pairs = load_rows(hh / "harmless-base_test.jsonl.gz", "pairs", aspect="safe")
    assert len(pairs) == 2312 and all(p["prompt"][-1]["role"] == "user" for p in pairs)
    for name, count in (("harmless", 2312), ("helpful", 2354)):
        lists = load_rows(hh / f"pro_hh_test_{name}_base.jsonl.gz", "lists")
        assert len(lists) == count and all(len(row["rewards"]) == 2 for row in lists)
