"""A run's folder: what it is compared by, what a kill leaves behind, one process at a time."""

import json
import os
import subprocess
import sys

import pytest

from fusedpeft.errors import InputError
from fusedpeft.files import write_json
from fusedpeft.workflow import state
from fusedpeft.workflow.state import Stage, locked, read_json

IDENTITY = {
    "settings": {"learning_rate": 0.001, "seed": 0, "max_steps": 9},
    "inputs": {"sft.jsonl": "aa", "base": "bb"},
    "after": {"sft": "cc"},
}


def changed(**parts):
    return {part: values | parts.get(part, {}) for part, values in IDENTITY.items()}


def test_json_both_ways(tmp_path):
    path = tmp_path / "x.json"
    value = {"loss": [1.5, None, True], "이름": "값", "nested": {"n": 3}}
    write_json(path, value)
    assert read_json(path) == value and "이름" in path.read_text(encoding="utf-8")
    assert read_json(tmp_path / "none.json") is None


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "history.json"
    nan, inf = float("nan"), float("inf")
    write_json(path, [{"step": 1, "loss": nan}, {"norms": (1.0, -inf, inf)}, nan])
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == [{"step": 1, "loss": None}, {"norms": [1.0, None, None]}, None]


@pytest.mark.parametrize("damage", [b"", b'{"a": ', b"\xff\xfe"])
def test_a_damaged_file_is_named_with_the_fix(tmp_path, damage):
    path = tmp_path / "result.json"
    path.write_bytes(damage)
    with pytest.raises(InputError, match=r"result.json is damaged .*: start the stage again with"):
        read_json(path)


@pytest.mark.parametrize("found", [{}, [], 5, {"result": {}}])
def test_a_result_of_another_form_is_damaged(tmp_path, found):
    stage = Stage(tmp_path, "sft", IDENTITY)
    write_json(stage.dir / "result.json", found)
    with pytest.raises(InputError, match="result.json is damaged .expected peak_memory_bytes, re"):
        stage.result()


@pytest.mark.parametrize("found", [[], 5, {"settings": 3}])
def test_a_configuration_of_another_form_is_damaged(tmp_path, found):
    stage = Stage(tmp_path, "sft", IDENTITY)
    write_json(stage.dir / "config.json", found)
    with pytest.raises(InputError, match="config.json is damaged .expected settings, inputs and"):
        stage.check()


def test_a_stage_is_complete_with_its_result_and_only_then(tmp_path):
    stage = Stage(tmp_path, "sft", IDENTITY)
    assert stage.result() is None
    stage.check()  # nothing there yet: nothing to differ from
    assert not stage.dir.exists()
    stage.begin()
    assert read_json(stage.dir / "config.json") == IDENTITY and stage.result() is None
    found = {"result": {"loss": 1.0}, "seconds": 1.0, "peak_memory_bytes": 1}
    write_json(stage.dir / "result.json", found)
    assert stage.result() == found
    Stage(tmp_path, "sft", json.loads(json.dumps(IDENTITY))).begin()


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (changed(settings={"learning_rate": 0.003}), "learning_rate 0.001 (now 0.003)"),
        (changed(settings={"packing": True}), "packing None (now True)"),
        (changed(settings={"seed": 0.0}), "seed 0 (now 0.0)"),
        (changed(inputs={"sft.jsonl": "zz"}), "another sft.jsonl"),
        (changed(after={"sft": "zz"}), "another sft stage before it"),
        (
            changed(settings={"seed": 1, "max_steps": 8}, inputs={"base": "zz"}),
            "max_steps 9 (now 8), seed 0 (now 1), another base",
        ),
        (
            changed(settings={"seed": 1, "max_steps": 8, "x": 1}, inputs={"base": "zz"}),
            "max_steps 9 (now 8), seed 0 (now 1), x None (now 1) and more",
        ),
    ],
)
def test_a_folder_made_otherwise_is_refused_with_the_difference(tmp_path, now, told):
    Stage(tmp_path, "pro", IDENTITY).begin()
    stage = Stage(tmp_path, "pro", now)
    for step in (stage.check, stage.begin):
        with pytest.raises(InputError) as error:
            step()
        assert str(error.value) == (
            f"{tmp_path / 'pro'} was made with {told}: start it again with --fresh, or give the "
            f"run another name"
        )
    assert read_json(tmp_path / "pro" / "config.json") == IDENTITY


def test_clear(tmp_path):
    stage = Stage(tmp_path, "sft", IDENTITY)
    stage.clear()  # nothing there
    stage.begin()
    (stage.dir / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / ".sft.trash").mkdir()  # a kill between the two steps of an earlier clear
    (tmp_path / ".sft.trash" / "old").write_text("x")
    stage.clear()
    assert list(tmp_path.iterdir()) == []
    Stage(tmp_path, "sft", changed(settings={"seed": 5})).begin()


def test_a_kill_while_clearing_leaves_no_half_stage(tmp_path, monkeypatch):
    """Checkpoints must never outlive the settings they were made with."""
    stage = Stage(tmp_path, "sft", IDENTITY)
    stage.begin()
    (stage.dir / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    real = state.shutil.rmtree

    def killed(path, **more):
        if path.name == ".sft.trash" and path.is_dir():
            raise KeyboardInterrupt
        real(path, **more)

    monkeypatch.setattr(state.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.clear()
    assert not stage.dir.exists()


def checkpoint(stage, step, seconds=None):
    path = stage.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text("x")
    if seconds is not None:
        write_json(path / "complete.json", {"seconds": seconds})
    return path


def test_the_last_whole_checkpoint_counts_and_cut_off_ones_go(tmp_path):
    stage = Stage(tmp_path, "sft", IDENTITY)
    assert stage.last_checkpoint() == (None, 0.0)
    checkpoint(stage, 9, 3.0)
    kept = checkpoint(stage, 10, 3.5)  # not the last one by name, but by number
    cut = checkpoint(stage, 15)
    assert stage.last_checkpoint() == (kept, 3.5)
    assert not cut.exists() and (stage.checkpoints / "checkpoint-9").is_dir()


def test_only_cut_off_checkpoints_mean_a_start_from_the_beginning(tmp_path):
    stage = Stage(tmp_path, "sft", IDENTITY)
    checkpoint(stage, 4)
    assert stage.last_checkpoint() == (None, 0.0)
    assert list(stage.checkpoints.iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from fusedpeft.workflow.state import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_kill_frees_the_folder(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="run is in use by another process: wait for it or"):
            with locked(folder):
                pytest.fail("two processes at once")
    finally:
        holder.kill()
        holder.wait()
    with locked(folder):
        pass
    with locked(folder):  # and it was given back
        pass


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="expected a folder that can be written to"):
            with locked(folder):
                pytest.fail("locked a file")
    assert os.listdir(tmp_path) == ["file"]
