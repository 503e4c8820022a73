"""Rows of data files in every form they are written in, and what is said of bad ones."""

import gzip
import json

import pytest

from fusedpeft.data.rows import load_rows, split_rows
from fusedpeft.errors import InputError

USER = {"role": "user", "content": "안녕?"}
SAID = {"role": "assistant", "content": "네."}
NO = {"role": "assistant", "content": "아니요."}
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
        {"prompt": "안녕?", "completion": [USER, SAID]},
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
        {"prompt": "안녕?", "chosen": [USER, SAID], "rejected": [USER, NO]},  # UltraFeedback
        {"prompt": [USER], "chosen": [USER, SAID], "rejected": [NO]},
    ],
)
def test_pairs(tmp_path, row):
    want = {"prompt": [USER], "chosen": "네.", "rejected": "아니요.", "aspect": None}
    assert one(tmp_path, row, "pairs") == want
    assert one(tmp_path, row, "pairs", aspect="safe")["aspect"] == "safe"
    assert (
        one(tmp_path, {**row, "aspect": "helpful"}, "pairs", aspect="safe")["aspect"] == "helpful"
    )
    null = one(tmp_path, {**row, "aspect": None}, "pairs", aspect="safe")
    assert null["aspect"] == "safe"


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


def test_what_published_lists_have_stays(tmp_path):
    row = {"prompt": "x", "responses": ["a", "a", ""], "rewards": [1, 1, 0], "score": 7}
    assert one(tmp_path, row, "lists")["responses"] == ["a", "a", ""]
    pair = {"prompt": "x", "chosen": "", "rejected": "a"}
    assert one(tmp_path, pair, "pairs")["chosen"] == ""
    same = {"prompt": "x", "chosen": "a", "rejected": "a"}
    assert one(tmp_path, same, "sft")["response"] == "a"


def test_json_and_gz_and_separators_inside_strings(tmp_path):
    rows = [{"prompt": "a\u2028b", "completion": str(i)} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    (tmp_path / "B.JSONL.GZ").write_bytes((tmp_path / "a.jsonl.gz").read_bytes())
    (tmp_path / "B.JSON").write_bytes((tmp_path / "a.json").read_bytes())
    for name in ("a.json", "a.jsonl.gz", "B.JSON", "B.JSONL.GZ"):
        found = load_rows(tmp_path / name, "sft")
        assert [r["response"] for r in found] == ["0", "1", "2"]
        assert found[0]["prompt"][0]["content"] == "a\u2028b"


GOOD = {"prompt": "a", "completion": "b"}
LIST = {"prompt": "a", "responses": ["b", "c"]}
PRO = {"prefix": [["<|prompter|>hi"]], "suffix": ["a", "b"]}


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
        ("sft", {"prompt": "a", "completion": " "}, "expected an answer to learn, got ' ': leave"),
        ("sft", {"messages": [USER, {**SAID, "content": ""}]}, "expected an answer to learn, got"),
        ("pairs", {"prompt": "a", "chosen": [USER, SAID], "rejected": "b"}, "chosen: .* after the"),
        ("pairs", {"prompt": "a", "chosen": "b"}, "expected 'chosen' and 'rejected'"),
        ("pairs", {"chosen": "b", "rejected": "c"}, "chosen: expected a 'prompt' beside it"),
        ("pairs", {"chosen": [SAID], "rejected": [USER, SAID]}, "answer different prompts"),
        ("pairs", {**GOOD, "chosen": "b", "rejected": "c", "aspect": "nice"}, "aspect: expected h"),
        ("lists", {"prompt": "a", "responses": ["b"]}, "responses: expected a list of at least 2"),
        ("lists", {"prompt": "a"}, "expected 'prompt' and 'responses'"),
        ("lists", {**LIST, "scores": [1, 2]}, "field 'scores': expected each .* in 'rewards'"),
        ("lists", {**LIST, "rewards": None, "reward": [1, 2]}, "unknown field 'reward': expected"),
        ("lists", {**PRO, "rewards": [1, 2]}, "field 'rewards': expected each .* in 'reward'"),
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
        "deep.jsonl": (b"[" * 10**5 + b"]" * 10**5, r"row 1: not valid JSON \(nested too deeply\)"),
        "deep.json": (b"[" * 10**5 + b"]" * 10**5, r"deep.json: not valid JSON \(nested"),
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


def test_pairs_of_one_answer_are_left_out_and_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    dialogues = {"chosen": [USER, SAID], "rejected": [USER, SAID]}
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path.write_text("\n".join(map(json.dumps, [same, good, dialogues])))
    with pytest.warns(UserWarning, match=r"left out 2 of 3 pairs, .* the same \(row 1, 3\)"):
        rows = load_rows(path, "pairs")
    assert [row["where"] for row in rows] == [f"{path} row 2"]
    path.write_text(json.dumps(same))
    with pytest.warns(UserWarning), pytest.raises(InputError, match="expected rows, found none"):
        load_rows(path, "pairs")
