"""report.html: every figure of a run's folder, nothing but text from its files, nothing fetched."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from fusedpeft.errors import InputError
from fusedpeft.evaluate.figures import Figure, decimals, duration, figures, signed
from fusedpeft.evaluate.report import render, write_report

RESULTS = {
    "name": "quick",
    "config": {"base": "/models/tiny", "lora": {"rank": 4}, "seed": 0},
    "versions": {"torch": "2.13.0"},
    "seconds": {"sft": 61.2, "reward": 44.0, "pro": 88.6, "evaluate": 20.1},
    "peak_memory_bytes": 3 * 2**29,
    "stages": {
        "sft": {"eval_loss_before": 3.214, "eval_loss_after": 0.954, "trainable_parameters": 13072},
        "reward": {
            "accuracy_before": {"overall": 0.512, "helpful": 0.487, "safe": 0.541},
            "accuracy": {"overall": 0.914, "helpful": 0.887, "safe": 0.955},
        },
        "pro": {
            "ranking_accuracy_before": 0.81,
            "ranking_accuracy_after": 0.58,
            "reward_before": -0.213,
            "reward_after": 0.644,
        },
        "evaluate": {
            "base": {"mmlu": {"acc": 0.25, "n": 100.0, "truncated": 3.0}, "eval_loss": 3.214},
            "sft": {"mmlu": {"acc": 0.26, "n": 100.0, "truncated": 3.0}, "eval_loss": 0.954},
            "pro": {"mmlu": {"acc": 0.5, "n": 100.0, "truncated": 3.0}, "eval_loss": 1.021},
        },
    },
}
HISTORY = [{"step": s, "loss": 3.0 - s / 10} for s in range(1, 9)] + [
    {"step": 8, "eval_loss": 2.5},
    {"step": 8, "train_loss": 2.6, "train_runtime": 1.0},
]
SAMPLES = [
    {
        "prompt": "Where does Mina live?",
        "answers": {"base": "  ", "sft": "In Busan.", "pro": "In Busan. Anything else?"},
        "rewards": {"base": -1.42, "sft": 0.31, "pro": 0.92},
    },
    {"prompt": "민호는 어디에 살아요?", "answers": {"sft": "서울에 살아요."}, "rewards": {}},
]
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The page's tags, attributes and text; every tag that is opened is closed."""

    VOID = {"meta", "line", "circle", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page(results=RESULTS, histories=None, samples=SAMPLES):
    return Page(render(results, {"sft": HISTORY} if histories is None else histories, samples))


def test_every_figure_is_there():
    text = page().text
    for words in (
        "quick SFT, Reward model, PRO, Evaluation · 3 min 34 s in all · 1.50 GiB at the peak",
        "LoRA of rank 4 on tiny, 13,072 trained parameters",
        "SFT Loss on held-out answers, nats a token 3.214 0.954 ▼ 2.260 better",
        "Reward model Held-out pairs in the right order 51.2 % 91.4 % ▲ 40.2 points better",
        "PRO Held-out answers: better one ranked above 81.0 % 58.0 % ▼ 23.0 points worse",
        "PRO Mean reward of its own answers −0.213 0.644 ▲ 0.857 better",
        "Helpful 48.7 % 88.7 %",
        "Safe 54.1 % 95.5 %",
        "MMLU: accuracy 100 questions, 3 prompts cut to fit the model 25.0 % ± 4.3",
        "50.0 % ± 5.0",
        "Loss on held-out answers 3.214 0.954 1.021",
        "Base reward −1.42 (nothing) SFT reward +0.31 In Busan.",
        "Reward model 44.0 s",
    ):
        assert words in text, words


def test_it_says_better_and_worse_by_the_measure_not_by_the_sign():
    loss = Figure("sft", "loss", 3.0, 1.0, higher_is_better=False)
    assert loss.style == "good" and "▼ 2.000" in loss.show_change()
    loss = Figure("sft", "loss", 1.0, 3.0, higher_is_better=False)
    assert loss.style == "bad" and "▲ 2.000 <small>worse" in loss.show_change()
    share = Figure("pro", "share", 0.5, 0.75, higher_is_better=True, percent=True)
    assert share.style == "good" and "▲ 25.0 points <small>better" in share.show_change()
    unknown = Figure("pro", "share", None, 0.75, higher_is_better=True)
    assert (unknown.show(None), unknown.show_change(), unknown.style) == ("–", "–", "")


@pytest.mark.parametrize("after", [0.5, 0.50004, 0.49996])
def test_a_change_too_small_to_be_shown_is_none(after):
    figure = Figure("pro", "share", 0.5, after, higher_is_better=True)
    assert figure.style == "" and "unchanged" in figure.show_change()
    assert "▲" not in figure.show_change() and "▼" not in figure.show_change()


def test_numbers_as_written():
    assert decimals(-0.0001, 3) == "0.000" and decimals(-1.5, 2) == "−1.50"
    assert signed(-0.001) == "+0.00" and signed(-2) == "−2.00" and signed(0.314) == "+0.31"
    assert [duration(s) for s in (0.04, 119.94, 119.96, 179.7, 3599.6, 7199, 9000)] == [
        "0.0 s", "119.9 s", "2 min 00 s", "3 min 00 s", "60 min 00 s", "119 min 59 s", "2 h 30 min",
    ]  # fmt: skip


def test_nothing_is_fetched():
    """No address, no file, no script, no import: it opens the same on a machine without a net."""
    html = render(RESULTS, {"sft": HISTORY, "pro": HISTORY}, SAMPLES)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face|data:", html, re.I)
    found = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "use"} & set(found.tags)
    names = {name for _, name, _ in found.attributes}
    assert not {"src", "href", "srcset", "xlink:href", "action"} & names
    assert not any(name.startswith("on") for name in names)


