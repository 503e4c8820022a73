"""Pretraining: it learns, an interrupted run ends in the same bits, and bad input is named."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedpeft.data.quickstart_asks import people
from fusedpeft.data.quickstart_text import document
from fusedpeft.errors import InputError
from fusedpeft.train import pretrain as p

SHAPE = p.Shape(
    vocab_size=320,
    hidden_size=32,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate_size=64,
    max_positions=64,
)
SMALL = {
    "shape": SHAPE,
    "steps": 24,
    "batch_size": 8,
    "block_tokens": 32,
    "learning_rate": 1e-2,
    "save_steps": 5,
}
EVERYONE = people(0)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(document(EVERYONE, rng) for _ in range(300)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    """A run from start to end."""
    out = tmp_path_factory.mktemp("whole") / "base"
    p.pretrain(text, out, **SMALL)
    return out


class Stop(BaseException):
    """What a kill looks like from inside."""


def files(folder: Path) -> dict[str, bytes]:
    """All that a reader of the model sees; pretrain.json has the seconds of this run."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "pretrain.json"}


def test_the_loss_falls_on_documents_held_out(whole):
    result = json.loads((whole / "pretrain.json").read_text())
    assert result["eval_loss_after"] < result["eval_loss_before"] - 1.0
    losses = [point["loss"] for point in result["history"]]
    assert losses[-1] < losses[0] - 1.0
    assert [point["step"] for point in result["history"]] == list(range(1, 25))
    assert (result["train_documents"], result["held_out_documents"]) == (294, 6)


def test_the_folder_loads_as_any_other_model(whole, text):
    model = AutoModelForCausalLM.from_pretrained(whole)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert model.dtype == torch.float32 and not model.training
    assert model.config.vocab_size == len(tokenizer) == 320
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    held = text.read_text(encoding="utf-8").splitlines()[::50]
    loss = p.evaluate_loss(model, p._encode(tokenizer, held), 32)
    assert loss == json.loads((whole / "pretrain.json").read_text())["eval_loss_after"]


@pytest.mark.parametrize(("at", "resumes"), [(3, 0), (5, 5), (17, 15), (23, 20)])
def test_an_interrupted_run_ends_in_the_same_bits(text, whole, tmp_path, monkeypatch, at, resumes):
    batch, steps = p._batch, []

    def stop(stream, seed, step, *sizes):
        steps.append(step)
        if step == at:
            raise Stop
        return batch(stream, seed, step, *sizes)

    out = tmp_path / "base"
    monkeypatch.setattr(p, "_batch", stop)
    with pytest.raises(Stop):
        p.pretrain(text, out, **SMALL)
    assert not out.exists()

    at = None
    steps.clear()
    result = p.pretrain(text, out, **SMALL)
    assert steps == list(range(resumes, 24))
    assert files(out) == files(whole)
    expected = json.loads((whole / "pretrain.json").read_text())
    for key in ("history", "eval_loss_before", "eval_loss_after", "settings"):
        assert result[key] == expected[key], key
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base"]


def test_killed_while_the_model_is_written(text, whole, tmp_path, monkeypatch):
    out = tmp_path / "base"
    with monkeypatch.context() as patch:
        patch.setattr(p.LlamaForCausalLM, "save_pretrained", half_written)
        with pytest.raises(Stop):
            p.pretrain(text, out, **SMALL)
    assert not out.exists() and (tmp_path / "base.partial" / "config.json").is_file()
    p.pretrain(text, out, **SMALL)
    assert files(out) == files(whole)


def half_written(model, folder: Path) -> None:
    (folder / "config.json").write_text("{")
    raise Stop


def test_what_is_complete_is_left_as_it_is(text, whole, tmp_path, monkeypatch):
    before = files(whole)
    (whole / "pretrain_state.pt").write_bytes(b"killed between the rename and the removal")
    monkeypatch.setattr(p, "_batch", lambda *_: pytest.fail("trained again"))
    result = p.pretrain(text, whole, **SMALL)
    assert files(whole) == before
    assert result == json.loads((whole / "pretrain.json").read_text())

    with pytest.raises(InputError, match="holds a model of other text or settings"):
        p.pretrain(text, whole, **SMALL | {"seed": 1})
    other = tmp_path / text.name
    other.write_text(text.read_text(encoding="utf-8") + "\none more", encoding="utf-8")
    with pytest.raises(InputError, match="holds a model of other text or settings"):
        p.pretrain(other, whole, **SMALL)
    assert files(whole) == before


def test_a_state_of_other_settings_is_not_continued(text, tmp_path, monkeypatch):
    def stop(path, state):
        save(path, state)
        raise Stop

    save = p._save_state
    with monkeypatch.context() as patch:
        patch.setattr(p, "_save_state", stop)
        with pytest.raises(Stop):
            p.pretrain(text, tmp_path / "base", **SMALL)
    with pytest.raises(InputError, match=r"base\.partial belongs to a run of other text or setti"):
        p.pretrain(text, tmp_path / "base", **SMALL | {"learning_rate": 1e-3})


def test_another_seed_is_another_model(text, whole, tmp_path):
    p.pretrain(text, tmp_path / "base", **SMALL | {"seed": 1})
    one, two = (load_file(f / "model.safetensors") for f in (whole, tmp_path / "base"))
    assert one.keys() == two.keys()
    assert all(not torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"save_steps": 0}, "save_steps: expected a positive number, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a positive number, got nan"),
        ({"block_tokens": 65}, r"block_tokens: expected at most max_positions \(64\), got 65"),
        ({"shape": p.Shape(vocab_size=260)}, "vocab_size: expected at least 261 .*, got 260"),
        ({"shape": p.Shape(layers=0)}, "layers: expected a positive number, got 0"),
        ({"shape": p.Shape(heads=3)}, r"expected hidden_size \(128\) to divide by heads \(3\)"),
        ({"shape": p.Shape(kv_heads=3)}, r"heads \(4\) and heads by kv_heads \(3\)"),
    ],
)
def test_settings_that_cannot_be(text, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        p.pretrain(text, tmp_path / "base", **SMALL | change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.txt: expected a UTF-8 text file"),
        (b"good\n\xff\xfe\n", "text.txt: expected a UTF-8 text file"),
        (b"", r"text.txt: expected at least 2 documents \(lines\), got 0"),
        (b"one\n \n\n", r"text.txt: expected at least 2 documents \(lines\), got 1"),
        (b"a\nb\nc\n", r"the text has \d tokens: expected more than block_tokens \(32\)"),
        (b"x\n" * 50, r"the held-out text has 2 tokens: expected more than block_tokens \(32\)"),
    ],
)
def test_text_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        p.pretrain(path, tmp_path / "base", **SMALL)
    assert not (tmp_path / "base").exists() and not (tmp_path / "base.partial").exists()


def test_a_folder_that_is_not_ours_is_not_touched(text, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="already holds something that is not ours"):
        p.pretrain(text, tmp_path, **SMALL)
    (tmp_path / "pretrain.json").write_text('{"settings": ')
    with pytest.raises(InputError, match=r"pretrain\.json is damaged"):
        p.pretrain(text, tmp_path, **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make this folder"):
        p.pretrain(text, tmp_path / "file" / "base", **SMALL)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+: .*learning_rate"):
        p.pretrain(text, tmp_path / "base", **SMALL | {"learning_rate": 1e30})
    assert not (tmp_path / "base").exists()


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    rates = [p._schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
