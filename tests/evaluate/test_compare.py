"""The comparison: rows, what is trained, the page, and the published counts of parameters."""

import gzip
import json
import weakref
from pathlib import Path

import pytest
import torch
import transformers

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.evaluate import compare as module
from fusedpeft.evaluate import compare_state
from fusedpeft.evaluate.compare import Measured, Settings, adapt, compare, load_model, methods_of
from fusedpeft.evaluate.compare_report import write_page
from fusedpeft.evaluate.compare_tasks import load_rows

BASE = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "base"


def reviews(path, count=40):
    """Half praise one word, half another; points in between say nothing."""
    rows = [
        {
            "review": f"{'좋은 영화' if i % 2 else '지루한 영화'} {i}",
            "rating": "10" if i % 2 else "1",
        }
        for i in range(count)
    ]
    rows += [{"review": "그저 그런", "rating": "6"}, rows[0], {"review": "긴" * 200, "rating": "1"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def facts(path, count=12):
    lines = [
        f"name : N{i} | area : A{i} | family friendly : no||N{i} is in A{i} {end}"
        for i in range(count)
        for end in ("now", "today")
    ]
    path.write_text("\n".join(lines))
    return path


def settings(task, data, **more):
    return Settings(
        base=str(BASE), task=task, data=str(data), steps=2, batch_size=4, train_rows=8, tune_rows=4,
        test_rows=8, **more,
    )  # fmt: skip


def rows_of(made):
    counts = (made.train_rows, made.tune_rows, made.test_rows)
    return load_rows(made.task, Path(made.data), counts, made.seed)


def test_reviews(tmp_path):
    rows = load_rows("nsmc", reviews(tmp_path / "r.jsonl.gz"), (16, 8, 8), 0)
    texts = [row.text for part in (rows.train, rows.tune, rows.test) for row in part]
    assert len(texts) == len(set(texts)) == 32 and not any("그저" in t for t in texts)
    for part in (rows.train, rows.tune, rows.test):
        assert sum(row.label for row in part) * 2 == len(part)
        assert all(row.label == ("좋은" in row.text) for row in part)
    again = load_rows("nsmc", tmp_path / "r.jsonl.gz", (16, 8, 8), 0)
    assert again == rows
    fewer = load_rows("nsmc", tmp_path / "r.jsonl.gz", (4, 8, 8), 0)
    assert (fewer.tune, fewer.test) == (rows.tune, rows.test)


def test_facts(tmp_path):
    rows = load_rows("e2e", facts(tmp_path / "f.txt"), (8, 4, 4), 0)
    parts = [{row.text for row in part} for part in (rows.train, rows.tune, rows.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    row = rows.test[0]
    assert row.values == tuple(v.strip().lower() for v in row.answer.split()[::3][:2])


def test_bad_rows(tmp_path):
    path = reviews(tmp_path / "r.jsonl.gz", 6)
    for task, data, message in (
        ("nsmc", tmp_path / "no", "there is none at"),
        ("mnli", path, "--task: expected nsmc or e2e, got 'mnli'"),
        ("e2e", path, r"expected rows of e2e \(KeyError"),
        ("nsmc", path, "expected more than 12 rows, got 6"),
    ):
        with pytest.raises(InputError, match=message):
            load_rows(task, data, (8, 4, 8), 0)
    (tmp_path / "cut.gz").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cut.gz: cannot be read \(Compressed file ended"):
        load_rows("nsmc", tmp_path / "cut.gz", (8, 4, 8), 0)
    for row in ({"review": "a", "rating": "good"}, {"review": 5, "rating": 1}):
        (tmp_path / "bad").write_text(json.dumps(row))
        with pytest.raises(InputError, match=r"bad: expected rows of nsmc \((Value|Attribute)Err"):
            load_rows("nsmc", tmp_path / "bad", (8, 4, 8), 0)
    (tmp_path / "deep").write_text("[" * 10**5)
    with pytest.raises(InputError, match=r"deep: expected rows of nsmc \(RecursionError"):
        load_rows("nsmc", tmp_path / "deep", (8, 4, 8), 0)


def test_blank_lines_are_skipped(tmp_path):
    lines = [json.dumps({"review": f"a\u2028{i}", "rating": 1 + 9 * (i % 2)}, ensure_ascii=False)
             for i in range(8)]  # fmt: skip
    for name, text in (("r", "\n".join(lines)), ("blank", "\n \n" + "\n\n".join(lines) + "\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = [load_rows("nsmc", tmp_path / name, (4, 2, 2), 0) for name in ("r", "blank")]
    assert rows[0] == rows[1]


def test_out_is_a_folder(tmp_path):
    made = settings("nsmc", reviews(tmp_path / "r.jsonl.gz"))
    with pytest.raises(InputError, match="compare --out: expected a folder, got .*r.jsonl.gz"):
        compare(made, tmp_path / "r.jsonl.gz")


@pytest.mark.parametrize("task", ["nsmc", "e2e"])
def test_every_method_trains_and_is_measured(task, tmp_path, monkeypatch):
    make = {"nsmc": reviews, "e2e": facts}[task]
    text = tmp_path / "text.txt"
    text.write_text("one line that the base knows\nand another\n")
    made = settings(task, make(tmp_path / "data.gz" if task == "nsmc" else tmp_path / "d.txt"))
    made = Settings(**{**vars(made), "text": str(text)})
    monkeypatch.setattr(module, "FACTORS", (1.0,))
    found = {"settings": vars(made), "methods": {}}
    for name in methods_of(task):
        result = found["methods"][name] = module.run_method(made, name)
        assert result["trainable"] > 0 and result["stored_bytes"] > 0
        assert result["step_ms"] > 0 and result["latency_ms"] > 0
        assert result["text_before"] > 0 and result["text_after"] > 0
        assert result["quality"]["loss"] > 0
    trained = {name: r["trainable"] for name, r in found["methods"].items()}
    stored = {name: r["stored_bytes"] for name, r in found["methods"].items()}
    assert trained["full"] == max(trained.values()) == found["methods"]["full"]["parameters"]
    assert stored["full"] == max(stored.values())
    assert ("feature-based" in trained) == (task == "nsmc")
    page = write_page(found, tmp_path / "compare.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in trained)
    assert page.count("<figure>") == (7 if task == "nsmc" else 8)


def test_training_learns(tmp_path):
    made = settings("nsmc", reviews(tmp_path / "r.jsonl.gz", 64))
    made = Settings(**{**vars(made), "steps": 30, "train_rows": 32, "test_rows": 16})
    measured = Measured(made, "LoRA", rows_of(made))
    measured.train(1e-2)
    assert measured.quality("test")["accuracy"] > 0.9


def test_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    made = settings("nsmc", reviews(tmp_path / "r.jsonl.gz"))
    out = tmp_path / "out"
    result = {
        "quality": {"accuracy": 0.5, "loss": 0.7}, "rate": 1e-2, "tried": [], "trainable": 1,
        "parameters": 2, "step_ms": 1.0, "latency_ms": 1.0, "stored_bytes": 3, "peak_bytes": 4,
        "text_before": None, "text_after": None,
    }  # fmt: skip
    out.mkdir()
    kept = {"settings": compare_state.identity(made), "methods": {"LoRA": result}}
    (out / "compare.json").write_text(json.dumps(kept))
    assert compare(made, out, ["LoRA"])["methods"] == {"LoRA": result}
    found = compare(made, out, ["prompt"])  # in a process of its own
    assert list(found["methods"]) == ["LoRA", "prompt"]
    assert json.loads((out / "compare.json").read_text()) == found
    assert {p.name for p in out.iterdir()} == {"compare.json", "compare.html"}
    with pytest.raises(InputError, match="--method: expected one of feature-based, .* got 'IA3'"):
        compare(made, out, ["IA3"])
    with pytest.raises(InputError, match="BASE: expected a folder with a model"):
        compare(Settings(**{**vars(made), "base": str(tmp_path)}), out)


def test_results_of_other_settings_and_files_stay(tmp_path):
    data, out = reviews(tmp_path / "r.jsonl.gz"), tmp_path / "out"
    made = settings("nsmc", data)
    out.mkdir()
    text = json.dumps({"settings": compare_state.identity(made), "methods": {"LoRA": {}}})
    (out / "compare.json").write_text(text)
    other = Settings(**{**vars(made), "seed": 1, "steps": 3})
    line = r"compare --out: .*out holds results of steps 2 \(now 3\), seed 0 \(now 1\): name ano"
    with pytest.raises(InputError, match=line):
        compare(other, out, ["prompt"])
    reviews(data, 44)
    with pytest.raises(InputError, match="out holds results of another data: name another folder"):
        compare(made, out, ["LoRA"])
    assert (out / "compare.json").read_text() == text
    for damage in (text[:-9], "[]", '{"settings": {}}', "[" * 10**5):
        (out / "compare.json").write_text(damage)
        with pytest.raises(InputError, match="compare.json is damaged .*: remove it or name") as e:
            compare(made, out, ["LoRA"])
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("task", ["nsmc", "e2e"])
def test_a_base_without_weights_is_one_line(tmp_path, task):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((BASE / name).read_bytes())
    data = {"nsmc": reviews, "e2e": facts}[task](tmp_path / ("r.gz" if task == "nsmc" else "f"))
    made = Settings(**{**vars(settings(task, data)), "base": str(base)})
    for damage in (None, b"half"):
        if damage:
            (base / "model.safetensors").write_bytes(damage)
        for read in (load_model, lambda made: module.run_method(made, "LoRA")):
            with pytest.raises(InputError, match="BASE: .*base: no model can be read") as error:
                read(made)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["LoRA", "feature-based", "full"])
def test_one_model_at_a_time_and_the_best_one_is_measured(tmp_path, monkeypatch, name):
    """Another one beside it would be in the peak of memory."""
    alive, tested = weakref.WeakSet(), []

    class Watched(Measured):
        def __init__(self, *args):
            assert not alive, "the model of the rate before is still there"
            super().__init__(*args)
            alive.add(self.model)

        def quality(self, part):
            found = super().quality(part)
            tested.append((part, super().quality("test")))
            return found

    monkeypatch.setattr(module, "Measured", Watched)
    monkeypatch.setattr(module, "FACTORS", (1e-3, 3.0, 1e-2))
    made = settings("nsmc", reviews(tmp_path / "r.jsonl.gz"))
    made = Settings(**{**vars(made), "steps": 8})
    result = module.run_method(made, name)
    losses = [t["loss"] for t in result["tried"]]
    best = losses.index(min(losses))
    assert result["rate"] == result["tried"][best]["rate"]
    assert [part for part, _ in tested] == ["tune"] * 3 + ["test"]
    assert result["quality"] == tested[best][1] and len(set(losses)) == 3


def test_answers_are_greedy_whatever_the_base_says(tmp_path):
    made = settings("e2e", facts(tmp_path / "f"))
    measured = Measured(made, "LoRA", rows_of(made))
    measured.train(1e-2)
    want = measured.coverage()
    measured.model.generation_config.repetition_penalty = 9.0
    assert measured.coverage() == want


def test_the_published_counts():
    """LoRA r 8 on q, v of RoBERTa-base (Hu et al. 2021, table 2): 0.3 M, 294,912; a prefix
    L · 2 · d · P; a prompt P · d."""
    with torch.device("meta"):
        roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=50265))
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    fp.attach(roberta, fp.LoRA(rank=8, targets=["query", "value"]))
    assert fp.trainable_parameters(roberta) == 294_912
    fp.attach(gpt2, fp.PrefixTuning(length=10), "prefix")
    assert fp.trainable_parameters(gpt2) == 12 * 2 * 768 * 10
    fp.attach(gpt2, fp.PromptTuning(length=20, init="vocab"), "prompt")
    assert fp.trainable_parameters(gpt2) == 20 * 768


def test_a_head_trains_with_every_method():
    for name in methods_of("nsmc"):
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_labels=2,
        )  # fmt: skip
        model = transformers.LlamaForSequenceClassification(config)
        adapt(model, name, "nsmc")
        assert any(p.requires_grad for p in model.score.parameters()), name