def test_no_text_of_a_file_becomes_markup():
    """Every string anywhere in the files, replaced by markup one at a time, comes out as text."""
    histories = {"sft": HISTORY}
    plain = page()

    def strings(value, path=()):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from strings(inner, (*path, key))
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                yield from strings(inner, (*path, i))
        elif isinstance(value, str):
            yield path

    tried = 0
    for which, source in (("results", RESULTS), ("samples", SAMPLES)):
        for path in strings(source):
            changed = copy.deepcopy(source)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = EVIL
            found = page(**{"histories": histories, which: changed})
            assert found.tags.count("script") == 0 and "alert(1)" in found.text
            assert len(found.tags) == len(plain.tags), path
            tried += 1
    assert tried == 9


def test_no_key_of_a_file_becomes_markup():
    changed = copy.deepcopy(RESULTS)
    changed["stages"][EVIL] = {}
    changed["seconds"][EVIL] = 1.0
    changed["stages"]["evaluate"]["base"][EVIL] = {EVIL: 0.5}
    changed["config"][EVIL] = 1
    html = render(changed, {}, [])
    assert "<script" not in html and html.count("&lt;script&gt;") >= 5
    Page(html)


def test_korean_is_marked_as_such():
    html = render(RESULTS, {}, SAMPLES)
    assert '<html lang="en">' in html
    assert (
        "<p lang=ko>민호는 어디에 살아요?</p>" in html and "<p lang=ko>서울에 살아요.</p>" in html
    )
    assert "<p>Where does Mina live?</p>" in html and html.count("lang=ko>") == 2


@pytest.mark.parametrize("missing", ["sft", "reward", "pro", "evaluate"])
def test_a_stage_that_was_left_out_leaves_no_hole(missing):
    results = copy.deepcopy(RESULTS)
    del results["stages"][missing]
    del results["seconds"][missing]
    found = page(results)
    shown = {"sft": "3.214 0.954 ▼", "reward": "51.2 %", "pro": "81.0 %", "evaluate": "± 4.3"}
    for stage, words in shown.items():
        assert (words in found.text) == (stage != missing), stage
    assert "None" not in found.text


def test_a_stage_that_is_null_or_half_there():
    stages = {"sft": None, "reward": {"accuracy": {"overall": 0.9}}, "pro": {"reward_after": 0.5}}
    text = page({"name": "x", "stages": stages}, {}, []).text
    assert "Held-out pairs in the right order – 90.0 % –" in text
    assert "Mean reward of its own answers – 0.500 –" in text
    assert "Overall – 90.0 %" in text and "Helpful" not in text and "None" not in text


def test_a_run_without_any_stage_is_a_heading():
    found = page({"name": "empty", "stages": {}}, {}, [])
    assert "empty" in found.text and "h2" not in found.tags and "table" not in found.tags


def test_curves_smooth_a_long_history_and_skip_what_was_not_finite():
    long = [{"step": s, "loss": 1.0 + s % 2} for s in range(30)]
    gaps = [{"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}, {"loss": 3.0}]
    html = render(RESULTS, {"sft": long + gaps, "reward": gaps, "pro": HISTORY}, [])
    assert html.count("<polyline") == 4 and html.count('<polyline class="raw"') == 1
    assert "SFT: loss" in html and "PRO: loss" in html and "Reward model: loss" not in html
    assert "nan" not in html.partition("<body>")[2]


def test_figures_come_in_the_order_of_the_stages():
    assert [f.stage for f in figures(RESULTS["stages"])] == ["sft", "reward", "pro", "pro"]


def test_write_report(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["seconds"]["report"] = 3.0
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "samples.json").write_text(json.dumps(SAMPLES))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "history.json").write_text(json.dumps(HISTORY))
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text() == render(results, {"sft": HISTORY, "reward": [], "pro": []}, SAMPLES)
    path.write_text("old")
    write_report(tmp_path)
    assert path.read_text() != "old"
    assert {p.name for p in tmp_path.iterdir()} == {
        "results.json", "samples.json", "sft", "report.html",
    }  # fmt: skip


def test_nothing_is_shown_of_stages_that_are_not_in_the_results(tmp_path):
    """Their files are of stages that were removed, or are under way again."""
    results = copy.deepcopy(RESULTS)
    del results["stages"]["pro"]
    (tmp_path / "samples.json").write_text(json.dumps(SAMPLES))
    for stage in ("sft", "pro"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "history.json").write_text(json.dumps(HISTORY))
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = write_report(tmp_path).read_text()
    assert "SFT: loss" in text and "PRO: loss" not in text and "In Busan." not in text
    results["seconds"]["report"] = 3.0
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = write_report(tmp_path).read_text()
    assert "In Busan." in text and "Anything else?" not in text


def test_bad_folders_are_told_and_leave_no_report(tmp_path):
    with pytest.raises(InputError, match="results.json: expected a run's results with 'stages'"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"stages": []}')
    with pytest.raises(InputError, match="expected a run's results with 'stages'"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"stages": {')
    with pytest.raises(InputError, match="results.json: expected JSON .*: run its stage again"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, "seconds": {"report": 1.0}}))
    (tmp_path / "samples.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match="samples.json: expected JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
