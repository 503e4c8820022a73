"""The whole workflow on a tiny model: figures, skipping, single stages, changed settings."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fusedpeft.errors import InputError
from fusedpeft.train import Measure
from fusedpeft.workflow.config import load_config
from fusedpeft.workflow.run import run


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.safetensors"))
        if "checkpoint" not in str(p)
    }


@pytest.fixture
def quiet():
    from rich.console import Console

    return Console(file=open("/dev/null", "w"))


def test_everything_and_then_nothing_to_do(write_config, tmp_path, quiet, base, monkeypatch):
    config = load_config(write_config())
    units, rewards = [], Measure.rewards
    monkeypatch.setattr(Measure, "rewards", lambda *args: units.append(args[-1]) or rewards(*args))
    results = run(config, console=quiet)
    assert len(units) == 5 and all(torch.equal(unit, units[0]) for unit in units)
    out = tmp_path / "run"
    assert json.loads((out / "results.json").read_text("utf-8")) == results
    stages = results["stages"]
    assert stages["sft"]["eval_loss_after"] < stages["sft"]["eval_loss_before"]
    assert set(stages["reward"]["accuracy"]) == {"overall", "helpful", "safe"}
    assert stages["reward"]["accuracy"]["overall"] >= 0.9
    assert stages["pro"]["ranking_accuracy_after"] >= stages["pro"]["ranking_accuracy_before"]
    assert {"reward_before", "reward_after"} <= set(stages["pro"])
    assert set(results["seconds"]) == {"sft", "reward", "pro", "report"}
    assert results["peak_memory_bytes"] > 1 << 20
    samples = json.loads((out / "samples.json").read_text("utf-8"))
    assert len(samples) == 2 and set(samples[0]["answers"]) == {"base", "sft", "pro"}
    assert set(samples[0]["rewards"]) == {"base", "sft", "pro"}
    page = (out / "report.html").read_text("utf-8")
    assert "SFT: loss" in page and "tell me of the" in page

    before = digests(out)
    assert run(config, console=quiet) == results  # complete: skipped
    assert digests(out) == before

    # What it made is PEFT's format, and the reward adapter too.
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(6, 16)[None]
    plain = model(ids).logits
    for stage in ("sft", "reward", "pro"):
        adapted = PeftModel.from_pretrained(model, out / stage / "adapter")
        assert not torch.equal(adapted(ids).logits, plain)
        model = adapted.unload()

    # Begun again, nothing of the stages after it is shown any more.
    results = run(config, ["sft"], fresh=True, console=quiet)
    assert set(results["stages"]) == {"sft"} and not (out / "samples.json").exists()
    page = (out / "report.html").read_text("utf-8")
    assert "SFT: loss" in page and "PRO: loss" not in page and "side by side" not in page


@pytest.mark.parametrize("stage", ["sft", "reward", "pro"])
def test_a_training_that_went_astray_is_no_result(write_config, sections, tmp_path, quiet, stage):
    astray = {**sections[stage], "learning_rate": 1e30, "max_steps": 3, "logging_steps": 1}
    sections = dict.fromkeys(("sft", "reward", "pro")) | {stage: astray}
    with pytest.raises(InputError, match=f"{stage}: .* is nan after training: .*lower learning_ra"):
        run(load_config(write_config(**sections)), [stage], console=quiet)
    folder = tmp_path / "run" / stage
    assert not (folder / "result.json").exists() and not (folder / "adapter").exists()
    history = json.loads((folder / "history.json").read_text())
    assert [entry["loss"] for entry in history if "loss" in entry][-1] is None  # and not 0


@pytest.mark.parametrize("scores", ["accuracy", "ranking_accuracy"])
def test_scores_that_are_not_finite_are_no_result(
    write_config, tmp_path, quiet, monkeypatch, scores
):
    broken = {"overall": float("nan")} if scores == "accuracy" else float("nan")
    method = "reward_accuracy" if scores == "accuracy" else scores
    monkeypatch.setattr(Measure, method, lambda *args: broken)
    stage = "reward" if scores == "accuracy" else "pro"
    left_out = {"sft": None, {"reward": "pro", "pro": "reward"}[stage]: None}
    with pytest.raises(InputError, match=f"{stage}: (overall|ranking_accuracy) is nan after train"):
        run(load_config(write_config(**left_out), [f"{stage}.max_steps=1"]), console=quiet)
    assert not (tmp_path / "run" / stage / "result.json").exists()


@pytest.mark.parametrize(
    "setting, message",
    [
        ("pro.lr_scheduler_type=wavy", "pro: .*wavy"),
        ("pro.lr_scheduler_type=cosine_with_min_lr", "pro: lr_scheduler_type: .*, got cosine_with"),
        ("reward.lr_scheduler_type=warmup_stable_decay", "reward: lr_scheduler_type: .*num_decay"),
        ("pro.max_new_tokens=64", "pro.max_new_tokens: expected less than the 64 tokens"),
        ("report.max_new_tokens=64", "report.max_new_tokens: expected less than the 64 tokens"),
        ("evaluate={tasks: [mmlu], data: .}", "evaluate.data: there is no file .*mmlu/dev.jsonl"),
    ],
)
def test_what_a_later_stage_cannot_use_is_told_first(
    write_config, tmp_path, quiet, setting, message
):
    with pytest.raises(InputError, match=message):
        run(load_config(write_config(), [setting]), console=quiet)
    assert not (tmp_path / "run").exists()


def test_the_same_configuration_gives_the_same_weights(write_config, tmp_path, quiet):
    run(load_config(write_config()), console=quiet)
    run(load_config(write_config(), [f"output={tmp_path / 'again'}"]), console=quiet)
    assert digests(tmp_path / "run") == digests(tmp_path / "again")


def test_stages_alone_and_in_order(write_config, tmp_path, quiet):
    config = load_config(write_config())
    with pytest.raises(InputError, match="reward needs the stage sft, which is not complete"):
        run(config, ["reward"], console=quiet)
    assert not (tmp_path / "run").exists()  # refused before anything was written
    results = run(config, ["sft"], console=quiet)
    assert set(results["stages"]) == {"sft"}
    results = run(config, ["reward"], console=quiet)
    assert set(results["stages"]) == {"sft", "reward"}
    with pytest.raises(InputError, match="--stage: expected one of .*got 'dpo'"):
        run(config, ["dpo"], console=quiet)
    with pytest.raises(InputError, match="no section 'evaluate'"):
        run(config, ["evaluate"], console=quiet)


def test_changed_settings_are_not_mixed_with_old_results(write_config, tmp_path, quiet, data):
    path = write_config()
    run(load_config(path), ["sft", "reward"], console=quiet)
    changed = load_config(path, ["sft.learning_rate=0.02"])
    with pytest.raises(InputError, match=r"learning_rate 0.01 \(now 0.02\).*--fresh"):
        run(changed, console=quiet)
    before = digests(tmp_path / "run")
    run(changed, ["sft"], fresh=True, console=quiet)
    after = digests(tmp_path / "run")
    assert (
        after["sft/adapter/adapter_model.safetensors"]
        != before["sft/adapter/adapter_model.safetensors"]
    )
    assert not (tmp_path / "run" / "reward").exists()  # it was made from the old one
    with (data / "lists.jsonl").open("a") as file:
        file.write('{"prompt": "x", "responses": ["a", "b"], "rewards": [1, 0]}\n')
    with pytest.raises(InputError, match="made with another .*lists.jsonl"):
        run(changed, console=quiet)


def test_rewards_of_the_judge_where_the_lists_have_none(write_config, data, quiet):
    lists = data / "lists.jsonl"
    rows = [json.loads(line) for line in lists.read_text("utf-8").splitlines()]
    bare = [{k: v for k, v in row.items() if k != "rewards"} for row in rows]
    lists.write_text("".join(json.dumps(r) + "\n" for r in bare))
    results = run(load_config(write_config()), console=quiet)
    assert results["stages"]["pro"]["ranking_accuracy_after"] > 0.5
    with pytest.raises(InputError, match="no rewards and the configuration has no reward stage"):
        run(load_config(write_config(reward=None, name="b", output=None)), console=quiet)
    lists.write_text("".join(json.dumps(r) + "\n" for r in bare[:5] + rows[5:]))
    with pytest.raises(InputError, match="5 of 36 rows have no rewards"):
        run(load_config(write_config(name="b", output=None)), console=quiet)


def test_without_sft_the_other_stages_start_from_the_base(write_config, quiet):
    results = run(load_config(write_config(sft=None)), console=quiet)
    assert set(results["stages"]) == {"reward", "pro"}


def test_evaluation_compares_the_models(write_config, tmp_path, quiet):
    import bz2

    folder = tmp_path / "tasks" / "hellaswag"
    folder.mkdir(parents=True)
    task = "tell me of the cat\n0\nthe cat is here.\ngo\nno\naway\n" * 4
    (folder / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(task.encode()))
    evaluate = {"tasks": ["hellaswag"], "data": str(folder.parent), "limit": 3}
    results = run(load_config(write_config(evaluate=evaluate)), console=quiet)
    scores = results["stages"]["evaluate"]
    assert set(scores) == {"base", "sft", "pro"}
    assert scores["base"]["hellaswag"]["n"] == 3
    assert scores["sft"]["eval_loss"] == pytest.approx(results["stages"]["sft"]["eval_loss_after"])
    assert scores["base"]["eval_loss"] == pytest.approx(
        results["stages"]["sft"]["eval_loss_before"]
    )
    # Other questions under the same name are another evaluation.
    (folder / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(task.encode() * 2))
    with pytest.raises(InputError, match="evaluate was made with another .*hellaswag_val_full"):
        run(load_config(write_config(evaluate=evaluate)), console=quiet)


def test_held_out_prompts_are_trained_on_in_no_stage(write_config, data):
    from fusedpeft.workflow.data import load_stages, prompt_key

    config = load_config(write_config(), ["pro.holdout=0.5"])
    found = load_stages(config)
    held = {prompt_key(r) for rows in found.values() for r in rows.held}
    for rows in found.values():
        assert not held & {prompt_key(r) for r in rows.train}
    assert found["sft"].left_out > 0  # PRO holds out more than SFT does
    config = load_config(write_config(), ["pro.holdout=0.99"])
    with pytest.raises(InputError, match="no row is left to train on of 36"):
        load_stages(config)


def test_real_preference_data_shortened(shared_data, tmp_path, quiet):
    """examples/hh.yaml, the whole way with a few steps a stage."""
    path = Path(__file__).parents[2] / "examples" / "hh.yaml"
    config = load_config(path, [f"output={tmp_path / 'hh'}", "evaluate.limit=2"], shorten=4)
    results = run(config, console=quiet)
    stages = results["stages"]
    assert set(stages) == {"sft", "reward", "pro", "evaluate"}
    assert stages["sft"]["eval_loss_after"] < stages["sft"]["eval_loss_before"]
    assert set(stages["reward"]["accuracy"]) == {"overall", "safe"}
    assert set(stages["evaluate"]["pro"]) == {"eval_loss", "mmlu", "hellaswag"}
    assert (tmp_path / "hh-short" / "report.html").is_file()
